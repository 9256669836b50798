"""What every backend defines, a Backend and a Runner, and what the runners share."""

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

CLOSED = "this tower is closed: close() and load_model() open it again."

Shape = tuple[int | str, ...]

Run = Callable[[torch.Tensor, torch.Tensor], None]
"""Fills its second argument from its first, as Runner.run does."""

OnStart = Callable[[Any], None]
"""Is called when a call has its turn, with the CUDA stream that it runs in, or None on the CPU."""


class Runner(Protocol):
    """An opened tower. It may be shared by threads.

    ``backend`` is the name by which it is asked for, such as "tensorrt-rtx"; ``name`` is what really runs, such as
    "tensorrt-rtx 1.7.1, sm89". ``files`` are those of the bundle that it executes, and ``dtype`` is that of both
    tensors.
    """

    backend: str
    name: str
    files: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype

    def run(self, pixel_values: torch.Tensor, hidden_states: torch.Tensor, on_start: OnStart | None = None) -> None:
        """Fill ``hidden_states`` (B, P + N, D) from ``pixel_values`` (B, 3, S, S).

        Both are contiguous, of this runner's dtype and on its device, and B is within the batch profile. On
        CUDA the work is only queued, after what the current stream holds and before what it is given next.
        """

    def keep(self) -> None:
        """Keep what the backend has compiled so far for the next process. By default that is nothing."""
        return  # so that a runner may do without its own

    def close(self) -> None:
        """Let calls in flight end, and free what this runner holds; a later `run` raises BackendError."""


SPECIALIZATIONS = ("lazy", "eager", "none")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a bundle is run on a GPU: with TensorRT, and with ONNX Runtime if an option says so.

    ``contexts``: calls in flight at once, each with scratch memory of its own; more wait for their turn. They are made
    on demand, and as many as the GPU has room for.
    ``cuda_graphs``: replay a captured graph for the batches that the profiles name (minimum, optimum, maximum), with
    TensorRT and with ONNX Runtime; TensorRT-RTX captures by itself, for any.
    ``kernel_specialization``, of TensorRT-RTX: compile kernels for each shape that comes ("lazy", in the background,
    or "eager", before it is served), or for none.
    ``runtime_cache``, of TensorRT-RTX: keep compiled kernels beside the bundle, for the next process.
    """

    contexts: int = 4
    cuda_graphs: bool = True
    kernel_specialization: str = "lazy"
    runtime_cache: bool = True

    def __post_init__(self) -> None:
        if self.contexts < 1:
            raise ConfigError(f"contexts={self.contexts}: 1 at least is expected.")
        check_name("kernel_specialization", self.kernel_specialization, SPECIALIZATIONS)


@dataclass(frozen=True, kw_only=True)
class Backend(ABC):
    """One way to run bundles, as `auto`, a named backend, `trtower inspect` and `trtower bench` know it.

    ``name``: how users ask for it, such as "openvino-bf16".
    ``product``: what people call the software, such as "OpenVINO".
    ``package``: the package on PyPI that brings it.
    ``kind``: the kind of device that it runs on, "cpu" or "cuda".
    ``arithmetic``: "fp32", "fp16" or "bf16" if it computes in that whatever the bundle's precision; "" if it computes
    in the bundle's own.
    """

    name: str
    product: str
    package: str
    kind: str
    arithmetic: str = ""

    def files(self, bundle: Bundle) -> Sequence[str]:
        """List the files of a bundle that it could run, the best first: the graph, unless it runs plans."""
        return (GRAPH,)

    @abstractmethod
    def obstacle(self, bundle: Bundle, file: str, device: torch.device) -> str | None:
        """Say in words why it cannot run a file of the bundle on ``device``, which exists; None if it can.

        Loads nothing of the bundle. Whatever the import of its package raises may be left to the caller.
        """

    @abstractmethod
    def open(self, bundle: Bundle, file: str, device: torch.device, engine: EngineOptions) -> Runner:
        """Verify the files and load them. Raises BundleError if one was altered, BackendError if it is refused."""

    def is_coarse_for(self, precision: str) -> bool:
        """Whether it computes in less than a bundle's precision."""
        return self.arithmetic not in ("", "fp32", precision)

    def computes_in(self, precision: str) -> str:
        """Return the arithmetic in which it runs a bundle of this precision; 8 bits stay what they are."""
        return precision if precision in EIGHT_BIT else self.arithmetic or precision


def check_contract(
    bundle: Bundle, file: str, inputs: list[tuple[str, Shape]], outputs: list[tuple[str, Shape]]
) -> None:
    """Raise BundleError unless a file takes and gives what the manifest says, for outputs are as large as that says.

    ``inputs`` and ``outputs`` are the names and shapes of the file's tensors, with "batch" for the batch.
    """
    for found, spec in ((inputs, bundle.manifest.input), (outputs, bundle.manifest.output)):
        if found != [(spec.name, spec.shape)]:
            raise BundleError(f"{bundle.path}: {file} has {found}; tower.json says {(spec.name, spec.shape)}.")


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
