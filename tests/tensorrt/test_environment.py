"""The environment is one that make_environment.py made; otherwise the other tests here would have nothing to test."""

from pathlib import Path

import trtower
import trtower_export
from tests.tensorrt.make_environment import FIRST_LEAN
from tests.tensorrt.modules import MODULES
from trtower.flavour import parse_version

ROOT = Path(__file__).parent.parent.parent


def test_environment_has_either_tensorrt_with_the_lean_runtime_if_there_is_one_or_tensorrt_rtx() -> None:
    assert set(MODULES) in ({"tensorrt", "tensorrt_lean"}, {"tensorrt"}, {"tensorrt_rtx"})
    if "tensorrt" in MODULES:
        assert ("tensorrt_lean" in MODULES) == (parse_version(MODULES["tensorrt"].__version__)[:2] >= FIRST_LEAN)
    assert len({module.__version__ for module in MODULES.values()}) == 1


def test_environment_sees_this_checkout() -> None:
    for package in (trtower, trtower_export):
        assert Path(package.__file__ or "").is_relative_to(ROOT)
