"""Run a bundle's graph with ONNX Runtime, on CUDA or the CPU, on torch's memory."""

import logging
import re
from typing import Any

import torch

from trtower.bundle import GRAPH, GRAPH_DATA, Bundle
from trtower.errors import BackendError, BundleError
from trtower.extras import import_extra
from trtower.runners import CLOSED, OnStart

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}

_ELEMENT_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}
"""ONNX's TensorProto numbers: numpy has no name for bfloat16."""


FAST_FP16_FROM = (1, 32)
"""ONNX Runtime whose FP16 attention on the CPU was seen to be fast: 1.23.2 took 51.8 s for an image of ViT-L/14-336
that takes 1.32.0 1.1 s."""

logger = logging.getLogger(__name__)


class OnnxRuntimeRunner:
    """One session, which ONNX Runtime lets threads share; each call binds its own tensors."""

    def __init__(self, bundle: Bundle, device: torch.device) -> None:
        ort = import_extra("onnxruntime", extra=device.type, purpose=f"onnxruntime-{device.type}")
        # Both as buffers: what was hashed is what is loaded, and a graph that names another file finds none.
        graph, weights = bundle.read(GRAPH), bundle.map(GRAPH_DATA)
        provider = PROVIDERS[device.type]
        settings = {"device_id": str(device.index)} if device.type == "cuda" else {}
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_external_initializers_from_files_in_memory([GRAPH_DATA], [weights], [len(weights)])
        if device.type == "cpu" and bundle.manifest.precision == "fp16" and _version(ort.__version__) < FAST_FP16_FROM:
            logger.warning(
                "onnxruntime %s may take tens of times longer for FP16 attention on the CPU than %d.%d: update it, or "
                "export with --precision fp32 for this machine",
                ort.__version__,
                *FAST_FP16_FROM,
            )
        try:
            self._session: Any = ort.InferenceSession(graph, options, providers=[(provider, settings)])
        except Exception as err:
            raise BackendError(f"onnxruntime {ort.__version__} could not load {bundle.path / GRAPH}: {err}") from err
        if provider not in self._session.get_providers():
            raise BackendError(
                f"onnxruntime {ort.__version__} dropped {provider} without an error and would have run on "
                f"{self._session.get_providers()[0]}: its CUDA libraries are missing or of another version."
            )
        _check_contract(self._session, bundle)
        self._device_type, self._device_index = device.type, device.index or 0
        self._input, self._output = bundle.manifest.input, bundle.manifest.output
        self._element_type = _ELEMENT_TYPES[self._input.dtype]
        self.backend = f"onnxruntime-{device.type}"
        self.files = (GRAPH, GRAPH_DATA)
        self.device = device
        self.dtype = getattr(torch, self._input.dtype)
        self.name = f"onnxruntime {ort.__version__}, {'CUDA' if device.type == 'cuda' else 'CPU'}"

    def run(self, pixel_values: torch.Tensor, hidden_states: torch.Tensor, on_start: OnStart | None = None) -> None:
        """See Runner.run."""
        session = self._session
        if session is None:
            raise BackendError(CLOSED)
        binding = session.io_binding()
        place = (self._device_type, self._device_index, self._element_type)
        binding.bind_input(self._input.name, *place, tuple(pixel_values.shape), pixel_values.data_ptr())
        binding.bind_output(self._output.name, *place, tuple(hidden_states.shape), hidden_states.data_ptr())
        if self._device_type == "cuda":
            # The session has a stream of its own: it starts once the caller's work is done, and ends before we return.
            torch.cuda.current_stream(self.device).synchronize()
        if on_start:
            on_start(torch.cuda.current_stream(self.device) if self._device_type == "cuda" else None)
        session.run_with_iobinding(binding)
        if self._device_type == "cuda":
            binding.synchronize_outputs()

    def keep(self) -> None:
        """See Runner.keep. There is nothing."""

    def close(self) -> None:
        """See Runner.close. A call in flight holds the session, which goes with the last of them."""
        self._session = None


def _check_contract(session: Any, bundle: Bundle) -> None:
    """Have the graph take and give what the manifest says: outputs are written into memory sized by it."""
    for found, spec in ((session.get_inputs(), bundle.manifest.input), (session.get_outputs(), bundle.manifest.output)):
        shapes = [(tensor.name, tuple(tensor.shape)) for tensor in found]
        if shapes != [(spec.name, spec.shape)]:
            raise BundleError(f"{bundle.path}: {GRAPH} has {shapes}; tower.json says {(spec.name, spec.shape)}.")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])
