"""Run a bundle's tower on one backend: TensorRT, ONNX Runtime on CUDA or the CPU, or OpenVINO."""

from collections.abc import Callable
from typing import Any, Protocol

import torch

from trtower.spec import BatchProfile, TensorSpec

CLOSED = "this tower is closed: close() and load_model() open it again."

Run = Callable[[torch.Tensor, torch.Tensor], None]
"""Fills its second argument from its first, as Runner.run does."""

OnStart = Callable[[Any], None]
"""Is called when a call has its turn, with the CUDA stream that it runs in, or None on the CPU."""


class Runner(Protocol):
    """An opened tower. It may be shared by threads."""

    @property
    def backend(self) -> str:
        """The name by which it is asked for, such as "tensorrt-rtx"."""

    @property
    def name(self) -> str:
        """What really runs, such as "tensorrt-rtx 1.7.1, sm89"."""

    @property
    def files(self) -> tuple[str, ...]:
        """The files of the bundle that it executes."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of both tensors."""

    def run(self, pixel_values: torch.Tensor, hidden_states: torch.Tensor, on_start: OnStart | None = None) -> None:
        """Fill ``hidden_states`` (B, P + N, D) from ``pixel_values`` (B, 3, S, S).

        Both are contiguous, of this runner's dtype and on its device, and B is within the batch profile. On
        CUDA the work is only queued, after what the current stream holds and before what it is given next.
        """

    def keep(self) -> None:
        """Keep what the backend has compiled so far for the next process, where it can."""

    def close(self) -> None:
        """Let calls in flight end, and free what this runner holds; a later `run` raises BackendError."""


def run_batch(
    runner: Runner,
    profile: BatchProfile,
    output: TensorSpec,
    pixel_values: torch.Tensor,
    *,
    run: Run | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run any number of images, in as many calls as the profile asks for: (B, 3, S, S) -> (B, P + N, D).

    ``run`` takes the place of the runner's own. ``out`` is filled and returned: contiguous, and as the output is.
    """
    if out is None:
        tokens, width = (int(size) for size in output.shape[1:])
        out = torch.empty((len(pixel_values), tokens, width), dtype=runner.dtype, device=runner.device)
    call = run or runner.run
    for start, stop in profile.pieces(len(pixel_values)):
        call(pixel_values[start:stop], out[start:stop])
    return out
