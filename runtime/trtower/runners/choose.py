"""Say which backends can run a bundle here, why the others cannot, and open the one that was asked for.

`candidates` is the one place that knows the reasons: `auto`, a named backend and `trtower inspect` all read it.
"""

import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import GRAPH, PlanEntry
from trtower.errors import BackendError, ConfigError
from trtower.extras import how_to_install, import_extra
from trtower.flavour import FLAVOURS, capability_obstacle, load_flavour
from trtower.names import check_name, nearest, unknown
from trtower.runners.base import Runner
from trtower.runners.onnxruntime import PROVIDERS, OnnxRuntimeCudaRunner, OnnxRuntimeRunner
from trtower.runners.openvino import ARITHMETIC, OpenVinoRunner, has_bf16
from trtower.runners.tensorrt import EngineOptions, TensorRTRunner

BACKENDS = ("tensorrt", "tensorrt-rtx", "onnxruntime-cuda", "openvino-bf16", "openvino", "onnxruntime-cpu")
"""From the best to the last resort, by benchmarks/README.md; `auto` takes the first that runs and keeps the bounds."""

CPU_BACKENDS = ("openvino-bf16", "openvino", "onnxruntime-cpu")

PLATFORM = f"{platform.system().lower()}-{platform.machine().lower()}"
"""Plans are bound to the operating system and processor they were built for."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run a bundle: a backend, the file it would run, and what stands against it, if anything.

    An ``obstacle`` makes it impossible. With a ``reservation`` it runs where it is named, and `auto` takes another;
    where there is no other, it takes those that a check has failed, but none that is ``coarse``: that computes in less
    than the bundle's precision.
    """

    backend: str
    file: str | None
    device: torch.device
    obstacle: str | None
    reservation: str | None = None
    coarse: bool = False
    plan: PlanEntry | None = None

    def open(self, bundle: Bundle, engine: EngineOptions) -> Runner:
        """Verify the files and load them; raise BackendError where the backend refuses."""
        if self.obstacle:
            raise BackendError(f"{self.backend} cannot run {bundle.path}: {self.obstacle}")
        if self.plan:
            return TensorRTRunner(bundle, self.plan, self.device, engine)
        if self.backend in ARITHMETIC:
            return OpenVinoRunner(bundle, self.backend)
        if self.backend == "onnxruntime-cuda":
            return OnnxRuntimeCudaRunner(bundle, self.device, cuda_graphs=engine.cuda_graphs)
        return OnnxRuntimeRunner(bundle, self.device)


def choose(
    bundle: Bundle,
    backend: str = "auto",
    device: str | torch.device | None = None,
    *,
    certified: bool = False,
    engine: EngineOptions | None = None,
) -> Runner:
    """Open ``backend``, or with "auto" the best that runs here and keeps the bounds; ``certified`` prefers what does.

    `device` limits the choice: with "cuda" nothing runs on the CPU, and the other way round. Raises BackendError
    with every reason when nothing that was asked for can run; a file that fails its sha256 always raises.
    """
    check_name("backend", backend, ("auto", *BACKENDS))
    asked = parse_device(device)
    if asked and (obstacle := _device_obstacle(asked)):
        raise BackendError(f"device {asked} was asked for: {obstacle}. Ask for device='cpu', or for none.")
    wanted = BACKENDS if backend == "auto" else (backend,)
    found, passed_over = candidates(bundle, device, wanted, certified=certified), dict[Candidate, str]()
    order = sorted(found, key=lambda each: certified and each.reservation is not None)
    if backend == "auto":
        order = order_for_auto(found)
        passed_over = {each: each.reservation for each in found if each.reservation and not each.obstacle}
    for candidate in order:
        try:
            runner = candidate.open(bundle, engine or EngineOptions())
        except BackendError as err:
            passed_over[candidate] = candidate.obstacle or str(err)
            continue
        passed_over.pop(candidate, None)
        reasons = "; ".join(f"{each.backend}: {passed_over[each]}" for each in found if each in passed_over)
        # Where a GPU is present, running without TensorRT is news; on a laptop it is not. A failed check always is.
        is_news = torch.cuda.is_available() and not candidate.plan
        is_news |= not certified and any(each.reservation and not each.coarse for each in passed_over)
        level = logging.WARNING if is_news else logging.INFO
        logger.log(level, "%s runs on %s%s", bundle.path, runner.name, f"; passed over {reasons}" if reasons else "")
        return runner
    reasons = "; ".join(f"{each.backend}: {passed_over[each]}" for each in found if each in passed_over)
    others = () if len(wanted) > 1 else dict.fromkeys(each.backend for each in candidates(bundle) if not each.obstacle)
    instead = f". Available on this machine: {', '.join(others)}" if others else ""
    raise BackendError(f"no requested backend can run {bundle.path}: {reasons}{instead}")


