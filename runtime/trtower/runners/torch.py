"""Run a bundle's graph with PyTorch itself, on CUDA or the CPU.

On CUDA, and in BF16 on the CPU, PyTorch computes in the types of the graph. Otherwise it computes in FP32 on the CPU,
where half precision would only cost accuracy and time.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import FUSED_GRAPH, GRAPH, GRAPH_DATA
from trtower.dtypes import DTYPES, PIXEL_DTYPES
from trtower.errors import BackendError
from trtower.extras import import_extra
from trtower.flavour import sm_name
from trtower.graph.module import why_unknown
from trtower.runners.base import CLOSED, Backend, EngineOptions, OnStart, Run, Runner
from trtower.runners.device import capability_of
from trtower.runners.pool import Pool
from trtower.runners.processor import multiplies_bf16
from trtower.runners.slot import Launch, Shared, Slot
from trtower.runners.torch_graph import LoadedGraph, torch_version


class TorchRunner(Runner):
    """One graph on one device."""

    def __init__(
        self, bundle: Bundle, file: str, backend: Backend, device: torch.device, options: EngineOptions
    ) -> None:
        packed = device.type == "cpu" and not options.compile  # torch.compile cannot look into packed weights
        graph = LoadedGraph(bundle, file, backend, device, packed=packed)
        if options.compile:
            graph.compile(keep=options.runtime_cache)
        # A caller's own torch.compile must not look into packed weights, or what is compiled already.
        opaque = packed or options.compile
        self._compute: Run = torch.compiler.disable(graph.compute) if opaque else graph.compute
        self.backend = backend.name
        self.files = (file, GRAPH_DATA)
        self.device = device
        self.dtype = DTYPES[bundle.manifest.output.dtype]
        self.pixel_dtype = PIXEL_DTYPES[bundle.manifest.input.dtype]
        place = f"CPU, {backend.arithmetic.upper()}" if device.type == "cpu" else sm_name(capability_of(device))
        self.name = f"{torch_version()}, {place}{', compiled' if options.compile else ''}"


class TorchCpuRunner(TorchRunner):
    """Calls take turns, because each uses all threads."""

    def __init__(
        self, bundle: Bundle, file: str, backend: Backend, device: torch.device, options: EngineOptions
    ) -> None:
        super().__init__(bundle, file, backend, device, options)
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
    """A pool of slots shares the graph, as in TensorRTRunner. Calls run in the caller's stream."""

    def __init__(
        self, bundle: Bundle, file: str, backend: Backend, device: torch.device, options: EngineOptions
    ) -> None:
        with torch.cuda.device(device):
            super().__init__(bundle, file, backend, device, options)
            # The weights are laid out in this stream. Slots that are made later serve other streams.
            torch.cuda.current_stream(device).synchronize()
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

    def __init__(self, shared: Shared, compute: Run) -> None:
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
    """Take the place of a graph that was freed."""
    raise BackendError(CLOSED)


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
        runner = TorchCudaRunner if self.kind == "cuda" else TorchCpuRunner
        return runner(bundle, file, self, device, engine)


CUDA = Torch(name="torch-cuda", product="PyTorch", package="torch", kind="cuda", compiles=True)
CPU = replace(CUDA, name="torch-cpu", kind="cpu", arithmetic="fp32")
BF16 = replace(CPU, name="torch-bf16", arithmetic="bf16")
