"""Run a plan with TensorRT, of either flavour, on torch's memory and torch's current stream."""

import logging
import threading
from typing import Any

import torch

from trtower.bundle import Bundle
from trtower.errors import BackendError, BundleError
from trtower.flavour import load_flavour
from trtower.manifest import PlanEntry
from trtower.runners import CLOSED, OnStart

logger = logging.getLogger(__name__)


ALIGNMENT = 256
"""Bytes that TensorRT wants a tensor's address to be a multiple of (`IExecutionContext.set_tensor_address`)."""


class TensorRTRunner:
    """One engine with one execution context.

    A context holds the scratch memory of one call, so calls take turns: a lock orders them on the host and
    an event orders them on the GPU when callers use different streams. On torch's default stream TensorRT
    would synchronise the host, so such calls run on a stream of the runner's own, between two waits.
    """

    def __init__(self, bundle: Bundle, plan: PlanEntry, device: torch.device) -> None:
        module = load_flavour(plan.flavour)
        content = bundle.read(plan.file)
        with torch.cuda.device(device):
            try:
                runtime = module.Runtime(_bridge(module))
            except TypeError as err:  # pybind's word for a runtime that found no usable driver
                raise BackendError(f"{plan.flavour} {module.__version__} could not start on {device}: {err}") from err
            engine = runtime.deserialize_cuda_engine(content)
            if engine is None:
                raise BackendError(
                    f"{plan.file} could not be loaded by {plan.flavour} {module.__version__} on {device}; "
                    f"TensorRT's reason is in the log. Build one here: trtower build {bundle.path}"
                )
            _check_contract(engine, bundle, plan)
            context = engine.create_execution_context()
            if context is None:
                raise BackendError(
                    f"{plan.file}: no execution context on {device}; it needs {engine.device_memory_size_v2} bytes "
                    "of GPU memory."
                )
            self._last_call = torch.cuda.Event()
            self._own_stream = torch.cuda.Stream(device)
        self._runtime, self._engine, self._context = runtime, engine, context
        self._input, self._output = bundle.manifest.input, bundle.manifest.output
        self._lock = threading.Lock()
        self.backend = plan.flavour
        self.files = (plan.file,)
        self.device = device
        self.dtype = getattr(torch, self._input.dtype)
        major, minor = torch.cuda.get_device_capability(device)
        self.name = f"{plan.flavour} {module.__version__}, sm{major}{minor}"

    def run(self, pixel_values: torch.Tensor, hidden_states: torch.Tensor, on_start: OnStart | None = None) -> None:
        """See Runner.run."""
        caller = torch.cuda.current_stream(self.device)
        stream = caller if caller.cuda_stream else self._own_stream
        images = pixel_values if _is_aligned(pixel_values) else pixel_values.clone()
        features = hidden_states if _is_aligned(hidden_states) else torch.empty_like(hidden_states)
        with self._lock, torch.cuda.device(self.device):
            if stream is not caller:
                stream.wait_stream(caller)
            stream.wait_event(self._last_call)
            if on_start:
                on_start(stream)
            self._enqueue(images, features, stream.cuda_stream)
            self._last_call.record(stream)
        if stream is not caller:
            caller.wait_stream(stream)
        if features is not hidden_states:
            hidden_states.copy_(features)

    def close(self) -> None:
        """See Runner.close."""
        with self._lock:
            self._last_call.synchronize()
            self._context = self._engine = self._runtime = None

    def _enqueue(self, images: torch.Tensor, features: torch.Tensor, stream: int) -> None:
        context = self._context
        if context is None:
            raise BackendError(CLOSED)
        accepted = (
            context.set_input_shape(self._input.name, tuple(images.shape))
            and context.set_tensor_address(self._input.name, images.data_ptr())
            and context.set_tensor_address(self._output.name, features.data_ptr())
            and context.execute_async_v3(stream)
        )
        if not accepted:
            raise BackendError(f"{self.name} could not run {tuple(images.shape)}; TensorRT's reason is in the log.")


def _check_contract(engine: Any, bundle: Bundle, plan: PlanEntry) -> None:
    """Have the engine take and give what the manifest says: outputs are written into memory sized by it."""
    batch = bundle.manifest.batch
    for spec in (bundle.manifest.input, bundle.manifest.output):
        shape = tuple(engine.get_tensor_shape(spec.name))
        if shape != (-1 if batch.min < batch.max else batch.max, *spec.shape[1:]):
            raise BundleError(f"{bundle.path}: {plan.file} has {spec.name} {shape}; tower.json says {spec.shape}.")
    least, _, most = engine.get_tensor_profile_shape(bundle.manifest.input.name, 0)
    if (least[0], most[0]) != (batch.min, batch.max):
        raise BundleError(
            f"{bundle.path}: {plan.file} takes {least[0]} to {most[0]} images; "
            f"tower.json says {batch.min} to {batch.max}."
        )


def _is_aligned(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0


def _bridge(module: Any) -> Any:
    """Make a TensorRT logger that writes into Python's logging."""
    levels = {
        module.ILogger.INTERNAL_ERROR: logging.ERROR,
        module.ILogger.ERROR: logging.ERROR,
        module.ILogger.WARNING: logging.WARNING,
        module.ILogger.INFO: logging.DEBUG,
        module.ILogger.VERBOSE: logging.NOTSET,
    }

    class Bridge(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: object, message: str) -> None:
            if level := levels.get(severity):
                logger.log(level, "%s", message)

    return Bridge()
