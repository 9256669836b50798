"""Say which backends can run a bundle here, why the others cannot, and open the one that was asked for.

`candidates` is the one place that knows the reasons: `auto`, a named backend and `trtower inspect` all read it.
"""

import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trtower.bundle import GRAPH, Bundle
from trtower.errors import BackendError, ConfigError
from trtower.extras import import_extra
from trtower.flavour import load_flavour
from trtower.manifest import PlanEntry
from trtower.runners import Runner
from trtower.runners.onnxruntime import PROVIDERS, OnnxRuntimeRunner
from trtower.runners.tensorrt import TensorRTRunner

BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "onnxruntime-cpu")
"""From the best to the last resort; `auto` takes the first that runs."""

PLATFORM = f"{platform.system().lower()}-{platform.machine().lower()}"
"""Plans are bound to the operating system and processor they were built for."""

PORTABLE_FROM = (8, 0)
"""TensorRT-RTX's portable plans start at Ampere."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run a bundle: a backend, the file it would run, and what stands against it, if anything."""

    backend: str
    file: str | None
    device: torch.device
    obstacle: str | None
    plan: PlanEntry | None = None

    def open(self, bundle: Bundle) -> Runner:
        """Verify the files and load them; raise BackendError where the backend refuses."""
        if self.obstacle:
            raise BackendError(f"{self.backend} cannot run {bundle.path}: {self.obstacle}")
        if self.plan:
            return TensorRTRunner(bundle, self.plan, self.device)
        return OnnxRuntimeRunner(bundle, self.device)


def choose(bundle: Bundle, backend: str = "auto", device: str | torch.device | None = None) -> Runner:
    """Open ``backend``, or with "auto" the best that runs here.

    `device` limits the choice: with "cuda" nothing runs on the CPU, and the other way round. Raises BackendError
    with every reason when nothing that was asked for can run; a file that fails its sha256 always raises.
    """
    if backend not in ("auto", *BACKENDS):
        raise ConfigError(f"backend {backend!r} is unknown: auto, {', '.join(BACKENDS)} are known.")
    asked = _parse_device(device)
    if asked and (obstacle := _device_obstacle(asked)):
        raise BackendError(f"device {asked} was asked for: {obstacle}. Ask for device='cpu', or for none.")
    wanted = BACKENDS if backend == "auto" else (backend,)
    passed_over: list[str] = []
    for candidate in candidates(bundle, device, wanted):
        try:
            runner = candidate.open(bundle)
        except BackendError as err:
            passed_over.append(f"{candidate.backend}: {candidate.obstacle or err}")
            continue
        # Where a GPU is present, running without TensorRT is news; on a laptop it is not.
        level = logging.INFO if candidate.plan or not torch.cuda.is_available() else logging.WARNING
        reasons = "; passed over " + "; ".join(passed_over) if passed_over else ""
        logger.log(level, "%s runs on %s%s", bundle.path, runner.name, reasons)
        return runner
    raise BackendError(f"nothing that was asked for can run {bundle.path}: {'; '.join(passed_over)}")


def candidates(
    bundle: Bundle, device: str | torch.device | None = None, backends: Sequence[str] = BACKENDS
) -> list[Candidate]:
    """List every way to run ``bundle`` on this machine, the best first, without loading any of it."""
    asked = _parse_device(device)
    found: list[Candidate] = []
    for backend in backends:
        kind = "cpu" if backend == "onnxruntime-cpu" else "cuda"
        # Asking torch for its current device makes a CUDA context, which a tower on the CPU has no use for.
        target = asked or _default_device(kind)
        if target.type != kind:
            target = torch.device(kind)
        obstacle = f"device {asked} was asked for" if asked and asked.type != kind else _device_obstacle(target)
        if backend.startswith("onnxruntime"):
            obstacle = obstacle or _onnxruntime_obstacle(bundle, kind)
            found.append(Candidate(backend=backend, file=GRAPH, device=target, obstacle=obstacle))
            continue
        plans = [plan for plan in bundle.manifest.plans if plan.flavour == backend]
        for plan in plans:
            reason = obstacle or _plan_obstacle(plan, target)
            found.append(Candidate(backend=backend, file=plan.file, device=target, obstacle=reason, plan=plan))
        if not plans:
            reason = f"the bundle has no {backend} plan: trtower build {bundle.path} --flavour {backend}"
            found.append(Candidate(backend=backend, file=None, device=target, obstacle=reason))
    return found


def _parse_device(device: str | torch.device | None) -> torch.device | None:
    if device is None:
        return None
    try:
        asked = torch.device(device)
    except RuntimeError as err:
        raise ConfigError(f"device {device!r} is unknown: cpu, cuda and cuda:INDEX are known.") from err
    if asked.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {str(asked)!r} has no backend: cpu, cuda and cuda:INDEX have.")
    if asked.type == "cuda" and asked.index is None:
        return _default_device("cuda")
    return torch.device("cpu") if asked.type == "cpu" else asked


def _default_device(kind: str) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def _device_obstacle(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None
    if not torch.cuda.is_available():
        build = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        return f"no GPU here: {build}"
    if device.index >= torch.cuda.device_count():
        return f"{device} does not exist: torch finds {torch.cuda.device_count()} CUDA device(s)"
    return None


def _plan_obstacle(plan: PlanEntry, device: torch.device) -> str | None:
    try:
        version: str = load_flavour(plan.flavour).__version__
    except (ImportError, OSError) as err:  # not installed, or installed and broken
        return str(err)
    if plan.version != version:
        return f"{plan.file} was built by {plan.flavour} {plan.version}, {version} is installed"
    if plan.platform != PLATFORM:
        return f"{plan.file} was built for {plan.platform}, this is {PLATFORM}"
    capability = torch.cuda.get_device_capability(device)
    here = "{}.{}".format(*capability)
    if not plan.compute_capabilities and capability < PORTABLE_FROM:
        return f"{plan.file} needs compute capability {'{}.{}'.format(*PORTABLE_FROM)} or later; this GPU has {here}"
    if plan.compute_capabilities and here not in plan.compute_capabilities:
        return f"{plan.file} needs compute capability {' or '.join(plan.compute_capabilities)}; this GPU has {here}"
    return None


def _onnxruntime_obstacle(bundle: Bundle, kind: str) -> str | None:
    try:
        ort = import_extra("onnxruntime", extra=kind, purpose=f"onnxruntime-{kind}")
    except (ImportError, OSError) as err:
        return str(err)
    if PROVIDERS[kind] not in ort.get_available_providers():
        return (
            f"the installed onnxruntime has no {PROVIDERS[kind]}: pip uninstall onnxruntime, "
            f"then pip install 'trtower[{kind}]'"
        )
    if kind == "cpu" and bundle.manifest.precision == "bf16":
        return "ONNX Runtime has no BF16 kernels for the CPU: export with --precision fp16 or fp32 to run there"
    return None
