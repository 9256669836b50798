"""Run a plan with TensorRT, of either flavour, on torch's memory and in the stream of the caller."""

import logging
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import GRAPH, GRAPH_DATA, PlanEntry
from trtower.dtypes import DTYPES
from trtower.errors import BackendError, BundleError, ConfigError
from trtower.flavour import load_flavour
from trtower.runners.base import OnStart
from trtower.runners.pool import Pool
from trtower.runners.runtime_cache import RuntimeCache
from trtower.runners.slot import Capturing, Profile, Slot

logger = logging.getLogger(__name__)

ALIGNMENT = 256
"""Bytes that TensorRT wants a tensor's address to be a multiple of (`IExecutionContext.set_tensor_address`)."""

ERRORS = 3
"""As many of TensorRT's last ones are told where a plan cannot be loaded."""

SPECIALIZATIONS = ("lazy", "eager", "none")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How a bundle is run on a GPU: a plan, or where it says so the graph.

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
        if self.kernel_specialization not in SPECIALIZATIONS:
            raise ConfigError(
                f"kernel_specialization={self.kernel_specialization!r} is unknown: {', '.join(SPECIALIZATIONS)} are."
            )


class TensorRTRunner:
    """One engine, and a pool of slots to run it in.

    A call takes the slot that its stream used last, or an idle one, which then waits on the GPU for its call before.
    On torch's default stream TensorRT would synchronise the host, so such calls run in a stream of the runner's own,
    between two waits. The caller's stream waits for the answer in any case, so that whatever is freed after the call,
    torch gives to nobody before the engine is done with it.
    """

    def __init__(self, bundle: Bundle, plan: PlanEntry, device: torch.device, options: EngineOptions) -> None:
        module = load_flavour(plan.flavour)
        content = bundle.read(plan.file)
        major, minor = torch.cuda.get_device_capability(device)
        self.backend = plan.flavour
        self.files = (plan.file,)
        self.device = device
        self.dtype = DTYPES[bundle.manifest.input.dtype]
        self.name = f"{plan.flavour} {module.__version__}, sm{major}{minor}"
        self._module, self._options, self._bundle, self._plan = module, options, bundle, plan
        with torch.cuda.device(device):
            log = _bridge(module)
            try:
                runtime = module.Runtime(log)
            except TypeError as err:  # pybind's word for a runtime that found no usable driver
                raise BackendError(
                    f"{plan.flavour} {module.__version__} could not start on {device}, which its driver may be too old "
                    f"for: {err}"
                ) from err
            engine = runtime.deserialize_cuda_engine(content)
            if engine is None:
                raise BackendError(
                    f"{plan.file} could not be loaded by {plan.flavour} {module.__version__} on {device}: "
                    f"{'; '.join(log.errors) or 'it gave no reason'}. Build one here: trtower build {bundle.path}"
                )
            self._runtime, self._engine = runtime, engine
            if plan.settings.stripped:
                _refit(module, engine, runtime.logger, bundle, plan)
            self._profiles = _read_profiles(engine, bundle, plan)
            self._cache = self._open_cache(f"sm{major}{minor}")
            self._config = self._configure() if plan.flavour == "tensorrt-rtx" else None
            self._capturing = Capturing(device, wanted=options.cuda_graphs and self._config is None)
            self._own_stream = torch.cuda.Stream(device)
            self._slots = Pool(self._make_slot, options.contexts)

    def run(self, pixel_values: torch.Tensor, hidden_states: torch.Tensor, on_start: OnStart | None = None) -> None:
        """See Runner.run."""
        caller = torch.cuda.current_stream(self.device)
        stream = caller if caller.cuda_stream else self._own_stream
        images = pixel_values if _is_aligned(pixel_values) else pixel_values.clone()
        features = hidden_states if _is_aligned(hidden_states) else torch.empty_like(hidden_states)
        fitting = (None, stream.cuda_stream)
        with self._slots.lend(lambda slot: slot.stream in fitting) as slot, torch.cuda.device(self.device):
            if stream is not caller:
                stream.wait_stream(caller)
            try:
                slot.enqueue(images, features, stream, on_start)
            finally:
                if stream is not caller:
                    caller.wait_stream(stream)
        if features is not hidden_states:
            hidden_states.copy_(features)

    def keep(self) -> None:
        """See Runner.keep."""
        cache = self._cache
        if cache:
            cache.write()

    def close(self) -> None:
        """See Runner.close."""
        with ExitStack() as each:  # whatever one of them raises, the others follow
            each.callback(self._let_go)
            for slot in self._slots.close():
                each.callback(slot.close)

    def _let_go(self) -> None:
        self.keep()
        self._cache = self._config = self._engine = self._runtime = None

    def _make_slot(self) -> Slot:
        with torch.cuda.device(self.device):
            manifest = self._bundle.manifest
            return Slot(
                self._make_context,
                self._engine.device_memory_size_v2,
                self._profiles,
                (manifest.input.name, manifest.output.name),
                self.device,
                self._capturing,
            )

    def _make_context(self) -> Any:
        """Make a context without scratch memory; None where TensorRT cannot."""
        if self._config is not None:
            return self._engine.create_execution_context(self._config)
        return self._engine.create_execution_context(self._module.ExecutionContextAllocationStrategy.USER_MANAGED)

    def _open_cache(self, gpu: str) -> RuntimeCache | None:
        if self._plan.flavour != "tensorrt-rtx" or not self._options.runtime_cache:
            return None
        sha256 = self._bundle.manifest.files[self._plan.file].sha256
        return RuntimeCache(self._bundle.path, sha256, self._module.__version__, gpu)

    def _configure(self) -> Any:
        """Settle what TensorRT-RTX decides while it runs."""
        module, options = self._module, self._options
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(module.ExecutionContextAllocationStrategy.USER_MANAGED)
        graphs = module.CudaGraphStrategy
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if options.cuda_graphs else graphs.DISABLED
        config.dynamic_shapes_kernel_specialization_strategy = getattr(
            module.DynamicShapesKernelSpecializationStrategy, options.kernel_specialization.upper()
        )
        if self._cache and not config.set_runtime_cache(self._cache.read_into(config.create_runtime_cache())):
            logger.warning("%s takes no runtime cache: kernels are compiled in every process", self.name)
            self._cache = None
        return config


