"""Compute a module as its graph says, whatever PyTorch's global settings say."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import fx


def multiplies_fp32(module: fx.GraphModule) -> bool:
    """Return whether a module may compute matrix products in FP32.

    True if it holds FP32 weights with two dimensions or more, or computes anything in FP32, unless only of vectors.
    """
    held = any(each.dtype == torch.float32 and each.ndim > 1 for each in module.buffers())
    return held or any(torch.float32 in node.args for node in module.graph.nodes)


@contextmanager
def as_typed(device: str, *, exact_fp32: bool) -> Iterator[None]:
    """Compute inside the block in the types of the tensors, without autocast and gradients.

    With ``exact_fp32`` PyTorch computes no FP32 product in TF32 or BF16, as it may after
    `torch.set_float32_matmul_precision("high")`. On CUDA it sums no product in FP16, either. These settings belong to
    the process, so other threads compute exactly, too, until the last block ends.

    Args:
        device: The kind of device, "cpu" or "cuda".
        exact_fp32: Whether the block computes FP32 products.
    """
    exact = exact_fp32 or (device == "cuda" and _EXACT.changes_fp16())
    with torch.autocast(device, enabled=False), torch.no_grad(), _EXACT if exact else nullcontext():
        yield


SUMS_IN_FP16 = "allow_fp16_accumulation"
"""A setting of matrix products on CUDA, since PyTorch 2.7."""


class _Exact:
    """Sets PyTorch's switches for products while any thread is inside; the last one out restores them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[Any] = []

    def changes_fp16(self) -> bool:
        """Return whether products in FP16 need it: their sums would be in FP16, or would be once the others are out."""
        with self._lock:
            return self._inside > 0 or bool(getattr(torch.backends.cuda.matmul, SUMS_IN_FP16, False))

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                switches = _switches()
                self._before = [read() for read, _, _ in switches]
                for _, write, exact in switches:
                    write(exact)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for (_, write, _), before in zip(_switches(), self._before, strict=True):
                    write(before)


Switch = tuple[Callable[[], Any], Callable[[Any], None], Any]
"""How a setting is read and written, and its value for exact products."""


def _switches() -> list[Switch]:
    backends: Any = torch.backends
    switches = [_attribute(backends.cuda.matmul, SUMS_IN_FP16, exact=False)]
    if not hasattr(backends.cuda.matmul, "fp32_precision"):  # before PyTorch 2.9
        matmul = (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")
        return [*(each for each in switches if hasattr(backends.cuda.matmul, SUMS_IN_FP16)), matmul]
    owners = (backends.cuda.matmul, backends.mkldnn.matmul)
    return [*switches, *(_attribute(owner, "fp32_precision", exact="ieee") for owner in owners)]


def _attribute(owner: Any, name: str, *, exact: Any) -> Switch:
    return partial(getattr, owner, name), partial(setattr, owner, name), exact


_EXACT = _Exact()
