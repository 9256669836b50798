"""Choose the backend that runs a bundle.

How `auto` decides. A *candidate* is a backend and a file of the bundle that it would run, a plan or the graph.

1. It goes through the candidates of BACKENDS, which are ordered from the best to the last resort.
2. It skips a candidate with an *obstacle*: a reason why the backend cannot run this file here.
3. It puts off a candidate with a *reservation*: a reason why the backend should not run this file. There are three:
   - its check missed a bound;
   - no check vouches for it, and the caller requires a certificate;
   - no check vouches for it, and the backend is *coarse*: it computes in less than the bundle's precision.
4. The first that opens runs the bundle. If none does, those that were put off are tried, but never a coarse one.
   If none of these opens either, BackendError has the reason of each.

A backend that is named runs in spite of a reservation, or raises its obstacle. `auto`, a named backend and
`trtower inspect` all read the same `candidates`. A tower that requires a certificate refuses, after the choice, what
has none (see tower/engine.py).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import PlanEntry
from trtower.errors import BackendError, one_line
from trtower.names import check_name
from trtower.runners import onnxruntime, openvino, tensorrt
from trtower.runners.base import Backend, EngineOptions, Runner
from trtower.runners.device import default_device, device_obstacle, parse_device

BACKENDS: tuple[Backend, ...] = (
    tensorrt.TENSORRT,
    tensorrt.TENSORRT_RTX,
    onnxruntime.CUDA,
    openvino.BF16,
    openvino.FP32,
    onnxruntime.CPU,
)
"""From the best to the last resort, by benchmarks/README.md. To add one, import its module and name it here."""

logger = logging.getLogger(__name__)


def find_backend(name: str) -> Backend:
    """Find a backend by its name; raise ConfigError, with those there are, if it is unknown."""
    check_name("backend", name, ("auto", *(each.name for each in BACKENDS)))
    return next(each for each in BACKENDS if each.name == name)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run a bundle: a backend, the file it would run, and what stands against it by the rule above."""

    backend: str
    file: str | None
    device: torch.device
    obstacle: str | None
    reservation: str | None = None
    coarse: bool = False
    plan: PlanEntry | None = None

    def open(self, bundle: Bundle, engine: EngineOptions) -> Runner:
        """Verify the files and load them; raise BackendError where the backend refuses."""
        if self.obstacle or self.file is None:
            raise BackendError(f"{self.backend} cannot run {bundle.path}: {self.obstacle}")
        return find_backend(self.backend).open(bundle, self.file, self.device, engine)


def choose(
    bundle: Bundle,
    backend: str = "auto",
    device: str | torch.device | None = None,
    *,
    certified: bool = False,
    engine: EngineOptions | None = None,
) -> Runner:
    """Open ``backend``, or with "auto" the best by the rule above. ``certified``: the caller requires a certificate.

    `device` limits the choice: with "cuda" nothing runs on the CPU, and the other way round. Raises BackendError
    with every reason when nothing that was asked for can run; a file that fails its sha256 always raises.
    """
    asked = parse_device(device)
    if asked and (obstacle := device_obstacle(asked)):
        raise BackendError(f"device {asked} was asked for: {obstacle}. Ask for device='cpu', or for none.")
    found = candidates(bundle, device, backend, certified=certified)
    if backend == "auto":
        order = order_for_auto(found)
    else:  # of several plans, those that are certified first, if that is asked for
        order = sorted(found, key=lambda each: certified and each.reservation is not None)
    tried: dict[Candidate, str] = {}
    for candidate in order:
        try:
            runner = candidate.open(bundle, engine or EngineOptions())
        except BackendError as err:
            tried[candidate] = candidate.obstacle or str(err)
            continue
        better = found[: found.index(candidate)]
        passed_over = _reasons([each for each in found if each in better or each in tried], tried)
        is_news = backend == "auto" and _is_news(candidate, better, asked, certified=certified)
        suffix = f"; passed over {passed_over}" if passed_over else ""
        logger.log(logging.WARNING if is_news else logging.INFO, "%s runs on %s%s", bundle.path, runner.name, suffix)
        return runner
    others = [] if backend == "auto" else [each.backend for each in candidates(bundle) if not each.obstacle]
    instead = f". Available on this machine: {', '.join(dict.fromkeys(others))}" if others else ""
    raise BackendError(f"no requested backend can run {bundle.path}: {_reasons(found, tried)}{instead}")


