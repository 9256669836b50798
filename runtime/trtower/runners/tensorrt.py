"""Run a plan with either flavour of TensorRT, directly on torch's tensors and in the caller's stream."""

import ctypes
import logging
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import BUILD_NOTES, GRAPH, GRAPH_DATA, PlanEntry
from trtower.dtypes import DTYPES, PIXEL_DTYPES
from trtower.errors import BackendError, BundleError
from trtower.flavour import load_flavour, sm_name
from trtower.runners.base import Backend, EngineOptions, OnStart, Runner, Shape, check_contract
from trtower.runners.contexts import ContextSlot, SharedEngine
from trtower.runners.device import capability_of
from trtower.runners.pool import Pool
from trtower.runners.runtime_cache import RuntimeCache
from trtower.runners.runtimes import load_runtime, parse_obstacle, plan_verdicts, product_name
from trtower.spec import BatchProfile

logger = logging.getLogger(__name__)

ALIGNMENT = 256
"""TensorRT requires tensor addresses to be multiples of this many bytes (`IExecutionContext.set_tensor_address`)."""

ERRORS = 3
"""How many of TensorRT's latest errors to quote when a plan fails to load."""


class TensorRTRunner(Runner):
    """One engine, and a pool of slots to run it in.

    A call takes an idle slot that is unused or that its stream used last, or else a new one. Once there are
    `EngineOptions.contexts` slots, it takes the one that has been idle for longest, and waits on the GPU for the
    previous call of that slot. On torch's default stream TensorRT would synchronise the host, so such calls run in the
    runner's own stream, which first waits for the caller's. Either way the caller's stream waits for the result. So if
    the caller frees a tensor right after the call, torch does not reuse its memory before the engine is done with it.
    """

    def __init__(self, bundle: Bundle, plan: PlanEntry, device: torch.device, options: EngineOptions) -> None:
        module = load_runtime(plan)
        product = product_name(module, plan)
        content = bundle.read(plan.file)
        gpu = sm_name(capability_of(device))
        self.backend = plan.flavour
        self.files = (plan.file,)
        self.device = device
        self.dtype = DTYPES[bundle.manifest.output.dtype]
        self.pixel_dtype = PIXEL_DTYPES[bundle.manifest.input.dtype]
        self.name = f"{product} {module.__version__}, {gpu}"
        self._module, self._options, self._bundle, self._plan = module, options, bundle, plan
        with torch.cuda.device(device):
            log = _bridge(module)
            runtime = _start(module, log, f"{product} {module.__version__} could not start on {device}")
            runtime.engine_host_code_allowed = False  # a plan is data
            engine = runtime.deserialize_cuda_engine(content)
            if engine is None:
                raise BackendError(
                    f"{product} {module.__version__} could not load {plan.file} on {device}: "
                    f"{'; '.join(log.errors) or 'it gave no reason'}. Build one here: trtower build {bundle.path}"
                )
            self._runtime, self._engine = runtime, engine
            if plan.settings.stripped:
                _refit(module, engine, runtime.logger, bundle, plan)
            profiles = _read_profiles(engine, bundle, plan)
            self._cache: RuntimeCache | None = None
            is_rtx = plan.flavour == "tensorrt-rtx"
            managed = module.ExecutionContextAllocationStrategy.USER_MANAGED  # each slot allocates scratch memory
            self._config = self._configure(gpu, managed) if is_rtx else managed
            self._shared = SharedEngine(
                make_context=lambda: self._engine.create_execution_context(self._config),
                scratch_bytes=engine.device_memory_size_v2,
                profiles=profiles,
                names=(bundle.manifest.input.name, bundle.manifest.output.name),
                device=device,
                captures=options.cuda_graphs and not is_rtx,
            )
            self._own_stream = torch.cuda.Stream(device)
            self._slots = Pool(lambda: ContextSlot(self._shared), options.contexts)

    def run(self, pixel_values: torch.Tensor, hidden_states: torch.Tensor, on_start: OnStart | None = None) -> None:
        """See Runner.run."""
        caller = torch.cuda.current_stream(self.device)
        stream = caller if caller.cuda_stream else self._own_stream
        images = pixel_values if _is_aligned(pixel_values) else pixel_values.clone()
        features = hidden_states if _is_aligned(hidden_states) else torch.empty_like(hidden_states)
        fitting = (None, stream.cuda_stream)
        with torch.cuda.device(self.device), self._slots.lend(lambda slot: slot.stream in fitting) as slot:
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
        if cache := self._cache:
            cache.write()

    def close(self) -> None:
        """See Runner.close."""
        with ExitStack() as each:  # close the others even if one of them raises
            each.callback(self._free)
            for slot in self._slots.close():
                each.callback(slot.close)

    def _free(self) -> None:
        self.keep()
        self._cache = self._config = self._engine = self._runtime = None

    def _configure(self, gpu: str, allocation: Any) -> Any:
        """Configure what TensorRT-RTX decides at run time."""
        module, options = self._module, self._options
        config = self._engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(allocation)
        graphs = module.CudaGraphStrategy
        config.cuda_graph_strategy = graphs.WHOLE_GRAPH_CAPTURE if options.cuda_graphs else graphs.DISABLED
        config.dynamic_shapes_kernel_specialization_strategy = getattr(
            module.DynamicShapesKernelSpecializationStrategy, options.kernel_specialization.upper()
        )
        if options.runtime_cache:
            sha256 = self._bundle.manifest.files[self._plan.file].sha256
            cache = RuntimeCache(self._bundle.path, sha256, module.__version__, gpu)
            if config.set_runtime_cache(cache.read_into(config.create_runtime_cache())):
                self._cache = cache
            else:
                logger.warning("%s rejected the runtime cache: every process compiles its own kernels", self.name)
        return config


