"""Build a plan from an ONNX graph through Polygraphy, with either TensorRT."""

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
from trtower.errors import BuildError
from trtower.extras import import_extra
from trtower.flavour import FLAVOURS, load_flavour
from trtower.spec import BY_DTYPE, MIB, BatchProfile, TensorSpec
from trtower_export.console import Step
from trtower_export.plan.targets import Target

PLAN, LOG = "plan", "log"
"""What a build leaves in its folder: the plan, and what was said while it was built."""

PLAN_OVERHEAD_MIB = 24
"""What a plan may hold beside its weights. Measured with TensorRT-RTX 1.7.1: 1.7 MiB for two layers, 5.2 MiB for 23."""

SIZE_TOLERANCE = 0.05
"""Slack around the weights' own size; another precision would be off by half."""

FOREIGN_SHARE = 0.01
"""Weights a network may hold in another floating type: the handful of scalars that the parser adds."""


def build_plan(
    graph: Path,
    target: Target,
    tensor: TensorSpec,
    profiles: Sequence[BatchProfile],
    folder: Path,
    step: Step,
    *,
    mixed: bool = False,
    cache: Path | None = None,
) -> None:
    """Build ``graph`` into PLAN in ``folder``, with LOG beside it.

    ``mixed``: the graph holds some weights in FP32, or in 8 bits. ``cache``: what TensorRT has timed on this GPU, read
    and kept. Raises BuildError with TensorRT's own words when it refuses, and when the plan is not of the precision
    that the graph is in.
    """
    module = load_flavour(target.flavour)
    polygraphy = _import_polygraphy(target.flavour)
    from polygraphy.exception import PolygraphyException

    kept = str(cache) if cache else None
    with _keep_log(folder / LOG) as errors, _hold_interrupts() as interrupted:
        try:
            parsed = polygraphy.network_from_onnx_path(str(graph), strongly_typed=True)
            _check_network(parsed[1], module, tensor.dtype, mixed=mixed)
            ranges = [
                polygraphy.Profile().add(tensor.name, *((n, *tensor.shape[1:]) for n in (each.min, each.opt, each.max)))
                for each in profiles
            ]
            monitor = _monitor(module, step, interrupted)
            of_build = {"profiles": ranges, "progress_monitor": monitor, "load_timing_cache": kept}
            config = _make_config(polygraphy, module, target, of_build)
            content = memoryview(polygraphy.engine_bytes_from_network(parsed, config=config, save_timing_cache=kept))
        except PolygraphyException as err:
            words = "; ".join(dict.fromkeys(errors)) or str(err)
            raise BuildError(f"{target.flavour} {module.__version__} could not build {graph.name}: {words}") from err
    if not target.settings.stripped:
        _check_size(content.nbytes, (graph.parent / GRAPH_DATA).stat().st_size, tensor.dtype)
    (folder / PLAN).write_bytes(content)


def _make_config(polygraphy: Any, module: Any, target: Target, of_build: dict[str, Any]) -> Any:
    """Make what makes TensorRT's config of ``of_build`` and the settings."""
    options = of_build | _settings(target.settings, module)
    if target.flavour == "tensorrt":
        return polygraphy.CreateConfig(**options)
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

    pairs = [tuple(map(int, capability.split("."))) for capability in target.compute_capabilities]
    # FP32 products keep their 23 bits: TF32 has the 10 of FP16, which islands are there to be spared. Polygraphy does
    # so for data-centre TensorRT by itself.
    return polygraphy.PostprocessConfig(
        CreateConfigRTX(compute_capabilities=pairs or None, **options),
        lambda builder, network, config: config.clear_flag(module.BuilderFlag.TF32),
    )


def _settings(settings: BuildSettings, module: Any) -> dict[str, Any]:
    """Put settings into Polygraphy's words, in which None is TensorRT's default."""
    workspace, compatible = settings.workspace_mib, settings.hardware_compatible
    return {
        "memory_pool_limits": {module.MemoryPoolType.WORKSPACE: workspace * MIB} if workspace is not None else None,
        "builder_optimization_level": settings.optimization_level,
        "hardware_compatibility_level": module.HardwareCompatibilityLevel.AMPERE_PLUS if compatible else None,
        "strip_plan": settings.stripped,
        "refittable": settings.stripped,
    }


def _check_network(network: Any, module: Any, dtype: str, *, mixed: bool) -> None:
    """Have the parsed network hold its weights in ``dtype``: strongly typed, TensorRT must keep them so."""
    floats = {name: getattr(module.DataType, each.tensorrt) for name, each in BY_DTYPE.items()}
    wanted, values = floats[dtype], dict.fromkeys(floats.values(), 0)
    for layer in (network.get_layer(index) for index in range(network.num_layers)):
        if layer.type == module.LayerType.CONSTANT and (tensor := layer.get_output(0)).dtype in values:
            values[tensor.dtype] += prod(tensor.shape)
    if mixed:
        values.pop(module.DataType.FLOAT)
    others = sum(values.values()) - values[wanted]
    if others > FOREIGN_SHARE * values[wanted]:
        raise BuildError(
            f"the network holds {values[wanted]} weights in {dtype} and {others} in others: export it again."
        )


def _check_size(plan: int, weights: int, dtype: str) -> None:
    """Have the plan weigh what the graph's weights do: in another precision it would be half or twice as heavy."""
    least, most = weights * (1 - SIZE_TOLERANCE), weights * (1 + SIZE_TOLERANCE) + PLAN_OVERHEAD_MIB * MIB
    if not least <= plan <= most:
        raise BuildError(
            f"the plan has {plan / MIB:.1f} MiB; {weights / MIB:.1f} MiB of {dtype} weights make {least / MIB:.1f} to "
            f"{most / MIB:.1f} MiB: TensorRT did not keep the precision of the graph."
        )


def _monitor(module: Any, step: Step, interrupted: threading.Event) -> Any:
    """Make an IProgressMonitor that moves ``step`` and passes an interrupt on to TensorRT."""

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
            self.furthest = max(self.furthest, self.fraction(phase_name))  # phases are reported late at times
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
    """Take note of Ctrl-C during a build, and raise it at the end: C++ calls back into Python, and would swallow it.

    It is raised whatever came of the build: TensorRT-RTX 1.7 is asked to stop and finishes all the same.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # signals go to the main thread, which is not in here
        return
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupted.is_set():
            raise KeyboardInterrupt


def _import_polygraphy(flavour: str) -> Any:
    """Import Polygraphy's builders for a flavour. Its choice of TensorRT holds for the whole process."""
    extra = f"{FLAVOURS[flavour][1]}-build"
    settings = import_extra("polygraphy.config", extra=extra, purpose=f"building a {flavour} plan")
    rtx = flavour == "tensorrt-rtx"
    if "polygraphy.backend.trt" in sys.modules and rtx != settings.USE_TENSORRT_RTX:
        raise BuildError(
            "this process has loaded Polygraphy for the other TensorRT already: "
            "build each flavour in a process of its own."
        )
    settings.USE_TENSORRT_RTX = rtx
    from polygraphy.logger import G_LOGGER

    G_LOGGER.use_python_logging_system = True
    return import_module("polygraphy.backend.trt")


@contextmanager
def _keep_log(path: Path) -> Iterator[list[str]]:
    """Write what is said of a build into a file; gather what TensorRT logs as an error, which it says nowhere else.

    To everybody else Polygraphy says no more than it would have, and of errors nothing: they are raised in one.
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
