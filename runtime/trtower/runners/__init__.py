"""Run a bundle's tower on one backend: TensorRT, or ONNX Runtime on CUDA or the CPU."""

from typing import Protocol

import torch


class Runner(Protocol):
    """An opened tower. It may be shared by threads."""

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