def _refit(module: Any, engine: Any, log: Any, bundle: Bundle, plan: PlanEntry) -> None:
    """Give an engine that was built without its weights those of the bundle's graph."""
    with bundle.steady(GRAPH, GRAPH_DATA):
        refitter = module.Refitter(engine, log)
        parser = module.OnnxParserRefitter(refitter, log)
        if not (parser.refit_from_file(str(bundle.path / GRAPH)) and refitter.refit_cuda_engine()):
            reasons = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
            raise BackendError(
                f"{plan.file} was built without its weights, and could not be given those of {GRAPH}: "
                f"{reasons or 'the reason is in the log'}. Build it whole: trtower build {bundle.path}"
            )


def _read_profiles(engine: Any, bundle: Bundle, plan: PlanEntry) -> tuple[Profile, ...]:
    """Have the engine take and give what the manifest says, for outputs are written into memory sized by it.

    Give the profiles it was built with.
    """
    manifest, batch = bundle.manifest, bundle.manifest.batch
    for spec in (manifest.input, manifest.output):
        shape = tuple(engine.get_tensor_shape(spec.name))
        if shape != (-1 if batch.min < batch.max else batch.max, *spec.shape[1:]):
            raise BundleError(f"{bundle.path}: {plan.file} has {spec.name} {shape}; tower.json says {spec.shape}.")
    shapes = [
        engine.get_tensor_profile_shape(manifest.input.name, index) for index in range(engine.num_optimization_profiles)
    ]
    profiles = tuple(Profile(*(shape[0] for shape in each)) for each in shapes)
    least, most = min(profile.least for profile in profiles), max(profile.most for profile in profiles)
    if (least, most) != (batch.min, batch.max):
        raise BundleError(
            f"{bundle.path}: {plan.file} takes {least} to {most} images; tower.json says {batch.min} to {batch.max}."
        )
    return profiles


def _is_aligned(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0


def _bridge(module: Any) -> Any:
    """Make a TensorRT logger that writes into Python's logging, and keeps the errors for who raises them."""
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
            self.errors: deque[str] = deque(maxlen=ERRORS)

        def log(self, severity: object, message: str) -> None:
            level = levels.get(severity, logging.NOTSET)
            if level == logging.ERROR:
                self.errors.append(message)
            if level:
                logger.log(level, "%s", message)

    return Bridge()