def _reasons(found: Sequence[Candidate], tried: Mapping[Candidate, str]) -> str:
    reasons = ((each.backend, tried.get(each, each.reservation)) for each in found)
    return "; ".join(f"{backend}: {reason}" for backend, reason in reasons if reason)


def _is_news(chosen: Candidate, better: Sequence[Candidate], asked: torch.device | None, *, certified: bool) -> bool:
    """Whether to warn of what `auto` chose: no plan though there is a GPU, or something better failed its check.

    To be coarse, or to lack the certificate that the caller requires, is no failure.
    """
    if torch.cuda.is_available() and not chosen.plan and (asked is None or asked.type == "cuda"):
        return True
    return not certified and any(each.reservation and not (each.obstacle or each.coarse) for each in better)


def order_for_auto(found: Sequence[Candidate]) -> list[Candidate]:
    """Return what `auto` tries, in its order: last what has a reservation, and of that nothing coarse."""
    reserved = [each for each in found if each.reservation and not each.obstacle]
    return [each for each in found if each not in reserved] + [each for each in reserved if not each.coarse]


def auto_choice(found: Sequence[Candidate]) -> Candidate | None:
    """Return the first that `auto` can open, as far as can be told without opening it; None where nothing runs."""
    return next((each for each in order_for_auto(found) if not each.obstacle), None)


def candidates(
    bundle: Bundle, device: str | torch.device | None = None, backend: str = "auto", *, certified: bool = False
) -> list[Candidate]:
    """List every way to run ``bundle`` on this machine, the best first, without loading any of it.

    `backend` limits the list to one backend.
    """
    asked = parse_device(device)
    wanted = BACKENDS if backend == "auto" else (find_backend(backend),)
    return [candidate for each in wanted for candidate in _candidates_of(each, bundle, asked, certified=certified)]


def _candidates_of(backend: Backend, bundle: Bundle, asked: torch.device | None, *, certified: bool) -> list[Candidate]:
    """List what one backend could run of a bundle."""
    device, without_device = _place(backend, asked)
    coarse = backend.is_coarse_for(bundle.manifest.precision)
    plans: dict[str | None, PlanEntry] = {plan.file: plan for plan in bundle.manifest.plans}
    files: Sequence[str | None] = backend.files(bundle) or (None,)
    return [
        Candidate(
            backend=backend.name,
            file=file,
            device=device,
            obstacle=(file and without_device) or _obstacle(backend, bundle, file, device),
            reservation=_reservation(backend, bundle, file, coarse=coarse, certified=certified),
            coarse=coarse,
            plan=plans.get(file),
        )
        for file in files
    ]


def _place(backend: Backend, asked: torch.device | None) -> tuple[torch.device, str | None]:
    """Return the device on which a backend would run, and why it cannot run there, if it is not here."""
    if asked and asked.type != backend.kind:
        return torch.device(backend.kind), f"device {asked} was asked for"
    # Asking torch for its current device makes a CUDA context, which a tower on the CPU has no use for.
    device = asked or default_device(backend.kind)
    return device, device_obstacle(device)


def _obstacle(backend: Backend, bundle: Bundle, file: str | None, device: torch.device) -> str | None:
    """Ask a backend what stands against it. A bundle has its graph; what else it may lack is a plan."""
    if file is None:
        return f"the bundle has no {backend.name} plan: trtower build {bundle.path} --flavour {backend.name}"
    try:
        return backend.obstacle(bundle, file, device)
    except ImportError as err:
        return str(err)
    except Exception as err:  # noqa: BLE001 - whatever a broken installation raises
        return f"the installed {backend.package} is broken: {one_line(err)}"


def _reservation(backend: Backend, bundle: Bundle, file: str | None, *, coarse: bool, certified: bool) -> str | None:
    """Read what the bundle's certificates, by their hashes in the manifest, say of a candidate."""
    certificate = bundle.find_certificate(backend.name, file)
    if certificate is not None and not bundle.changed_since(certificate):
        return None if certificate.passed else f"its check of {certificate.date} missed {', '.join(certificate.missed)}"
    if not coarse and not certified:
        return None
    why = ""
    if coarse:
        why = f"it computes in {backend.arithmetic.upper()}, which is coarser than {bundle.manifest.precision}, and "
    return f"{why}no check vouches for it: trtower check {bundle.path} --backend {backend.name}"
