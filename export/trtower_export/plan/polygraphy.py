"""Build a plan from an ONNX graph with Polygraphy and either flavour of TensorRT."""

import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

from trtower.bundle.manifest import GRAPH_DATA, BuildSettings
from trtower.errors import BackendError, BuildError
from trtower.extras import import_extra
from trtower.flavour import FLAVOURS, load_flavour
from trtower.spec import BY_DTYPE, MIB, BatchProfile, TensorSpec
from trtower_export.console import Step
from trtower_export.plan.choice import PlanChoice

PLAN, LOG = "plan", "log"
"""The files that a build writes into its folder: the plan, and the log of the build."""

PLAN_OVERHEAD_MIB = 24
"""How much a plan may hold besides weights. TensorRT-RTX 1.7.1 measured 1.7 MiB for two layers, 5.2 MiB for 23."""

SIZE_TOLERANCE = 0.05
"""Tolerance around the size of the weights. A plan in another precision is half or twice as large."""

FOREIGN_SHARE = 0.01
"""The share of weights that may have another floating type: the few scalars that the parser adds."""

NO_OBJECT = "factory function returned nullptr"
"""The end of pybind11's TypeError if TensorRT does not make an object, as a Builder without a usable driver."""


def build_plan(
    graph: Path,
    choice: PlanChoice,
    tensor: TensorSpec,
    profiles: Sequence[BatchProfile],
    folder: Path,
    step: Step,
    *,
    dtype: str = "",
    mixed: bool = False,
    cache: Path | None = None,
) -> None:
    """Build ``graph`` into PLAN in ``folder``, with LOG beside it.

    ``tensor`` is the input, and ``dtype`` that of the weights, by default the input's. ``mixed``: the graph holds some
    weights in FP32 or in 8 bits. ``cache``: the file of TensorRT's timings on this GPU, which the build reads and
    updates. Raises BuildError with TensorRT's own message if it refuses, and if the plan does not have the precision of
    the graph. Raises BackendError if TensorRT does not start.
    """
    module = load_flavour(choice.flavour)
    polygraphy = _import_polygraphy(choice.flavour)
    from polygraphy.exception import PolygraphyException

    cache_path = str(cache) if cache else None
    with _keep_log(folder / LOG) as errors, _hold_interrupts() as interrupted:
        try:
            parsed = polygraphy.network_from_onnx_path(str(graph), strongly_typed=True)
            _check_network(parsed[1], module, dtype or tensor.dtype, mixed=mixed)
            ranges = [
                polygraphy.Profile().add(tensor.name, *((n, *tensor.shape[1:]) for n in (each.min, each.opt, each.max)))
                for each in profiles
            ]
            monitor = _monitor(module, step, interrupted)
            build_options = {"profiles": ranges, "progress_monitor": monitor, "load_timing_cache": cache_path}
            config = _make_config(polygraphy, module, choice, build_options)
            plan = polygraphy.engine_bytes_from_network(parsed, config=config, save_timing_cache=cache_path)
            content = memoryview(plan)
        except (PolygraphyException, TypeError) as err:
            product, reason = f"{choice.flavour} {module.__version__}", "; ".join(dict.fromkeys(errors)) or str(err)
            if isinstance(err, PolygraphyException):
                raise BuildError(f"{product} could not build {graph.name}: {reason}") from err
            if not str(err).endswith(NO_OBJECT):
                raise
            raise BackendError(f"{product} could not start; its driver may be too old: {reason}") from err
    if not choice.settings.stripped:
        _check_size(content.nbytes, (graph.parent / GRAPH_DATA).stat().st_size, dtype or tensor.dtype)
    (folder / PLAN).write_bytes(content)


def _make_config(polygraphy: Any, module: Any, choice: PlanChoice, build_options: dict[str, Any]) -> Any:
    """Return Polygraphy's loader of a TensorRT config, with ``build_options`` and the settings of ``choice``."""
    options = build_options | _settings(choice.settings, module)
    if choice.flavour == "tensorrt":
        return polygraphy.CreateConfig(**options)
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    pairs = [tuple(map(int, capability.split("."))) for capability in choice.compute_capabilities]
    # TF32 would cut FP32 products from 23 bits to FP16's 10, which islands exist to avoid. For data-centre TensorRT,
    # Polygraphy clears the flag by itself.
    return polygraphy.PostprocessConfig(
        CreateConfigRTX(compute_capabilities=pairs or None, **options),
        lambda builder, network, config: config.clear_flag(module.BuilderFlag.TF32),
    )


def _settings(settings: BuildSettings, module: Any) -> dict[str, Any]:
    """Translate settings into Polygraphy's options, in which None means TensorRT's default."""
    workspace, compatible = settings.workspace_mib, settings.hardware_compatible
    return {
        "memory_pool_limits": {module.MemoryPoolType.WORKSPACE: workspace * MIB} if workspace is not None else None,
        "builder_optimization_level": settings.optimization_level,
        "hardware_compatibility_level": module.HardwareCompatibilityLevel.AMPERE_PLUS if compatible else None,
        "version_compatible": settings.version_compatible,
        "exclude_lean_runtime": settings.version_compatible,  # a plan is data, and carries no code
        "strip_plan": settings.stripped,
        "refittable": settings.stripped,
    }