def order_for_auto(found: Sequence[Candidate]) -> list[Candidate]:
    """Return what `auto` tries, in its order: last what a check has failed, and never what is coarse and unchecked."""
    reserved = [each for each in found if each.reservation and not each.obstacle]
    return [each for each in found if each not in reserved] + [each for each in reserved if not each.coarse]


def auto_choice(found: Sequence[Candidate]) -> Candidate | None:
    """Return the first that `auto` can open, as far as can be told without opening it; None where nothing runs."""
    return next((each for each in order_for_auto(found) if not each.obstacle), None)


def candidates(
    bundle: Bundle,
    device: str | torch.device | None = None,
    backends: Sequence[str] = BACKENDS,
    *,
    certified: bool = False,
) -> list[Candidate]:
    """List every way to run ``bundle`` on this machine, the best first, without loading any of it."""
    asked = parse_device(device)
    found: list[Candidate] = []
    for backend in backends:
        kind = "cpu" if backend in CPU_BACKENDS else "cuda"
        # Asking torch for its current device makes a CUDA context, which a tower on the CPU has no use for.
        target = asked or default_device(kind)
        if target.type != kind:
            target = torch.device(kind)
        obstacle = f"device {asked} was asked for" if asked and asked.type != kind else _device_obstacle(target)
        for file, reason, plan in _ways(bundle, backend, target, obstacle):
            coarse = backend == "openvino-bf16" and bundle.manifest.precision != "bf16"
            found.append(
                Candidate(
                    backend=backend,
                    file=file,
                    device=target,
                    obstacle=reason,
                    reservation=_reservation(bundle, backend, file, coarse=coarse, certified=certified),
                    coarse=coarse,
                    plan=plan,
                )
            )
    return found


def _ways(
    bundle: Bundle, backend: str, device: torch.device, missing: str | None
) -> list[tuple[str | None, str | None, PlanEntry | None]]:
    """List what a backend could execute of a bundle, and what stands against it; ``missing`` says what the device."""
    if backend not in FLAVOURS:
        look = _openvino_obstacle if backend in ARITHMETIC else _onnxruntime_obstacle
        return [(GRAPH, missing or look(bundle, backend), None)]
    plans = [plan for plan in bundle.manifest.plans if plan.flavour == backend]
    lacks = f"the bundle has no {backend} plan: trtower build {bundle.path} --flavour {backend}"
    return [(plan.file, missing or _plan_obstacle(plan, device), plan) for plan in plans] or [(None, lacks, None)]


def _reservation(bundle: Bundle, backend: str, file: str | None, *, coarse: bool, certified: bool) -> str | None:
    """Read what the bundle's certificates, by their hashes in the manifest, say of a candidate."""
    certificate = bundle.find_certificate(backend, file)
    if certificate is not None and not bundle.changed_since(certificate):
        return None if certificate.passed else f"its check of {certificate.date} missed {', '.join(certificate.missed)}"
    if not coarse and not certified:
        return None
    why = f"it computes in BF16, which is coarser than {bundle.manifest.precision}, and " if coarse else ""
    return f"{why}no check vouches for it: trtower check {bundle.path} --backend {backend}"


