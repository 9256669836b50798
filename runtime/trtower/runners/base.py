"""The two things that every backend defines, a Backend and a Runner, and what the runners share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import GRAPH
from trtower.errors import BundleError, ConfigError
from trtower.names import check_name
from trtower.spec import EIGHT_BIT, BatchProfile, TensorSpec

CLOSED = "this tower is closed; to open it again, call close() and then load_model()."

Shape = tuple[int | str, ...]

Run = Callable[[torch.Tensor, torch.Tensor], None]
"""Fills its second argument from its first, as Runner.run does."""

OnStart = Callable[[Any], None]
"""Called when a call's turn comes, with the CUDA stream that the call runs in, or None on the CPU."""


class Runner(Protocol):
    """An open tower, which threads may share.

    Attributes:
        backend: The backend's name, such as "tensorrt-rtx".
        name: What actually runs, such as "tensorrt-rtx 1.7.1, sm89".
        files: The files of the bundle that it executes.
        device: The device that holds both tensors of a call.
        dtype: The dtype of the hidden states.
        pixel_dtype: The dtype of the pixel values: the same, or uint8.
    """

    backend: str
    name: str
    files: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    pixel_dtype: torch.dtype

    def run(self, pixel_values: torch.Tensor, hidden_states: torch.Tensor, on_start: OnStart | None = None) -> None:
        """Compute the hidden states of a batch of images.

        On CUDA this only queues the work: after what is already in the current stream, and before what enters it next.

        Args:
            pixel_values: The images, (B, 3, S, S) or bytes as the manifest says, with B within the batch profile.
                Contiguous, on this runner's device and of its ``pixel_dtype``.
            hidden_states: The tensor to fill, (B, P + N, D). Contiguous, on this runner's device and of its dtype.
            on_start: Called when this call's turn comes, with the CUDA stream that it runs in, or None on the CPU.

        Raises:
            BackendError: The runner is closed, or the backend cannot run this batch.
        """

    def keep(self) -> None:
        """Save what the backend has compiled so far for the next process; by default, do nothing."""
        return  # a body, so that runners need not define their own

    def close(self) -> None:
        """Wait for the calls in flight, then free what this runner holds; a later `run` raises BackendError."""


