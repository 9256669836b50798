"""A precision is one row in the runtime and one row of bounds. Adding one needs no other table."""

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import onnx_ir
import pytest
import torch

from trtower.bundle.manifest import TowerCost
from trtower.cli import run
from trtower.dtypes import DTYPES
from trtower.errors import ConfigError
from trtower.parity.bounds import BOUNDS
from trtower.spec import BY_DTYPE, EIGHT_BIT, HALVES, PRECISIONS, Precision
from trtower_export.check.emulation import EMULATED
from trtower_export.pipeline import ExportOptions
from trtower_export.precision.quantisation import FORMATS, Format

ROOT = Path(__file__).parents[3]

EXCEPTIONS = {
    "runtime/trtower/parity/bounds.py": "the row of bounds",
    "runtime/trtower/tower/pictures.py": "the dtypes of pictures, which NumPy must be able to read",
    "export/trtower_export/checkpoint/tensors.py": "the dtypes of weights in checkpoints that were not quantised",
}
"""Files that may list several precisions or dtypes, and why."""


def test_every_precision_has_bounds_and_every_8_bit_one_a_format() -> None:
    assert set(BOUNDS) == set(PRECISIONS)
    assert set(FORMATS) == set(EIGHT_BIT)


def test_every_dtype_has_one_precision_that_is_wholly_in_it() -> None:
    assert {*BY_DTYPE} == {each.dtype for each in PRECISIONS.values()}
    assert [each.name for each in BY_DTYPE.values()] == [name for name in PRECISIONS if name not in EIGHT_BIT]


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_every_library_calls_a_precision_what_its_row_says(precision: Precision) -> None:
    dtype = DTYPES[precision.dtype]
    assert dtype.itemsize == precision.itemsize
    assert str(dtype) == f"torch.{precision.dtype}"
    assert onnx_ir.DataType(precision.onnx).numpy() == getattr(ml_dtypes, precision.dtype, precision.dtype)


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_every_backend_calls_a_precision_what_its_row_says(precision: Precision) -> None:
    openvino, tensorrt = pytest.importorskip("openvino"), pytest.importorskip("tensorrt_rtx")
    assert getattr(openvino.Type, precision.openvino).size == precision.itemsize
    assert getattr(tensorrt.DataType, precision.tensorrt).itemsize == precision.itemsize


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_format_is_the_same_in_torch_and_in_onnx(form: Format) -> None:
    info = torch.finfo(form.dtype) if form.dtype.is_floating_point else torch.iinfo(form.dtype)
    assert (form.dtype.itemsize, form.largest) == (1, info.max)
    assert str(form.dtype) == f"torch.{form.onnx.numpy()}"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_export_lists_and_accepts_every_precision(precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", "--help"]) == 0
    assert re.search(rf"\b{precision}\b", capsys.readouterr().out)
    assert ExportOptions(precision=precision).precision == precision
    with pytest.raises(ConfigError, match=rf"choose .*\b{precision}\b"):
        ExportOptions(precision="none of these")


def test_half_precisions_are_emulated_by_their_names() -> None:
    assert {f"emulated-{name}": name for name in HALVES} == EMULATED
    assert set(HALVES) == {name for name, each in PRECISIONS.items() if each.itemsize == 2} - set(EIGHT_BIT)


def words(node: ast.AST) -> set[str]:
    """Return the strings, and the last names of attributes, that a literal lists or is keyed by."""
    parts = node.keys if isinstance(node, ast.Dict) else getattr(node, "elts", [])
    strings = {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}
    return strings | {part.attr for part in parts if isinstance(part, ast.Attribute)}


def tables(source: str) -> Iterator[tuple[int, set[str]]]:
    """Yield the literals that list two precisions or dtypes, or are keyed by them, under any library's names."""
    rows = PRECISIONS.values()
    known = {name for each in rows for name in (each.name, each.dtype, each.openvino, each.tensorrt)}
    known |= {each.dtype.upper() for each in rows}  # ONNX's
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.expr) and len(found := words(node) & known) > 1:
            yield node.lineno, found


@pytest.mark.parametrize(
    "source",
    [
        'SIZE = {"fp16": 2, "fp32": 4}',
        'TYPES = {"float16": 10, "bfloat16": 16}',
        "def narrow(x): return x.dtype in (torch.float16, torch.bfloat16)",
        'if precision in ("fp8", "int8"): pass',
        "FLOATS = [module.DataType.HALF, module.DataType.BF16]",
        "NUMBERS = {TensorProto.FLOAT16, TensorProto.BFLOAT16}",
    ],
)
def test_table_of_precisions_is_recognised(source: str) -> None:
    assert len(list(tables(source))) == 1


def test_no_other_module_has_a_table_of_precisions() -> None:
    found = {
        str(path.relative_to(ROOT)): places
        for folder in ("runtime", "export")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (places := list(tables(path.read_text(encoding="utf-8"))))
    }
    assert {path: places for path, places in found.items() if path not in EXCEPTIONS} == {}
    assert found.keys() == EXCEPTIONS.keys()  # exceptions that are no longer needed must be removed


def test_size_of_a_cut_is_shown_if_every_weight_has_the_same_size() -> None:
    full, cut = (TowerCost(layers=layers, parameters=layers * 1_000_000, flop=0) for layers in (4, 3))
    said = {name: re.findall(r"\((\d+) of (\d+) MB\)", cut.describe_cut(full, name)) for name in PRECISIONS}
    assert {name for name in said if not said[name]} == set(EIGHT_BIT)
    assert (said["fp16"], said["fp32"]) == ([("6", "8")], [("12", "16")])


ROW = """
    Precision(name="fp64", dtype="float64", itemsize=8, onnx=11, tensorrt="DOUBLE", openvino="f64", triton="FP64"),
"""
ROW_OF_BOUNDS = """
    "fp64": Bounds(token_cosine_min=0.99999, token_error_p999=1e-3, relative_error=1e-4),
"""
EXPORT = """
import sys
from trtower.cli import run
checkpoint, out = sys.argv[1:]
sys.exit(run(["export", checkpoint, "--precision", "fp64", "--flavour", "none", "--out", out]) or run(["inspect", out]))
"""


def test_precision_is_added_by_one_row_and_one_row_of_bounds(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("openvino")  # ONNX Runtime has few kernels for FP64
    for folder in ("runtime", "export"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for path, table, row in (
        ("runtime/trtower/spec.py", "_ROWS = (\n", ROW),
        ("runtime/trtower/parity/bounds.py", "BOUNDS = {\n", ROW_OF_BOUNDS),
    ):
        text = (tmp_path / path).read_text(encoding="utf-8")
        assert text.count(table) == 1
        (tmp_path / path).write_text(text.replace(table, table + row), encoding="utf-8")
    places = os.pathsep.join(str(tmp_path / folder) for folder in ("runtime", "export"))
    result = subprocess.run(
        [sys.executable, "-c", EXPORT, str(checkpoints["clip"]), str(tmp_path / "b")],
        env=os.environ | {"PYTHONPATH": places},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "precision    fp64" in result.stdout
