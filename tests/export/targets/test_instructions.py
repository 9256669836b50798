"""BUILD.md: its commands exist, with these options, in every trtexec and in Polygraphy."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trtower import __version__
from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import BUILD_NOTES, GRAPH_DATA
from trtower.errors import BackendError
from trtower.spec import BatchProfile
from trtower_export.targets.instructions import NEEDS_CUDA_13, OF_A_JETPACK

TREXEC = sorted((Path(__file__).parent / "trtexec").glob("*.txt"))

ONE, SEVERAL = (
    (BatchProfile(min=1, opt=2, max=4),),
    (BatchProfile(min=1, opt=1, max=2), BatchProfile(min=3, opt=4, max=8)),
)


JETPACK_TORCH, CONTAINER_TORCH = "pip install torch==2.8.0 ", "With an older driver, install one for CUDA 12 first"


def commands(bundle: Path) -> dict[str, list[str]]:
    """Return the commands of BUILD.md, by program and subcommand."""
    notes = (bundle / BUILD_NOTES).read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", notes, flags=re.DOTALL)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in blocks.splitlines()]
    return {" ".join(line[: 1 if line[0] == "trtexec" else 2]): line for line in lines if line}


@pytest.fixture(params=[ONE, SEVERAL], ids=["one profile", "several"])
def bundle(export: Callable[..., Path], request: pytest.FixtureRequest) -> Bundle:
    return Bundle.open(export("clip", flavour="none", profiles=request.param))


@pytest.mark.parametrize("path", TREXEC, ids=lambda path: path.stem)
def test_trtexec_of_every_version_knows_the_options(bundle: Bundle, path: Path) -> None:
    known = {*path.read_text(encoding="utf-8").split()}
    line = commands(bundle.path)["trtexec"]
    assert {option.partition("=")[0] for option in line[1:]} <= known
    assert {"--stronglyTyped", "--noTF32", "--skipInference"} <= {*line}


def test_trtexec_gets_each_profile_with_its_shapes_behind_it(bundle: Bundle) -> None:
    line = commands(bundle.path)["trtexec"]
    size = bundle.manifest.spec.image_size
    for index, profile in enumerate(bundle.manifest.profiles):
        shapes = [
            f"--{bound}Shapes=pixel_values:{batch}x3x{size}x{size}"
            for bound, batch in (("min", profile.min), ("opt", profile.opt), ("max", profile.max))
        ]
        start = line.index(f"--profile={index}") + 1 if len(bundle.manifest.profiles) > 1 else line.index(shapes[0])
        assert line[start : start + 3] == shapes
    assert line[1] == f"--onnx={bundle.manifest.name}/tower.onnx"


def test_polygraphy_builds_the_plan(bundle: Bundle, tmp_path: Path) -> None:
    """With TensorRT-RTX, because data-centre TensorRT needs a GPU; Polygraphy reads the options alike."""
    line = commands(bundle.path)["polygraphy convert"]
    assert line.count("--trt-opt-shapes") == len(bundle.manifest.profiles)
    assert "--strongly-typed" in line
    (tmp_path / bundle.manifest.name).symlink_to(bundle.path)
    program = Path(sys.executable).with_name("polygraphy")
    environment = os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    done = subprocess.run([program, *line[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:]
    weights = bundle.manifest.files[GRAPH_DATA].size
    assert (tmp_path / f"{bundle.manifest.name}.plan").stat().st_size > weights


def test_trtower_runs_the_first_command(bundle: Bundle) -> None:
    assert commands(bundle.path)["trtower build"] == ["trtower", "build", bundle.manifest.name, "--flavour", "tensorrt"]
    check = ["trtower", "check", bundle.manifest.name, "--backend", "tensorrt"]
    assert commands(bundle.path)["trtower check"] == [*check, "--checkpoint", "CHECKPOINT"]  # it was a folder here


@pytest.mark.parametrize(
    ("target", "extra", "flavour", "others", "torch"),
    [
        ("jetpack-6.2", "build", "tensorrt", {"python3 -m venv --system-site-packages"}, 0),
        ("triton-24.08", "build", "tensorrt", {"docker run"}, 1),
        ("h100", "trt-build", "tensorrt", {"python3 -m venv .venv"}, 2),
        ("l4", "trt-rtx-build", "tensorrt-rtx", {"python3 -m venv .venv"}, 2),
        ("orin", "build", "tensorrt", {"python3 -m venv --system-site-packages"}, 3),
    ],
)
def test_commands_fit_the_target(
    export: Callable[..., Path], target: str, extra: str, flavour: str, others: set[str], torch: int
) -> None:
    bundle = export("clip", flavour="none", target=target)
    lines, notes = commands(bundle), (bundle / BUILD_NOTES).read_text(encoding="utf-8")
    assert f"pip install './trtower-{__version__}-py3-none-any.whl[{extra}]'\n" in notes
    assert lines["trtower build"][3:5] == ["--flavour", flavour]
    assert lines["trtower check"][3:5] == ["--backend", flavour]
    environments = ("python3 -m venv --system-site-packages", "python3 -m venv .venv", "docker run")
    assert {each for each in environments if each in notes} == others
    hints = (JETPACK_TORCH, CONTAINER_TORCH, NEEDS_CUDA_13, OF_A_JETPACK)
    assert [hint for hint in hints if hint in notes] == [hints[torch]]


def test_python_lines_load_the_bundle(export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = export("clip", flavour="none", target="l4")
    notes = (bundle / BUILD_NOTES).read_text(encoding="utf-8")
    (lines,) = re.findall(r"```python\n(.*?)```", notes, flags=re.DOTALL)
    monkeypatch.chdir(bundle.parent)
    with pytest.raises(BackendError, match="tensorrt-rtx"):  # no GPU here
        exec(lines, {})  # noqa: S102 - what the page says
    variables: dict[str, Any] = {}
    exec(lines.replace("tensorrt-rtx", "auto"), variables)  # noqa: S102
    assert variables["tower"].is_loaded


def test_known_faults_are_listed(export: Callable[..., Path]) -> None:
    notes = (export("clip", flavour="none", target="jetpack-6.2") / BUILD_NOTES).read_text(encoding="utf-8")
    assert "- dynamic-transformer-on-10.3: " in notes
    assert "dinov3" not in notes
    assert "reported faults" not in (export("clip", flavour="none") / BUILD_NOTES).read_text(encoding="utf-8")


def test_command_accepts_the_faults_that_the_export_was_told_to_accept(export: Callable[..., Path]) -> None:
    lines = commands(export("clip", flavour="none", target="tensorrt-10.16"))  # of which GPU, the build will see
    assert "--accept-known-fault" not in lines["trtower build"]
    accepted = export("clip", flavour="none", target="tensorrt-10.16", accept_known_faults=("fused-attention-sm120",))
    assert commands(accepted)["trtower build"][-2:] == ["--accept-known-fault", "fused-attention-sm120"]
