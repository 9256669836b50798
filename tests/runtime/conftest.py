"""Fixtures for testing the GPU runners without a GPU."""

from collections.abc import Callable

import pytest
import torch

from tests.runtime.fake_tensorrt_without_gpu import FakeCuda, FakeEvent
from trtower.runners.onnxruntime import OnnxRuntimeRunner
from trtower.runners.slot import Slot


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for name in ("device", "current_stream", "get_device_capability", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "Stream", fake.new_stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fake.new_graph)
    monkeypatch.setattr("trtower.runners.slot.allocate", lambda size, device: torch.empty(64))
    # Host memory is not aligned like a GPU's; tests/gpu tests slices on a real one.
    monkeypatch.setattr("trtower.runners.tensorrt.ALIGNMENT", 1)
    # On a GPU, torch reuses freed memory only after its stream is done with it. Host memory has no such guarantee.
    for runner, queue in ((Slot, "_launch"), (OnnxRuntimeRunner, "_run")):
        monkeypatch.setattr(runner, queue, _holding(getattr(runner, queue), fake.held))
    return fake


def _holding(call: Callable[..., None], held: list[object]) -> Callable[..., None]:
    """Make a call keep its arguments alive."""

    def keep(*arguments: object) -> None:
        held.append(arguments[1:])
        call(*arguments)

    return keep
