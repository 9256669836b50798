"""Build a bundle's plan from its ONNX graph, through Polygraphy, with either TensorRT.

Neither torch models, nor transformers, nor onnx are needed here: `trtower build` runs where the tower is served.
"""

import logging
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from trtower.bundle import GRAPH, GRAPH_DATA, PLANS, Bundle, disk_errors, locked
from trtower.errors import BackendError, BuildError, ConfigError, MissingExtraError
from trtower.extras import import_extra
from trtower.flavour import FLAVOURS, load_flavour
from trtower.manifest import PlanEntry
from trtower.runners.choose import PLATFORM
from trtower.spec import BatchProfile, TensorSpec
from trtower_export.progress import Progress, Step

if TYPE_CHECKING:
    from types import ModuleType

MIB = 1 << 20

PLAN_OVERHEAD_MIB = 24
"""What a plan may hold beside its weights. Measured with TensorRT-RTX 1.7.1: 1.7 MiB for two layers, 5.2 MiB for 23."""

SIZE_TOLERANCE = 0.05
"""Slack around the weights' own size; another precision would be off by half."""

NEEDS = {"bf16": 8.0, "fp8": 8.9}
"""The first compute capability that has a format; for those before TensorRT refuses the graph."""

STAGING = ".staging-"

FOREIGN_SHARE = 0.01
"""Weights a network may hold in another floating type: the handful of scalars that the parser adds."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a plan is built for. No compute capability: TensorRT-RTX's portable form, or the GPU that is here."""

    flavour: str
    compute_capabilities: tuple[str, ...] = ()


def choose_target(flavour: str, compute_capabilities: tuple[str, ...], precision: str) -> tuple[Target | None, str]:
    """Settle which TensorRT builds, and for which GPUs, before any work is done; also say it in words.

    ``flavour`` "auto" takes the TensorRT of this machine's GPU, then TensorRT-RTX, which needs none; where neither
    is installed there is no target, as with "none". Raises ConfigError and MissingExtraError.
    """
    if flavour not in ("auto", "none", *FLAVOURS):
        raise ConfigError(f"flavour {flavour!r} is unknown: auto, none, {', '.join(FLAVOURS)} are known.")
    if flavour == "none":
        if compute_capabilities:
            raise ConfigError("--compute-capability is for a plan, and --flavour none builds no plan.")
        return None, "no plan, as asked: `trtower build` makes one where the tower is served"
    reason = f"flavour {flavour}"
    if flavour == "auto":
        flavour, reason = _auto_flavour()
        if flavour == "none":
            if compute_capabilities:
                raise MissingExtraError(f"--compute-capability is for a plan, and {reason}")
            return None, reason
    module = load_flavour(flavour)
    _check_capabilities(flavour, module, compute_capabilities, precision)
    if flavour == "tensorrt-rtx" and precision == "fp8" and not compute_capabilities:
        # The portable form builds with FP8, and claims GPUs that have none.
        compute_capabilities = tuple(c for c in _known(module) if float(c) >= NEEDS["fp8"])
        reason += f", for compute capability {', '.join(compute_capabilities)}, which have fp8"
    return Target(flavour=flavour, compute_capabilities=tuple(sorted(set(compute_capabilities), key=float))), reason


def _auto_flavour() -> tuple[str, str]:
    missing = []
    for flavour in FLAVOURS:
        try:
            load_flavour(flavour)
        except MissingExtraError as err:
            missing.append(str(err))
            continue
        if flavour == "tensorrt" and not torch.cuda.is_available():
            missing.append("flavour tensorrt builds on its GPU, and none is here")
            continue
        return flavour, f"flavour {flavour}" + (f" ({'; '.join(missing)})" if missing else "")
    return "none", "no plan is built, for want of a TensorRT: " + "; ".join(missing)


