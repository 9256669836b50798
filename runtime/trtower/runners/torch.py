"""Run a bundle's graph with PyTorch itself, on CUDA or the CPU.

On CUDA, and in BF16 on the CPU, PyTorch computes in the types of the graph. Otherwise it computes in FP32 on the CPU,
where half precision would only cost accuracy and time.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import FUSED_GRAPH, GRAPH, GRAPH_DATA
from trtower.dtypes import DTYPES, PIXEL_DTYPES
from trtower.errors import BackendError, BundleError, one_line
from trtower.extras import import_extra
from trtower.flavour import sm_name
from trtower.graph.arithmetic import as_typed, multiplies_fp32
from trtower.graph.module import read_module, why_unknown
from trtower.runners.base import CLOSED, Backend, EngineOptions, OnStart, Runner, Shape, check_contract
from trtower.runners.device import capability_of
from trtower.runners.pool import Pool
from trtower.runners.processor import multiplies_bf16
from trtower.runners.slot import Launch, Shared, Slot

Compute = Callable[[torch.Tensor, torch.Tensor], None]
"""Fills its second argument from its first."""


class TorchRunner(Runner):
    """One module on one device."""

    def __init__(self, bundle: Bundle, file: str, backend: Backend, device: torch.device) -> None:
        self._compute: Compute = _load(bundle, file, backend, device)
        self.backend = backend.name
        self.files = (file, GRAPH_DATA)
        self.device = device
        self.dtype = DTYPES[bundle.manifest.output.dtype]
        self.pixel_dtype = PIXEL_DTYPES[bundle.manifest.input.dtype]
        place = f"CPU, {backend.arithmetic.upper()}" if device.type == "cpu" else sm_name(capability_of(device))
        self.name = f"{_version()}, {place}"


class TorchCpuRunner(TorchRunner):
    """Calls take turns, because each uses all threads."""

    def __init__(self, bundle: Bundle, file: str, backend: Backend, device: torch.device) -> None:
        super().__init__(bundle, file, backend, device)
        self._turns = Pool(lambda: self._compute, 1)

    def run(self, pixel_values: torch.Tensor, hidden_states: torch.Tensor, on_start: OnStart | None = None) -> None:
        """See Runner.run."""
        with self._turns.lend() as compute:
            if on_start:
                on_start(None)
            compute(pixel_values, hidden_states)

    def close(self) -> None:
        """See Runner.close."""
        self._turns.close()
        self._compute = _closed


class TorchCudaRunner(TorchRunner):
    """A pool of slots shares the module, as in TensorRTRunner. Calls run in the caller's stream."""

    def __init__(
        self, bundle: Bundle, file: str, backend: Backend, device: torch.device, options: EngineOptions
    ) -> None:
        with torch.cuda.device(device):
            super().__init__(bundle, file, backend, device)
            shared = Shared(profiles=bundle.manifest.profiles, device=device, captures=options.cuda_graphs)
            self._slots = Pool(lambda: ModuleSlot(shared, self._compute), options.contexts)

    def run(self, pixel_values: torch.Tensor, hidden_states: torch.Tensor, on_start: OnStart | None = None) -> None:
        """See Runner.run."""
        stream = torch.cuda.current_stream(self.device)
        fitting = (None, stream.cuda_stream)
        with torch.cuda.device(self.device), self._slots.lend(lambda slot: slot.stream in fitting) as slot:
            slot.enqueue(pixel_values, hidden_states, stream, on_start)

    def close(self) -> None:
        """See Runner.close."""
        with ExitStack() as each:  # close the others even if one of them raises
            for slot in self._slots.close():
                each.callback(slot.close)
            self._compute = _closed


class ModuleSlot(Slot):
    """A slot whose graphs share the memory between their nodes, because no two of them run at once."""

    def __init__(self, shared: Shared, compute: Compute) -> None:
        super().__init__(shared)
        self._compute = compute
        if shared.captures:
            self.memory = torch.cuda.graph_pool_handle()

    def launch(self, images: torch.Tensor, features: torch.Tensor, stream: Any) -> None:
        """See Slot.launch."""
        with torch.cuda.stream(stream):
            self._compute(images, features)

    def prepare_capture(self, batch: int, stream: Any) -> Launch:
        """See Slot.prepare_capture."""
        return self.launch