SPECIALIZATIONS = ("lazy", "eager", "none")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a bundle runs, mostly on a GPU.

    Attributes:
        contexts: How many calls TensorRT (either flavour) and PyTorch may have in flight at once, at least 1; others
            wait for their turn. Each has its own memory, and is made on demand, as far as the GPU has room.
        cuda_graphs: Capture calls as CUDA graphs and replay them. TensorRT, PyTorch and ONNX Runtime do so for the
            batches that the profiles name (minimum, optimum, maximum), TensorRT-RTX for any batch.
        kernel_specialization: Whether TensorRT-RTX compiles kernels for each new shape: "lazy" compiles them in the
            background, "eager" before the shape is served, "none" never.
        runtime_cache: Save in a folder beside the bundle, for the next process, what TensorRT-RTX or ``compile``
            compiled.
        compile: Let PyTorch compile the batches that the profiles name, with `torch.compile`, while the tower is
            loaded, on CUDA and on the CPU. The first time may take minutes. It needs a C++ compiler, and
            on CUDA triton. Other backends ignore it.

    Raises:
        ConfigError: ``contexts`` is below 1, or ``kernel_specialization`` is unknown.
    """

    contexts: int = 4
    cuda_graphs: bool = True
    kernel_specialization: str = "lazy"
    runtime_cache: bool = True
    compile: bool = False

    def __post_init__(self) -> None:
        if self.contexts < 1:
            raise ConfigError(f"contexts must be at least 1; got {self.contexts}.")
        check_name("kernel_specialization", self.kernel_specialization, SPECIALIZATIONS)


@dataclass(frozen=True, kw_only=True)
class Backend(ABC):
    """One way to run bundles. `auto`, `trtower inspect` and `trtower bench` know every backend through this class.

    Attributes:
        name: What users call it in options, such as "openvino-bf16".
        product: What people call the software, such as "OpenVINO".
        package: The PyPI package that provides it.
        kind: The kind of device that it runs on, "cpu" or "cuda".
        arithmetic: A precision, such as "fp32", if it computes in that whatever the bundle's own; "" if it computes in
            the bundle's.
        compiles: Whether `EngineOptions.compile` changes how it runs a bundle.
    """

    name: str
    product: str
    package: str
    kind: str
    arithmetic: str = ""
    compiles: bool = False

    @property
    def common_name(self) -> str:
        """What names this backend and its counterpart on the other kind of device, such as "torch"."""
        return self.name.removesuffix(f"-{self.kind}")

    def files(self, bundle: Bundle) -> Sequence[str]:
        """List the files of a bundle that this backend might run.

        Args:
            bundle: The bundle to run.

        Returns:
            Names of files in the bundle, best first. By default only the graph; a backend that runs plans overrides it.
        """
        return (GRAPH,)

    def lacks(self, bundle: Bundle) -> str:
        """Say that a bundle has no file for this backend, and how to add one.

        Args:
            bundle: The bundle, for which `files` lists nothing.

        Returns:
            The reason, in words.
        """
        return f"the bundle has no {self.name} plan: trtower build {bundle.path} --flavour {self.name}"

    @abstractmethod
    def obstacle(self, bundle: Bundle, file: str, device: torch.device) -> str | None:
        """Say why this backend cannot run a file of the bundle, without loading any of the bundle.

        An implementation need not catch what importing its package raises: the caller turns that into an obstacle.

        Args:
            bundle: The bundle to run.
            file: One of the names that `files` lists.
            device: The device to run on. It exists.

        Returns:
            The reason, in words; None if the backend can run the file.
        """

    @abstractmethod
    def open(self, bundle: Bundle, file: str, device: torch.device, engine: EngineOptions) -> Runner:
        """Verify the files that the runner needs, and load them.

        Args:
            bundle: The bundle to run.
            file: One of the names that `files` lists.
            device: The device to run on.
            engine: How to run it on a GPU.

        Returns:
            A runner that is ready for calls.

        Raises:
            BundleError: A file was altered, or does not match the manifest.
            BackendError: The backend could not load the file.
        """

    def why_coarse(self, precision: str) -> str | None:
        """Say why the answers of this backend may be coarser than a bundle's precision, so that only a check can tell.

        Args:
            precision: The bundle's precision, such as "fp16".

        Returns:
            The reason as a clause; None if it computes at least in that precision.
        """
        if self.arithmetic in ("", "fp32", precision):
            return None
        half = "FP16, in which an 8-bit bundle computes the rest" if precision in EIGHT_BIT else precision
        return f"it computes in {self.arithmetic.upper()}, which is coarser than {half}"

    def computes_in(self, precision: str) -> str:
        """Return the arithmetic in which this backend runs a bundle.

        Args:
            precision: The bundle's precision, such as "fp16".

        Returns:
            A precision such as "fp32". For an 8-bit bundle that is always the bundle's own.
        """
        return precision if precision in EIGHT_BIT else self.arithmetic or precision


def check_contract(
    bundle: Bundle, file: str, inputs: list[tuple[str, Shape]], outputs: list[tuple[str, Shape]]
) -> None:
    """Raise BundleError unless a file's tensors match the manifest, which decides how large the output buffers are.

    ``inputs`` and ``outputs`` are the names and shapes of the file's tensors, with "batch" for the batch size.
    """
    for tensors, spec in ((inputs, bundle.manifest.input), (outputs, bundle.manifest.output)):
        if tensors != [(spec.name, spec.shape)]:
            raise BundleError(
                f"{bundle.path}: {file} has {tensors}; tower.json says {(spec.name, spec.shape)}. Export the bundle "
                "again."
            )


def run_batch(
    runner: Runner,
    profile: BatchProfile,
    output: TensorSpec,
    pixel_values: torch.Tensor,
    *,
    run: Run | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run images, split into as many calls as the profile requires: (B, 3, S, S) -> (B, P + N, D).

    ``run`` replaces `runner.run`. ``out``, if passed, is filled and returned; it must be contiguous and have the
    output's shape, dtype and device. Raises InputError if B is below the profile's minimum.
    """
    if out is None:
        out = torch.empty((len(pixel_values), *output.row), dtype=runner.dtype, device=runner.device)
    call = run or runner.run
    for start, stop in profile.pieces(len(pixel_values)):
        call(pixel_values[start:stop], out[start:stop])
    return out
