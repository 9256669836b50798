"""Run a bundle's tower on one backend: TensorRT, or ONNX Runtime on CUDA or the CPU."""

from typing import Protocol

import torch

from trtower.spec import BatchProfile, TensorSpec


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

    def run(self, pixel_values: torch.Tensor, hidden_states: torch.Tensor) -> None:
        """Fill ``hidden_states`` (B, P + N, D) from ``pixel_values`` (B, 3, S, S).

        Both are contiguous, of this runner's dtype and on its device, and B is within the batch profile. On
        CUDA the work comes after what the current stream holds; TensorRT only queues it there, ONNX Runtime waits.
        """


def run_batch(runner: Runner, profile: BatchProfile, output: TensorSpec, pixel_values: torch.Tensor) -> torch.Tensor:
    """Run any number of images, in as many calls as the profile asks for: (B, 3, S, S) -> (B, P + N, D)."""
    tokens, width = (int(size) for size in output.shape[1:])
    hidden_states = torch.empty((len(pixel_values), tokens, width), dtype=runner.dtype, device=runner.device)
    for start, stop in profile.pieces(len(pixel_values)):
        runner.run(pixel_values[start:stop], hidden_states[start:stop])
    return hidden_states
