"""The fake of the normal tests, held against every real module."""

import pytest

from tests.runtime.fake_tensorrt_without_gpu import FakeCuda, FakeTensorRT
from tests.runtime.signatures import differences
from tests.tensorrt.modules import MODULES


@pytest.mark.parametrize("name", MODULES)
def test_fake_has_only_names_and_parameters_of_the_real_module(name: str) -> None:
    assert not [*differences(FakeTensorRT(FakeCuda(), name), MODULES[name])]