def _closed(*_: torch.Tensor) -> None:
    """Take the place of a module that was freed."""
    raise BackendError(CLOSED)


def _load(bundle: Bundle, file: str, backend: Backend, device: torch.device) -> Compute:
    """Load a graph and its weights from memory, so that the bytes loaded are those that were hashed."""
    onnx = import_extra("onnx", extra="torch", purpose=backend.name)
    graph, weights = bundle.read(file), bundle.map(GRAPH_DATA)
    halves = [dtype for dtype in DTYPES.values() if dtype.itemsize == 2]
    instead = dict.fromkeys(halves, torch.float32) if backend.arithmetic == "fp32" else {}
    try:
        model = onnx.load_model_from_string(graph)
        _check_locations(bundle, file, model)
        check_contract(bundle, file, _shapes(model.graph.input), _shapes(model.graph.output))
        module = read_module(model, weights, device=device, instead=instead)
    except BundleError:
        raise
    except torch.OutOfMemoryError as err:
        raise BackendError(f"{_version()} has no memory on {device} for the weights of {bundle.path}.") from err
    except Exception as err:
        raise BackendError(f"{_version()} could not load {bundle.path / file}: {one_line(err)}") from err
    exact_fp32, forward = multiplies_fp32(module), module.forward

    def compute(pixel_values: torch.Tensor, hidden_states: torch.Tensor) -> None:
        with as_typed(device.type, exact_fp32=exact_fp32):
            pixels = pixel_values.to(instead.get(pixel_values.dtype, pixel_values.dtype))
            hidden_states.copy_(forward(pixels))

    return compute


def _check_locations(bundle: Bundle, file: str, model: Any) -> None:
    """Refuse a graph that reads weights from any other file, or from another part of the disk."""
    for tensor in model.graph.initializer:
        places = [entry.value for entry in tensor.external_data if entry.key == "location"]
        if places not in ([], [GRAPH_DATA]):
            raise BundleError(
                f"{bundle.path / file} reads weights that are not in {GRAPH_DATA}, so they cannot be verified: export "
                "it again."
            )


def _shapes(values: Any) -> list[tuple[str, Shape]]:
    """Read the names and shapes of a graph's inputs or outputs."""
    return [
        (value.name, tuple(size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim))
        for value in values
    ]


def _version() -> str:
    return f"torch {torch.__version__.partition('+')[0]}"


class Torch(Backend):
    """PyTorch, on one kind of device and in one arithmetic."""

    def files(self, bundle: Bundle) -> Sequence[str]:
        """See Backend.files."""
        return (FUSED_GRAPH if FUSED_GRAPH in bundle.manifest.files else GRAPH,)

    def obstacle(self, bundle: Bundle, file: str, device: torch.device) -> str | None:
        """See Backend.obstacle."""
        if self.arithmetic == "bf16" and bundle.manifest.precision != "bf16":
            return f"it is for bundles in bf16, and this one is in {bundle.manifest.precision}; use backend torch-cpu"
        if self.arithmetic == "bf16" and not multiplies_bf16():
            return "this processor has no BF16 arithmetic; use backend torch-cpu"
        onnx = import_extra("onnx", extra="torch", purpose=self.name)
        try:
            model = onnx.load_model_from_string((bundle.path / file).read_bytes())
        except Exception:  # noqa: BLE001 - protobuf's own classes; `open` says what is wrong with the file
            return None
        unknown = why_unknown(model)
        return f"{file} has {unknown}, which {self.name} does not know; use another backend" if unknown else None

    def open(self, bundle: Bundle, file: str, device: torch.device, engine: EngineOptions) -> Runner:
        """See Backend.open."""
        if self.kind == "cuda":
            return TorchCudaRunner(bundle, file, self, device, engine)
        return TorchCpuRunner(bundle, file, self, device)


CUDA = Torch(name="torch-cuda", product="PyTorch", package="torch", kind="cuda")
CPU = replace(CUDA, name="torch-cpu", kind="cpu", arithmetic="fp32")
BF16 = replace(CPU, name="torch-bf16", arithmetic="bf16")