def _start(module: ModuleType, log: Any, failure: str) -> Any:
    """Return TensorRT's runtime; raise BackendError, which begins with ``failure``, if it finds no usable driver.

    Without one the full TensorRT returns nothing, for which pybind raises TypeError. The lean runtime (10.16, 11.4)
    logs an error and returns an object at a wrong address: whatever touches it, even its destruction, ends the process.
    So the object is never freed.
    """
    try:
        runtime = module.Runtime(log)
    except TypeError as err:
        raise BackendError(f"{failure}; its driver may be too old: {err}") from err
    if log.errors:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(runtime))
        raise BackendError(f"{failure}; its driver may be too old: {'; '.join(log.errors)}")
    return runtime


def _refit(module: Any, engine: Any, log: Any, bundle: Bundle, plan: PlanEntry) -> None:
    """Load the weights of the bundle's graph into an engine that was built without them."""
    with bundle.steady(GRAPH, numbers=GRAPH_DATA):
        refitter = module.Refitter(engine, log)
        parser = module.OnnxParserRefitter(refitter, log)
        if not (parser.refit_from_file(str(bundle.path / GRAPH)) and refitter.refit_cuda_engine()):
            reasons = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
            raise BackendError(
                f"{plan.file} was built without its weights, and those of {GRAPH} could not be loaded into it: "
                f"{reasons or 'the reason is in the log'}. Build it with weights: trtower build {bundle.path}"
            )


def _read_profiles(engine: Any, bundle: Bundle, plan: PlanEntry) -> list[BatchProfile]:
    """Return the profiles that an engine was built with; raise BundleError unless it matches the manifest."""
    manifest, batch, images = bundle.manifest, bundle.manifest.batch, bundle.manifest.input.name
    any_batch = -1 if batch.min < batch.max else batch.max

    def read(name: str) -> list[tuple[str, Shape]]:
        shape = tuple(engine.get_tensor_shape(name))
        return [(name, ("batch", *shape[1:]) if shape[:1] == (any_batch,) else shape)]

    check_contract(bundle, plan.file, read(images), read(manifest.output.name))
    shapes = [engine.get_tensor_profile_shape(images, index) for index in range(engine.num_optimization_profiles)]
    profiles = [BatchProfile(min=low[0], opt=tuned[0], max=high[0]) for low, tuned, high in shapes]
    least, most = min(profile.min for profile in profiles), max(profile.max for profile in profiles)
    if (least, most) != (batch.min, batch.max):
        raise BundleError(
            f"{bundle.path}: {plan.file} accepts {least} to {most} images; tower.json says {batch.min} to {batch.max}. "
            f"Build the plan again: trtower build {bundle.path}"
        )
    return profiles


def _is_aligned(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0


def _bridge(module: Any) -> Any:
    """Make a TensorRT logger that writes to Python's logging and keeps the latest errors for error messages."""
    levels = {
        module.ILogger.INTERNAL_ERROR: logging.ERROR,
        module.ILogger.ERROR: logging.ERROR,
        module.ILogger.WARNING: logging.WARNING,
        module.ILogger.INFO: logging.DEBUG,
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


class TensorRT(Backend):
    """Either flavour of TensorRT. The backend has the name of the flavour whose plans it runs."""

    def files(self, bundle: Bundle) -> Sequence[str]:
        """See Backend.files."""
        return [plan.file for plan in bundle.manifest.plans if plan.flavour == self.name]

    def lacks(self, bundle: Bundle) -> str:
        """See Backend.lacks."""
        lacks = super().lacks(bundle)
        if target := bundle.manifest.target:
            lacks = f"the bundle has no {self.name} plan; it is for {target.name}"
            has_others = target.flavour not in ("", self.name)
            lacks += f", which takes {target.flavour}" if has_others else f": see {bundle.path / BUILD_NOTES}"
        try:
            version = load_flavour(self.name).__version__
        except ImportError:
            return lacks
        return parse_obstacle(bundle.manifest.first_tensorrt, self.name, version) or lacks

    def obstacle(self, bundle: Bundle, file: str, device: torch.device) -> str | None:
        """See Backend.obstacle."""
        for requirement, obstacle in plan_verdicts(_find_plan(bundle, file), device).items():
            if obstacle:
                return obstacle if requirement == "flavour" else f"{file} {obstacle}"
        return None

    def open(self, bundle: Bundle, file: str, device: torch.device, engine: EngineOptions) -> Runner:
        """See Backend.open."""
        return TensorRTRunner(bundle, _find_plan(bundle, file), device, engine)


def _find_plan(bundle: Bundle, file: str) -> PlanEntry:
    return next(plan for plan in bundle.manifest.plans if plan.file == file)


TENSORRT = TensorRT(name="tensorrt", product="TensorRT", package="tensorrt", kind="cuda")
TENSORRT_RTX = replace(TENSORRT, name="tensorrt-rtx", product="TensorRT-RTX", package="tensorrt-rtx")
