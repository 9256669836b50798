"""Hold what a user gets from the wheel, in an environment of its own: `make test-wheel` runs this four times.

`smoke.py bare BUNDLE` runs with the wheel and no extra, `smoke.py cli BUNDLE` with the extra `cli`,
`smoke.py verify BUNDLE` with a backend too, and `smoke.py torch BUNDLE` with the extra `torch`.
"""

import importlib
import importlib.metadata
import subprocess
import sys
from importlib.util import find_spec

import trtower
from trtower.errors import BackendError, MissingExtraError, TrtowerError
from trtower.extras import import_extra

ABSENT = ("transformers", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "polygraphy", "matplotlib")
BACKENDS = {"onnxruntime-cpu": "cpu", "openvino": "openvino", "torch-cpu": "torch"}
"""Backends that need no GPU, and the extra that their error must name."""
COMMANDS = {
    ("export", "openai/clip-vit-base-patch32"): "export",
    ("check", "BUNDLE"): "export",
    ("bench", "BUNDLE"): "export",
    ("doctor", "BUNDLE"): "export",
    ("demo",): "export,cpu,demo",
    ("build", "BUNDLE"): "trt-rtx-build",
}
"""Commands that need another extra, which their error must name."""


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the installed command."""
    command = [sys.executable, "-m", "trtower", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def expect_one_line(done: "subprocess.CompletedProcess[str]", extra: str) -> None:
    """Hold that a command failed with one line that names the extra."""
    assert done.returncode in {1, 2}, done
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: "), line
    assert f"trtower[{extra}" in line, line


def bare(bundle: str) -> None:
    """Without an extra: everything imports, and everything that is missing is named with its extra."""
    assert importlib.metadata.version("trtower") == trtower.__version__
    for name in trtower.__all__:
        getattr(trtower, name)
    assert [package for package in (*ABSENT, "typer", "rich") if find_spec(package)] == []
    extras = importlib.metadata.metadata("trtower").get_all("Provides-Extra") or []
    for extra in extras:
        try:
            import_extra("no_such_package", extra=extra, purpose=extra)
        except MissingExtraError as err:
            assert f"trtower[{extra}]" in str(err), err  # noqa: PT017 - this is not pytest
        else:
            raise AssertionError("no_such_package was imported, and does not exist")
    for backend, extra in BACKENDS.items():
        try:
            trtower.VisionTower.load(bundle, backend=backend)
        except BackendError as err:
            assert f"trtower[{extra}]" in str(err), err  # noqa: PT017 - this is no pytest
        else:
            raise AssertionError(f"{backend} ran, and is not installed")
    expect_one_line(run("inspect", bundle), "cli")
    export = importlib.import_module("trtower_export")
    for name in export.__all__:
        try:
            getattr(export, name)
        except TrtowerError as err:
            assert "trtower[export]" in str(err), err  # noqa: PT017 - this is no pytest


def cli(bundle: str) -> None:
    """With the extra `cli`: the command inspects, and names the extra of whatever else it is asked for."""
    inspected = run("inspect", bundle)
    assert inspected.returncode == 0, inspected
    assert "RANDOM WEIGHTS" in inspected.stdout, inspected.stdout
    assert run("--version").stdout.split() == ["trtower", trtower.__version__]
    assert run("--help").returncode == 0
    for arguments, extra in COMMANDS.items():
        expect_one_line(run(*(bundle if each == "BUNDLE" else each for each in arguments)), extra)


def verify(bundle: str) -> None:
    """With a backend: the runtime alone proves the bundle, in the command and as a service starts."""
    verified = run("verify", bundle)
    assert verified.returncode == 0, verified
    assert "passed (rehearsal with random weights): the ONNX graph was run on openvino" in verified.stdout, (
        verified.stdout
    )
    assert trtower.VisionTower.load(bundle, verify=True).is_loaded
    assert [package for package in ("transformers", "onnx") if find_spec(package)] == []


def torch(bundle: str) -> None:
    """With the extra `torch`: PyTorch runs the graph, and races OpenVINO, without transformers."""
    verified = run("verify", bundle, "--backend", "torch")
    assert verified.returncode == 0, verified
    assert "the ONNX graph was run on torch" in verified.stdout, verified.stdout
    tuned = run("tune", bundle)
    assert tuned.returncode == 0, tuned
    assert {"openvino", "torch-cpu"} <= {*tuned.stdout.split()}, tuned.stdout
    assert "which auto follows where no plan runs" in run("inspect", bundle).stdout
    assert find_spec("transformers") is None


if __name__ == "__main__":
    {"bare": bare, "cli": cli, "verify": verify, "torch": torch}[sys.argv[1]](sys.argv[2])
    print(f"the wheel holds: {sys.argv[1]}")  # noqa: T201 - a script's only word