def _check_capabilities(flavour: str, module: "ModuleType", capabilities: tuple[str, ...], precision: str) -> None:
    if flavour == "tensorrt":
        if not torch.cuda.is_available():
            raise BackendError("flavour tensorrt builds on the GPU it runs on, and torch finds none here.")
        known = built = ["{}.{}".format(*torch.cuda.get_device_capability())]
    else:
        known, built = _known(module), [*capabilities]
    for capability in capabilities:
        if capability not in known:
            raise ConfigError(
                f"compute capability {capability!r} is not one that {flavour} {module.__version__} builds for here: "
                f"{', '.join(known)} are."
            )
    for capability in built:
        if float(capability) < NEEDS.get(precision, 0.0):
            raise ConfigError(
                f"{precision} needs compute capability {NEEDS[precision]} or later, and this plan would be for "
                f"{capability}: use fp16."
            )


def _known(module: "ModuleType") -> list[str]:
    """List the compute capabilities that a TensorRT-RTX builds for."""
    names = [name[2:] for name in module.ComputeCapability.__members__ if name.startswith("SM")]
    return [f"{name[:-1]}.{name[-1]}" for name in names]


def add_plan(bundle: Bundle, flavour: str, compute_capabilities: tuple[str, ...], progress: Progress) -> Path:
    """Build a plan for a bundle that exists, add it, and return its path."""
    manifest = bundle.manifest
    target, reason = choose_target(flavour, compute_capabilities, manifest.precision)
    if target is None:
        raise ConfigError(f"there is nothing to build: {reason}")
    progress.say(reason)
    with disk_errors(bundle.path), locked(bundle.path):
        for leftover in bundle.path.glob(f"{STAGING}*"):  # of a build that was killed
            shutil.rmtree(leftover)
        graph = bundle.verify(GRAPH)
        bundle.verify(GRAPH_DATA)
        with TemporaryDirectory(prefix=STAGING, dir=bundle.path) as folder:
            with progress.step(f"Build the {target.flavour} plan") as step:
                entry, plan = build_plan(
                    graph,
                    target,
                    manifest.input,
                    manifest.profiles,
                    Path(folder),
                    step,
                    mixed=manifest.is_mixed,
                )
            added = bundle.add_plan(entry, plan)
    return bundle.path / added.manifest.plans[-1].file


def plan_name(target: Target, version: str) -> str:
    """Name a plan's file after what it needs: plans/FLAVOUR-VERSION.GPUS.plan."""
    gpus = "+".join("sm" + capability.replace(".", "") for capability in target.compute_capabilities)
    return f"{PLANS}/{target.flavour}-{version}.{gpus or 'any'}.plan"


def build_plan(
    graph: Path,
    target: Target,
    tensor: TensorSpec,
    profiles: Sequence[BatchProfile],
    folder: Path,
    step: Step,
    *,
    mixed: bool = False,
) -> tuple[PlanEntry, Path]:
    """Build ``graph`` into a plan under ``folder`` and return what it needs, and where it lies.

    ``mixed``: the graph holds some weights in FP32, or in 8 bits. Raises BuildError with TensorRT's own words when
    it refuses, and when the plan is not of the precision that the graph is in.
    """
    module = load_flavour(target.flavour)
    if target.flavour == "tensorrt":
        here = "{}.{}".format(*torch.cuda.get_device_capability())
        target = Target(flavour=target.flavour, compute_capabilities=(here,))
    entry = PlanEntry(
        file=plan_name(target, module.__version__),
        flavour=target.flavour,
        version=module.__version__,
        platform=PLATFORM,
        compute_capabilities=target.compute_capabilities,
    )
    polygraphy = _import_polygraphy(target.flavour)
    monitor = _monitor(module, step)
    ranges = [
        polygraphy.Profile().add(tensor.name, *((n, *tensor.shape[1:]) for n in (each.min, each.opt, each.max)))
        for each in profiles
    ]
    settings: dict[str, Any] = {"profiles": ranges, "progress_monitor": monitor}
    with _collect_errors() as errors, _hold_interrupts(monitor):
        try:
            parsed = polygraphy.network_from_onnx_path(str(graph), strongly_typed=True)
            _check_network(parsed[1], module, tensor.dtype, mixed=mixed)
            if target.flavour == "tensorrt-rtx":
                pairs = [tuple(map(int, capability.split("."))) for capability in target.compute_capabilities]
                config = polygraphy.CreateConfigRTX(compute_capabilities=pairs or None, **settings)
            else:
                config = polygraphy.CreateConfig(**settings)
            content = memoryview(polygraphy.engine_bytes_from_network(parsed, config=config))
        except polygraphy.PolygraphyException as err:
            monitor.raise_if_interrupted()
            words = "; ".join(dict.fromkeys(errors)) or str(err)
            raise BuildError(f"{target.flavour} {module.__version__} could not build {graph.name}: {words}") from err
    monitor.raise_if_interrupted()  # TensorRT-RTX 1.7 is asked to stop and finishes all the same
    _check_size(content.nbytes, (graph.parent / GRAPH_DATA).stat().st_size, tensor.dtype)
    path = folder / entry.file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return entry, path