def parse_device(device: str | int | torch.device | None) -> torch.device | None:
    """Read a device as it may be asked for, None being none; raise ConfigError where no backend is for it."""
    if device is None:
        return None
    asked = _read_device(f"cuda:{device}" if type(device) is int else device)  # an index is a GPU's, as it is to torch
    if asked is None:
        text = str(device)
        meant = [f"cuda:{text}"] if text.isdecimal() and isinstance(device, str) else nearest(text, ("cpu", "cuda"))
        raise unknown("device", device, ("cpu", "cuda", "cuda:INDEX"), meant)
    if asked.type not in ("cpu", "cuda") or (asked.type == "cpu" and asked.index):
        raise ConfigError(f"device {str(asked)!r} has no backend; choose cpu, cuda or cuda:INDEX.")
    if asked.type == "cuda" and asked.index is None:
        return default_device("cuda")
    return torch.device("cpu") if asked.type == "cpu" else asked


def _read_device(written: str | int | torch.device) -> torch.device | None:
    """Read a device as torch does; None where it cannot, or takes another index: to it, cuda:257 is cuda:1."""
    try:
        asked = torch.device(written)
    except (RuntimeError, TypeError):
        return None
    return asked if asked.index is None or str(asked) == str(written) else None


def default_device(kind: str) -> torch.device:
    """Give the CPU, or torch's current GPU; the first where there is none."""
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
    for what, obstacle in plan_verdicts(plan, device).items():
        if obstacle:
            return obstacle if what == "flavour" else f"{plan.file} {obstacle}"
    return None


def plan_verdicts(plan: PlanEntry, device: torch.device) -> dict[str, str | None]:
    """Hold everything that a plan needs against this machine; None where it is met. Nothing is deserialised."""
    found: dict[str, str | None] = dict.fromkeys(("flavour", "version", "platform", "compute capability"))
    module = None
    try:
        module = load_flavour(plan.flavour)
        if plan.version != module.__version__:
            found["version"] = f"was built by {plan.flavour} {plan.version}, {module.__version__} is installed"
    except (ImportError, OSError) as err:  # not installed, or installed and broken
        found["flavour"] = str(err)
        found["version"] = f"was built by {plan.flavour} {plan.version}, none is installed"
    if plan.platform != PLATFORM:
        found["platform"] = f"was built for {plan.platform}, this is {PLATFORM}"
    found["compute capability"] = _device_obstacle(device) or capability_obstacle(
        plan.flavour, module, plan.compute_capabilities, capability_of(device)
    )
    return found


def capability_of(device: torch.device) -> str:
    """Give the compute capability of a GPU, as "8.6"."""
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def _openvino_obstacle(bundle: Bundle, backend: str) -> str | None:
    try:
        ov = import_extra("openvino", extra="openvino", purpose=backend)
        if backend == "openvino-bf16" and not has_bf16(ov):
            return "this processor has no BF16 products, as OpenVINO says: take openvino"
    except ImportError as err:
        return str(err)
    except Exception as err:  # noqa: BLE001 - whatever a broken installation raises
        return f"the installed openvino is broken: {err}"
    return None


def _onnxruntime_obstacle(bundle: Bundle, backend: str) -> str | None:
    kind = backend.removeprefix("onnxruntime-")
    try:
        ort = import_extra("onnxruntime", extra=kind, purpose=backend)
    except ImportError as err:
        return str(err)
    except Exception as err:  # noqa: BLE001 - whatever a broken installation raises
        return f"the installed onnxruntime is broken: {err}"
    if PROVIDERS[kind] not in ort.get_available_providers():
        return (
            f"the installed onnxruntime has no {PROVIDERS[kind]}: pip uninstall onnxruntime, "
            f"then {how_to_install(kind)}"
        )
    if kind == "cpu" and bundle.manifest.precision == "bf16":
        return "ONNX Runtime has no BF16 kernels for the CPU: export with --precision fp16 or fp32 to run there"
    return None
