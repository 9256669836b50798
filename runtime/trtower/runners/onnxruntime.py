"""Run a bundle's graph with ONNX Runtime, on CUDA or the CPU, directly on torch's tensors."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import FUSED_GRAPH, GRAPH, GRAPH_DATA
from trtower.dtypes import DTYPES, PIXEL_DTYPES
from trtower.errors import BackendError, one_line
from trtower.extras import how_to_install, import_extra
from trtower.flavour import parse_version
from trtower.runners.base import CLOSED, Backend, EngineOptions, OnStart, Runner, Shape, check_contract
from trtower.runners.pool import SerialThread
from trtower.spec import PRECISIONS, profile_batches

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}

FUSED_ON_CPU_FROM = (1, 32)
"""The first ONNX Runtime that runs the fused graph on a CPU. Measured on 2026-11-29 in FP16: 1.32.0 is 3 % faster with
it (`make graph-forms`); 1.24.4 was 22 times slower than with attention spelled out, on two layers of ViT-L/14-336."""

SHAPE_OPERATORS = ("Shape", "Concat")
"""Operators that compute the shape of a batch's class tokens. ONNX Runtime has CUDA kernels for them, but prefers to
run them on the CPU."""

LAUNCH = -1
"""The `gpu_graph_id` with which ONNX Runtime neither captures nor replays a graph."""

logger = logging.getLogger(__name__)


class OnnxRuntimeRunner(Runner):
    """One session on the CPU. ONNX Runtime lets threads share it; each call binds its own tensors."""

    def __init__(self, bundle: Bundle, file: str, device: torch.device, **settings: str) -> None:
        ort = import_extra("onnxruntime", extra=device.type, purpose=f"onnxruntime-{device.type}")
        graph, provider = bundle.read(file), PROVIDERS[device.type]
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if device.type == "cpu":
            options.intra_op_num_threads = torch.get_num_threads()
        else:
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        # Load both from memory, so that the bytes loaded are those that are hashed, and no other file can be read.
        with bundle.mapped(GRAPH_DATA) as weights:
            options.add_external_initializers_from_files_in_memory([GRAPH_DATA], [weights], [len(weights)])
            try:
                self._session: Any = ort.InferenceSession(graph, options, providers=[(provider, settings)])
            except Exception as err:
                raise BackendError(f"onnxruntime {ort.__version__} could not load {bundle.path / file}: {err}") from err
        if provider not in self._session.get_providers():
            raise BackendError(
                f"onnxruntime {ort.__version__} dropped {provider} without an error and would have run on "
                f"{self._session.get_providers()[0]}: its CUDA libraries are missing or have another version. Install "
                "those that it needs, or use another backend."
            )
        check_contract(bundle, file, _shapes(self._session.get_inputs()), _shapes(self._session.get_outputs()))
        if device.type == "cuda":
            _check_placement(self._session, f"onnxruntime {ort.__version__}")
        self._ort, self._place = ort, (device.type, device.index or 0)
        self._kind = PRECISIONS[bundle.manifest.precision].onnx  # numpy has no name for bfloat16
        self._input, self._output = bundle.manifest.input, bundle.manifest.output
        self.backend = f"onnxruntime-{device.type}"
        self.files = (file, GRAPH_DATA)
        self.device = device
        self.dtype = DTYPES[self._output.dtype]
        self.pixel_dtype = PIXEL_DTYPES[self._input.dtype]
        self.name = f"onnxruntime {ort.__version__}, {'CUDA' if device.type == 'cuda' else 'CPU'}"

    def run(self, pixel_values: torch.Tensor, hidden_states: torch.Tensor, on_start: OnStart | None = None) -> None:
        """See Runner.run."""
        if on_start:
            on_start(None)
        self._run(pixel_values, hidden_states, None)

    def _run(self, pixel_values: torch.Tensor, hidden_states: torch.Tensor, options: Any) -> None:
        session = self._session
        if session is None:
            raise BackendError(CLOSED)
        binding = session.io_binding()
        for tensor, name, bind in (
            (pixel_values, self._input.name, binding.bind_input),
            (hidden_states, self._output.name, binding.bind_output),
        ):
            kind = np.uint8 if tensor.dtype == torch.uint8 else self._kind
            bind(name, *self._place, kind, tuple(tensor.shape), tensor.data_ptr())
        session.run_with_iobinding(binding, options)

    def close(self) -> None:
        """See Runner.close. Calls in flight keep the session alive; the last of them frees it."""
        self._session = None


class OnnxRuntimeCudaRunner(OnnxRuntimeRunner):
    """One session on a GPU, in its own stream. That stream and the caller's wait for each other.

    An ONNX Runtime session is bound to one stream and keeps CUDA graphs per thread. So calls take turns in the runner's
    own thread, and the host never waits for the GPU. Batches that the profiles name are captured as CUDA graphs, with
    their own tensors, as ONNX Runtime requires.
    """

    def __init__(self, bundle: Bundle, file: str, device: torch.device, *, cuda_graphs: bool) -> None:
        self._bundle, self._file, self.device = bundle, file, device
        self._to_capture = profile_batches(bundle.manifest.profiles) if cuda_graphs else []
        self._captured: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        try:
            self._open_session()
        except BackendError as err:
            if not cuda_graphs:
                raise
            self._disable_graphs(err)  # raises if graphs were not the reason
        self._thread = SerialThread(f"trtower {self.backend}")

    def _open_session(self) -> None:
        """Open the session in a new stream, which no capture has touched."""
        self._stream = torch.cuda.Stream(self.device)
        settings = {
            "user_compute_stream": str(self._stream.cuda_stream),
            "use_tf32": "0",  # TF32 has only FP16's ten bits, but the graph says FP32
            "arena_extend_strategy": "kSameAsRequested",  # the next power of two would waste up to half on weights
        }
        if self.device.index:  # ONNX Runtime 1.31 warns of a missing plugin whenever device_id is set
            settings["device_id"] = str(self.device.index)
        if self._to_capture:
            settings["enable_cuda_graph"] = "1"
        super().__init__(self._bundle, self._file, self.device, **settings)

    def run(self, pixel_values: torch.Tensor, hidden_states: torch.Tensor, on_start: OnStart | None = None) -> None:
        """See Runner.run. The thread adopts the caller's inference mode, because the caller's tensors need it."""
        caller, inference = torch.cuda.current_stream(self.device), torch.is_inference_mode_enabled()

        def take_turn() -> None:
            with torch.no_grad(), torch.inference_mode(inference), torch.cuda.device(self.device):
                self._stream.wait_stream(caller)
                try:
                    if on_start:
                        on_start(self._stream)
                    if not self._replay(pixel_values, hidden_states, caller):
                        self._run(pixel_values, hidden_states, self._options(LAUNCH))
                finally:
                    caller.wait_stream(self._stream)

        self._thread.run(take_turn)

    def _replay(self, pixel_values: torch.Tensor, hidden_states: torch.Tensor, caller: Any) -> bool:
        """Run the call from a CUDA graph, captured now if it is new; return False if it must run without one."""
        batch = len(pixel_values)
        if batch not in self._to_capture:
            return False
        with torch.cuda.stream(self._stream):
            try:
                if batch not in self._captured:
                    with torch.inference_mode(mode=False):  # the tensors serve calls in any mode
                        self._captured[batch] = (torch.empty_like(pixel_values), torch.empty_like(hidden_states))
                inputs, outputs = self._captured[batch]
                inputs.copy_(pixel_values)
                self._run(inputs, outputs, self._options(batch))
            except Exception as err:  # noqa: BLE001 - ONNX Runtime has its own classes; torch may lack memory
                self._disable_graphs(err)
                self._stream.wait_stream(caller)
                return False
            hidden_states.copy_(outputs)
        return True

    def _disable_graphs(self, err: Exception) -> None:
        """Continue in a new session without CUDA graphs: the old stream may be stuck in the capture that failed.

        Free the old session first, because memory may have been the problem. If no new one opens, the runner is closed.
        """
        self._to_capture, self._captured, self._session = [], {}, None
        self._open_session()
        logger.warning("CUDA graphs are off, and calls are launched without them: %s", one_line(err))

    def _options(self, graph: int) -> Any:
        options = self._ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        options.add_run_config_entry("gpu_graph_id", str(graph))
        return options

    def close(self) -> None:
        """See Runner.close."""
        if self._thread.end():
            self._stream.synchronize()
            self._captured = {}
            super().close()


def _version() -> tuple[int, ...]:
    """Return the version of the installed ONNX Runtime; () if it cannot be imported, which is an obstacle anyway."""
    try:
        return parse_version(import_extra("onnxruntime", extra="cpu", purpose="onnxruntime-cpu").__version__)
    except ImportError:
        return ()


def _shapes(tensors: Any) -> list[tuple[str, Shape]]:
    """Read the names and shapes of a session's inputs or outputs."""
    return [(tensor.name, tuple(tensor.shape)) for tensor in tensors]


