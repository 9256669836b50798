"""A message that names an extra contains the command that installs it from where trtower came from."""

import json
import os
import shlex
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trtower import extras
from trtower.errors import MissingExtraError
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