def _check_network(network: Any, module: Any, dtype: str, *, mixed: bool) -> None:
    """Raise BuildError unless the parsed network holds its weights in ``dtype``.

    TensorRT does not change the types of a strongly typed network, so the plan has them, too.
    """
    floats = {name: getattr(module.DataType, each.tensorrt) for name, each in BY_DTYPE.items()}
    expected, values = floats[dtype], dict.fromkeys(floats.values(), 0)
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        if layer.type == module.LayerType.CONSTANT and (tensor := layer.get_output(0)).dtype in values:
            values[tensor.dtype] += prod(tensor.shape)
    if mixed:
        values.pop(module.DataType.FLOAT)
    others = sum(values.values()) - values[expected]
    if others > FOREIGN_SHARE * values[expected]:
        raise BuildError(
            f"the network holds {values[expected]} weights in {dtype} and {others} in other types, but all must be in "
            f"{dtype}: export it again."
        )


def _check_size(plan: int, weights: int, dtype: str) -> None:
    """Check that the plan is as large as the graph's weights: in another precision it is half or twice as large."""
    least, most = weights * (1 - SIZE_TOLERANCE), weights * (1 + SIZE_TOLERANCE) + PLAN_OVERHEAD_MIB * MIB
    if not least <= plan <= most:
        raise BuildError(
            f"the plan has {plan / MIB:.1f} MiB, but {least / MIB:.1f} to {most / MIB:.1f} MiB are expected for "
            f"{weights / MIB:.1f} MiB of {dtype} weights: TensorRT did not keep the precision of the graph."
        )


def _monitor(module: Any, step: Step, interrupted: threading.Event) -> Any:
    """Return an IProgressMonitor that advances ``step``, and cancels the build after an interrupt."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[str | None, int, int]] = {}
            self.furthest = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = (parent_phase, num_steps, 0)

        def step_complete(self, phase_name: str, index: int) -> bool:
            parent, total, _ = self.phases[phase_name]
            self.phases[phase_name] = (parent, total, index + 1)
            self.furthest = max(self.furthest, self.fraction(phase_name))  # TensorRT sometimes reports a phase late
            step.update(self.furthest, phase_name)
            return not interrupted.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def fraction(self, phase_name: str | None) -> float:
            inner = 0.0
            while phase_name is not None and phase_name in self.phases:
                phase_name, total, done = self.phases[phase_name]
                inner = min(1.0, (done + inner) / max(total, 1))
            return inner

    return Monitor()


@contextmanager
def _hold_interrupts() -> Iterator[threading.Event]:
    """Hold Ctrl-C back during a build and raise it at the end. Raised in a callback from C++, it would be lost.

    It is raised even if the build succeeds: TensorRT-RTX 1.7 finishes although it is asked to stop.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # only the main thread gets signals
        return
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupted.is_set():
            raise KeyboardInterrupt


def _import_polygraphy(flavour: str) -> Any:
    """Import Polygraphy's builders for a flavour, which fixes Polygraphy's TensorRT for the whole process."""
    extra = f"{FLAVOURS[flavour][1]}-build"
    settings = import_extra("polygraphy.config", extra=extra, purpose=f"building a {flavour} plan")
    rtx = flavour == "tensorrt-rtx"
    if "polygraphy.backend.trt" in sys.modules and rtx != settings.USE_TENSORRT_RTX:
        raise BuildError(
            "this process has already loaded Polygraphy for the other TensorRT: build each flavour in its own process."
        )
    settings.USE_TENSORRT_RTX = rtx
    from polygraphy.logger import G_LOGGER

    G_LOGGER.use_python_logging_system = True
    return import_module("polygraphy.backend.trt")


@contextmanager
def _keep_log(path: Path) -> Iterator[list[str]]:
    """Write the log of a build to a file, and collect TensorRT's errors, which appear only in its log.

    Other log handlers get the same records as without this, except errors: if the build fails, `build_plan` puts them
    into its exception.
    """
    errors: list[str] = []
    polygraphy_log = logging.getLogger("Polygraphy")
    level, loud = polygraphy_log.level, polygraphy_log.getEffectiveLevel()

    class Collector(logging.FileHandler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno == logging.ERROR:
                errors.append(record.getMessage().strip().removeprefix("[E] "))
            super().emit(record)
            if loud <= record.levelno < logging.ERROR and polygraphy_log.parent:
                polygraphy_log.parent.callHandlers(record)

    collector = Collector(path, mode="w", encoding="utf-8")
    polygraphy_log.addHandler(collector)
    polygraphy_log.setLevel(min(loud, logging.INFO))
    polygraphy_log.propagate = False
    try:
        yield errors
    finally:
        polygraphy_log.propagate = True
        polygraphy_log.setLevel(level)
        polygraphy_log.removeHandler(collector)
        collector.close()
