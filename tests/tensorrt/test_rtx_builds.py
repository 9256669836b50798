"""Plans that each version of TensorRT-RTX builds, which needs no GPU."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tensorrt.modules import MODULES
from trtower.bundle.bundle import Bundle
from trtower.cli import run

pytestmark = pytest.mark.skipif("tensorrt_rtx" not in MODULES, reason="TensorRT-RTX is in other environments")

VERSION_BYTES = slice(24, 28)
"""Where a plan names the TensorRT that built it, one byte for each number."""


@pytest.fixture
def unbuilt(bundles: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that makes a bundle without a plan."""
    return lambda precision: Path(shutil.copytree(bundles(precision=precision), tmp_path / "bundle"))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8", "int8"])
def test_build_command_makes_a_plan_of_this_version(unbuilt: Callable[[str], Path], precision: str) -> None:
    bundle = unbuilt(precision)
    assert run(["build", str(bundle), "--flavour", "tensorrt-rtx"]) == 0
    (plan,) = Bundle.open(bundle).manifest.plans
    assert plan.version == MODULES["tensorrt_rtx"].__version__
    content = Bundle.open(bundle).read(plan.file)
    assert ".".join(map(str, content[VERSION_BYTES])) == plan.version


def test_version_compatible_plan_is_refused_in_one_line(
    unbuilt: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = unbuilt("fp16")
    assert run(["build", str(bundle), "--flavour", "tensorrt-rtx", "--version-compatible"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --version-compatible needs flavour tensorrt: TensorRT-RTX has no lean runtime. ")
    assert not Bundle.open(bundle).manifest.plans
