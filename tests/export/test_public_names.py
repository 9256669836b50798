import dataclasses
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trtower_export
from trtower.errors import MissingExtraError


def test_public_names_are_these() -> None:
    assert sorted(trtower_export.__all__) == [
        "Checkpoint",
        "ExportOptions",
        "add_plan",
        "check_bundle",
        "export_tower",
        "open_checkpoint",
    ]
    for name in trtower_export.__all__:
        assert getattr(trtower_export, name).__name__ == name
        assert name in dir(trtower_export)
        assert inspect.getdoc(getattr(trtower_export, name))


def test_names_load_only_when_they_are_used() -> None:
    script = """
import sys
import trtower_export, trtower_export.commands
assert not {"transformers", "onnx", "onnxscript", "tensorrt_rtx"} & sys.modules.keys()
trtower_export.add_plan
assert not {"transformers", "onnx", "onnxscript"} & sys.modules.keys()
trtower_export.open_checkpoint
assert "transformers" in sys.modules
assert not hasattr(trtower_export, "export_twoer")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_option_of_an_export_is_documented() -> None:
    text = inspect.getdoc(trtower_export.ExportOptions) or ""
    for each in dataclasses.fields(trtower_export.ExportOptions):
        assert f"\n    {each.name}: " in text
    for section in ("Args:", "Returns:", "Raises:"):
        assert f"\n{section}\n" in (inspect.getdoc(trtower_export.export_tower) or "")


def test_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(vars(trtower_export), "export_tower", raising=False)  # kept once it was used
    for module in [
        name for name in sys.modules if name.startswith(("trtower_export.pipeline", "trtower_export.graph"))
    ]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(MissingExtraError, match=r"trtower_export.export_tower needs the package onnx, .*export\]"):
        trtower_export.export_tower  # noqa: B018 - the name is imported when it is read


def test_package_that_breaks_is_named(tmp_path: Path) -> None:
    (tmp_path / "onnx.py").write_text("raise AttributeError('numpy.dtype size changed')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    script = "import trtower_export; trtower_export.export_tower"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    error = (
        r"trtower.errors.BrokenExtraError: the installed onnx \S+ fails to import \(AttributeError: .*\): reinstall "
    )
    assert re.match(error, done.stderr.splitlines()[-1])
