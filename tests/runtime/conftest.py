"""Fixtures that test the GPU runners without a GPU."""

from collections.abc import Callable

import pytest
import torch

from tests.runtime.fake_tensorrt_without_gpu import FakeCuda, FakeEvent
from trtower.runners.contexts import ContextSlot
from trtower.runners.onnxruntime import OnnxRuntimeRunner


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for name in ("device", "current_stream", "get_device_capability", "stream", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "Stream", fake.new_stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fake.new_graph)
    monkeypatch.setattr("trtower.runners.contexts.allocate", lambda size, device: torch.empty(64))
    # Host memory is not aligned like GPU memory; tests/gpu tests unaligned slices.
    monkeypatch.setattr("trtower.runners.tensorrt.ALIGNMENT", 1)
    # Torch reuses GPU memory only when its stream is done with it. Host memory is reused at once, so keep it alive.
    for runner, queue in ((ContextSlot, "_launch"), (OnnxRuntimeRunner, "_run")):
        monkeypatch.setattr(runner, queue, _holding(getattr(runner, queue), fake.held))
    return fake


def _holding(call: Callable[..., None], held: list[object]) -> Callable[..., None]:
    """Make a call keep its arguments alive."""

    def keep(*arguments: object) -> None:
        held.append(arguments[1:])
        call(*arguments)

    return keep
