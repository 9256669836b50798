"""A message that names an extra contains the command that installs it from where trtower came from."""

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trtower import extras
from trtower.errors import BrokenExtraError, MissingExtraError
from trtower.extras import extra_of, how_to_install, import_extra

GIT = {"url": "https://example.org/trtower.git", "vcs_info": {"vcs": "git", "commit_id": "0" * 40}}
AT_A_TAG = {**GIT, "vcs_info": {"vcs": "git", "commit_id": "0" * 40, "requested_revision": "v1"}, "subdirectory": "a"}
SSH = {"url": "ssh://git@example.org/trtower.git", "vcs_info": {"vcs": "git", "commit_id": "0" * 40}}
WHEEL = {"url": "https://example.org/trtower-1-py3-none-any.whl", "archive_info": {}}


def install_from(monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any] | None) -> None:
    text = None if origin is None else json.dumps(origin)
    monkeypatch.setattr(extras, "distribution", lambda _: SimpleNamespace(read_text=lambda _: text))


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, "pip install 'trtower[cpu]'"),
        (GIT, "pip install 'trtower[cpu] @ git+https://example.org/trtower.git'"),
        (AT_A_TAG, "pip install 'trtower[cpu] @ git+https://example.org/trtower.git@v1#subdirectory=a'"),
        (SSH, "pip install 'trtower[cpu] @ git+ssh://git@example.org/trtower.git'"),
        (WHEEL, "pip install 'trtower[cpu] @ https://example.org/trtower-1-py3-none-any.whl'"),
        ({"url": "file:///nowhere/at/all", "dir_info": {}}, "pip install 'trtower[cpu]'"),
    ],
)
def test_extra_comes_from_where_trtower_did(
    monkeypatch: pytest.MonkeyPatch, origin: dict[str, Any] | None, command: str
) -> None:
    install_from(monkeypatch, origin)
    assert how_to_install("cpu") == command


@pytest.mark.parametrize("folder", ["clone", "a clone", "it's"])
@pytest.mark.parametrize("editable", [True, False])
def test_folder_is_quoted_for_a_shell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: str, *, editable: bool
) -> None:
    clone = tmp_path / folder
    clone.mkdir()
    install_from(monkeypatch, {"url": clone.as_uri(), "dir_info": {"editable": editable}})
    expected = ["pip", "install", *(["-e"] if editable else []), f"{clone}[cpu,cli]"]
    assert shlex.split(how_to_install("cpu,cli")) == expected


def test_command_is_plain_if_trtower_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "distribution", missing)
    assert how_to_install("cpu") == "pip install 'trtower[cpu]'"


def test_missing_package_says_how_to_install_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    install_from(monkeypatch, GIT)
    expected = f"a test needs the package nowhere, which is not installed: {how_to_install('cpu')}"
    with pytest.raises(MissingExtraError) as caught:
        import_extra("nowhere.inside", extra="cpu", purpose="a test")
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("raise AttributeError('numpy.dtype size\\n changed')", "AttributeError: numpy.dtype size changed"),
        ("import ctypes; ctypes.CDLL('libgone.so.1')", "OSError: libgone.so.1: cannot open shared object file: .*"),
        ("from json import gone", "ImportError: cannot import name 'gone' from 'json' .*"),
    ],
)
def test_broken_package_says_which_environment_would_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, reason: str
) -> None:
    install_from(monkeypatch, GIT)
    (tmp_path / "crumbling.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BrokenExtraError) as caught:
        import_extra("crumbling", extra="ray", purpose="a test")
    begins = (
        rf"the installed crumbling fails to import \({reason}\): reinstall crumbling, or use a separate environment "
    )
    assert re.fullmatch(begins + re.escape(f"for a test: {how_to_install('ray')}"), str(caught.value))
    assert caught.value.__cause__ is not None


def test_package_that_lacks_another_says_what_brings_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_from(monkeypatch, GIT)
    (tmp_path / "lacking.py").write_text("import gone")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BrokenExtraError) as caught:
        import_extra("lacking", extra="ray", purpose="a test")
    assert str(caught.value) == (
        "the installed lacking fails to import (ModuleNotFoundError: No module named 'gone'): install all that a test "
        f"needs, here or in a separate environment: {how_to_install('ray')}"
    )


def test_package_without_the_part_is_not_called_missing() -> None:
    with pytest.raises(
        BrokenExtraError, match=r"^the installed numpy \S+ fails to import \(ModuleNotFoundError: .*gone'"
    ):
        import_extra("numpy.gone", extra="ray", purpose="a test")


def test_packages_that_disagree_are_one_line(tmp_path: Path) -> None:
    protobuf = tmp_path / "google" / "protobuf"  # of version 4, for which tritonclient's messages are too new
    protobuf.mkdir(parents=True)
    (protobuf / "__init__.py").touch()
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    program = "from trtower.serving.triton.config import messages; messages()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    error = r"trtower.errors.BrokenExtraError: the installed tritonclient \S+ fails to import \(ImportError: .* from "
    assert re.match(
        rf"{error}'google.protobuf' .*separate environment for making a model repository: pip .*\[triton\]",
        done.stderr.splitlines()[-1],
    )


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("typer.main", "cli"),
        ("polygraphy.config", "trt-rtx-build"),
        ("tensorrt_rtx", "trt-rtx"),
        ("tensorrt", "trt"),
        ("onnx", "export"),
        ("huggingface_hub", "export"),
        ("nowhere", None),
    ],
)
def test_extra_is_the_one_that_requires_the_package(
    monkeypatch: pytest.MonkeyPatch, module: str, extra: str | None
) -> None:
    requirements = [
        "torch>=2.6",
        "typer>=0.15; extra == 'cli'",
        "tensorrt-rtx>=1.5; extra == 'trt-rtx'",
        "tensorrt>=10.4; extra == 'trt'",
        "trtower[cli,trt-rtx]; extra == 'trt-rtx-build'",
        "polygraphy>=0.53; extra == 'trt-rtx-build'",
        "polygraphy>=0.53; extra == 'trt-build'",
        "onnxscript>=0.5; extra == 'export'",
        "huggingface-hub>=0.34; extra == 'export'",
        'onnx>=1.19; (python_version >= "3.10") and extra == "export"',
    ]
    monkeypatch.setattr(extras, "requires", lambda _: requirements)
    assert extra_of(module) == extra


def test_no_message_contains_a_hard_coded_install_command() -> None:
    root = Path(__file__).parent.parent.parent
    sources = [path for side in ("runtime", "export") for path in (root / side).rglob("*.py")]
    assert [path.name for path in sources if "pip install 'trtower" in path.read_text(encoding="utf-8")] == []


def test_onnxruntime_is_imported_without_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    import_extra("onnxruntime", extra="cpu", purpose="a test")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    import_extra("onnxruntime", extra="cpu", purpose="a test")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