def _check_network(network: Any, module: Any, dtype: str, *, mixed: bool) -> None:
    """Have the parsed network hold its weights in ``dtype``: strongly typed, TensorRT must keep them so."""
    wanted = {"float16": module.DataType.HALF, "bfloat16": module.DataType.BF16, "float32": module.DataType.FLOAT}[
        dtype
    ]
    floats = (module.DataType.FLOAT, module.DataType.HALF, module.DataType.BF16)
    values = dict.fromkeys(floats, 0)
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


def _monitor(module: Any, step: Step) -> Any:
    """Make an IProgressMonitor that moves ``step`` and passes an interrupt on to TensorRT."""

    class Monitor(module.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)
            self.phases: dict[str, tuple[str | None, int, int]] = {}
            self.furthest = 0.0
            self.interrupted = False

        def raise_if_interrupted(self) -> None:
            if self.interrupted:
                raise KeyboardInterrupt

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.phases[phase_name] = (parent_phase, num_steps, 0)

        def step_complete(self, phase_name: str, index: int) -> bool:
            parent, total, _ = self.phases[phase_name]
            self.phases[phase_name] = (parent, total, index + 1)
            self.furthest = max(self.furthest, self.fraction(phase_name))  # phases are reported late at times
            step.update(self.furthest, phase_name)
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self.phases.pop(phase_name, None)

        def fraction(self, phase_name: str) -> float:
            inner, name = 0.0, phase_name
            while name in self.phases:
                parent, total, done = self.phases[name]
                inner = min(1.0, (done + inner) / max(total, 1))
                if parent is None:
                    break
                name = parent
            return inner

    return Monitor()


@contextmanager
def _hold_interrupts(monitor: Any) -> Iterator[None]:
    """Take note of Ctrl-C during a build instead of raising: C++ calls back into Python, and would swallow it."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals go to the main thread, which is not in here
        return

    def note(*_: object) -> None:
        monitor.interrupted = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _import_polygraphy(flavour: str) -> Any:
    """Import Polygraphy's builders for a flavour. Its choice of TensorRT holds for the whole process."""
    extra = FLAVOURS[flavour][1]
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
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import (
        CreateConfig,
        Profile,
        engine_bytes_from_network,
        network_from_onnx_path,
    )
    from polygraphy.exception import PolygraphyException

    return SimpleNamespace(
        CreateConfig=CreateConfig,
        CreateConfigRTX=CreateConfigRTX,
        PolygraphyException=PolygraphyException,
        Profile=Profile,
        engine_bytes_from_network=engine_bytes_from_network,
        network_from_onnx_path=network_from_onnx_path,
    )


@contextmanager
def _collect_errors() -> Iterator[list[str]]:
    """Gather what TensorRT logs as an error, which it says nowhere else."""
    errors: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            errors.append(record.getMessage().strip().removeprefix("[E] "))

    collector = Collector(level=logging.ERROR)
    collector.addFilter(lambda record: record.levelno == logging.ERROR)
    polygraphy_log = logging.getLogger("Polygraphy")
    polygraphy_log.addHandler(collector)
    try:
        yield errors
    finally:
        polygraphy_log.removeHandler(collector)