def _check_placement(session: Any, name: str) -> None:
    """Refuse a graph unless the GPU runs all of it; operators without a CUDA kernel silently run on the CPU."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise BackendError(
            f"{name} is too old to report which operators it runs on the GPU: install 1.31 or later, which needs "
            "Python 3.11 or later."
        )
    on_cpu = Counter(
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != PROVIDERS["cuda"]
        for node in part.get_nodes()
        if node.op_type not in SHAPE_OPERATORS
    )
    if on_cpu:
        operators = ", ".join(f"{count} {operator}" for operator, count in sorted(on_cpu.items()))
        raise BackendError(
            f"{name} has no CUDA kernels for {operators} of this graph. It would run them on the CPU and copy every "
            "tensor there and back: update onnxruntime-gpu, or use another backend."
        )


class OnnxRuntime(Backend):
    """ONNX Runtime, with its execution provider for one kind of device."""

    def files(self, bundle: Bundle) -> Sequence[str]:
        """See Backend.files. On CUDA only the fused graph has fast kernels."""
        fuses = FUSED_GRAPH in bundle.manifest.files and (self.kind == "cuda" or _version() >= FUSED_ON_CPU_FROM)
        return (FUSED_GRAPH,) if fuses else (GRAPH,)

    def obstacle(self, bundle: Bundle, file: str, device: torch.device) -> str | None:
        """See Backend.obstacle."""
        ort = import_extra("onnxruntime", extra=self.kind, purpose=self.name)
        if PROVIDERS[self.kind] not in ort.get_available_providers():
            return (
                f"the installed onnxruntime has no {PROVIDERS[self.kind]}: pip uninstall onnxruntime, "
                f"then {how_to_install(self.kind)}"
            )
        if self.kind == "cpu" and bundle.manifest.precision == "bf16":
            return "ONNX Runtime has no BF16 kernels for the CPU: export with --precision fp16 or fp32 to run there"
        return None

    def open(self, bundle: Bundle, file: str, device: torch.device, engine: EngineOptions) -> Runner:
        """See Backend.open."""
        if self.kind == "cuda":
            return OnnxRuntimeCudaRunner(bundle, file, device, cuda_graphs=engine.cuda_graphs)
        return OnnxRuntimeRunner(bundle, file, device)


CUDA = OnnxRuntime(name="onnxruntime-cuda", product="ONNX Runtime", package="onnxruntime-gpu", kind="cuda")
CPU = OnnxRuntime(name="onnxruntime-cpu", product="ONNX Runtime", package="onnxruntime", kind="cpu", arithmetic="fp32")
