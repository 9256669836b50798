"""Choose the backend that runs a bundle.

How `auto` decides. A *candidate* is a backend plus the file of the bundle that it would run: a plan or the graph.

1. Go through the candidates from the best to the last resort: in the order of BACKENDS, and among those that run the
   graph on the same kind of device in the order that `trtower tune` measured on it (see fastest.py).
2. Skip a candidate with an *obstacle*: a reason why the backend cannot run this file here.
3. Postpone a candidate with a *reservation*: a reason why the backend should not run this file. There are three:
   - its check missed a bound;
   - it has no valid certificate, and the caller requires one;
   - it has no valid certificate of a check, and the backend is *coarse*: it may compute in less than the bundle's
     precision. A verification is not enough, because only a check compares the error with PyTorch's own.
4. The first candidate that opens runs the bundle. If none does, try the postponed ones, except those that are coarse.
   If these fail too, raise a BackendError that gives the reason of each.

A backend that the user names runs in spite of a reservation, and raises an error if it has an obstacle. `auto`, a named
backend and `trtower inspect` all read the same `candidates`. A tower that requires a certificate makes sure of it after
the choice (see tower/engine.py).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch

from trtower.bundle.bundle import Bundle
from trtower.bundle.certificate import CHECK
from trtower.bundle.manifest import PlanEntry
from trtower.bundle.suggest import proof_command
from trtower.bundle.tuning import KINDS
from trtower.errors import BackendError, one_line
from trtower.names import check_name
from trtower.runners import onnxruntime, openvino, tensorrt
from trtower.runners import torch as pytorch
from trtower.runners.base import Backend, EngineOptions, Runner
from trtower.runners.device import default_device, device_obstacle, has_gpu, parse_device
from trtower.runners.fastest import KnownTuning, fastest_first, kinds_to_order, known_tunings

BACKENDS: tuple[Backend, ...] = (
    tensorrt.TENSORRT,
    tensorrt.TENSORRT_RTX,
    pytorch.CUDA,
    onnxruntime.CUDA,
    openvino.INT8,
    openvino.BF16,
    pytorch.BF16,
    openvino.FP32,
    onnxruntime.CPU,
    pytorch.CPU,
)
"""From the best to the last resort, by benchmarks/README.md. `torch-cuda` itself was not measured: it stands where
captured and compiled PyTorch stood on an H200. To add one, import its module and list it here."""

logger = logging.getLogger(__name__)


def backend_names() -> tuple[str, ...]:
    """List what a user may request: auto, every backend, and the common name of those that differ in the device."""
    return tuple(dict.fromkeys(("auto", *(name for each in BACKENDS for name in (each.common_name, each.name)))))


def find_backends(name: str) -> tuple[Backend, ...]:
    """Find what a name stands for, best first; raise ConfigError, which lists the choices, if it is unknown."""
    check_name("backend", name, backend_names())
    return tuple(each for each in BACKENDS if name in ("auto", each.name, each.common_name))


def find_backend(name: str) -> Backend:
    """Find a backend by its own name."""
    return next(each for each in BACKENDS if each.name == name)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run a bundle: a backend, the file it would run, and its obstacle or reservation (see above)."""

    backend: str
    file: str | None
    device: torch.device
    find_obstacle: Callable[[], str | None] = field(compare=False, repr=False)
    reservation: str | None = None
    coarse: bool = False
    plan: PlanEntry | None = None

    @cached_property
    def obstacle(self) -> str | None:
        """Why the backend cannot run the file; None if it can. The first reading may import the backend's package."""
        return self.find_obstacle()

    def open(self, bundle: Bundle, engine: EngineOptions) -> Runner:
        """Verify the files and load them; raise BackendError if the backend cannot run them."""
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
    """Open ``backend``, or with "auto" the best one by the rules at the top of this module.

    A common name such as "torch" chooses in the same way, among the backends that it stands for.
    ``device`` limits the choice: "cuda" excludes backends on the CPU, and "cpu" those on the GPU. ``certified`` means
    that the caller requires a certificate. Raises BackendError with every reason if no requested backend can run the
    bundle. A file that fails its sha256 always raises BundleError, whatever else could run.
    """
    requested = parse_device(device)
    if requested and (obstacle := device_obstacle(requested)):
        raise BackendError(f"cannot use device {requested}: {obstacle}. Pass device='cpu', or leave device out.")
    listed = candidates(bundle, device, backend, certified=certified)
    several = len(find_backends(backend)) > 1
    if several:
        order = order_for_auto(listed)
    else:  # if the caller requires a certificate, try certified plans before others
        order = sorted(listed, key=lambda each: certified and each.reservation is not None)
    tried: dict[Candidate, str] = {}
    for candidate in order:
        try:
            runner = candidate.open(bundle, engine or EngineOptions())
        except BackendError as err:
            tried[candidate] = candidate.obstacle or str(err)
            continue
        better = listed[: listed.index(candidate)]
        passed_over = _reasons([each for each in listed if each in better or each in tried], tried)
        ordered = candidate.device.type in kinds_to_order(find_backends(backend), requested)
        tuned, ignored = _describe_tuning(bundle, candidate, requested) if ordered else ("", False)
        warns = several and (ignored or _deserves_warning(candidate, better, requested, certified=certified))
        suffix = f"{tuned}; passed over {passed_over}" if passed_over else tuned
        logger.log(logging.WARNING if warns else logging.INFO, "%s runs on %s%s", bundle.path, runner.name, suffix)
        if engine and engine.compile and not find_backend(candidate.backend).compiles:
            compiling = ", ".join(each.name for each in BACKENDS if each.compiles)
            logger.warning("compile=True does nothing on %s: name a backend that compiles, %s", runner.name, compiling)
        return runner
    # First what an extra would mend, then what this machine or this bundle lacks.
    listed.sort(key=lambda each: each.file is None or device_obstacle(each.device) is not None)
    available = [] if backend == "auto" else [each.backend for each in candidates(bundle) if not each.obstacle]
    instead = f". Available on this machine: {', '.join(dict.fromkeys(available))}" if available else ""
    raise BackendError(f"no requested backend can run {bundle.path}: {_reasons(listed, tried)}{instead}")


def _reasons(listed: Sequence[Candidate], tried: Mapping[Candidate, str]) -> str:
    """Say why each candidate did not run; those that share a reason share its line."""
    backends: dict[str, list[str]] = {}
    for each in listed:
        if reason := tried.get(each, each.reservation):
            backends.setdefault(reason, []).append(each.backend)
    return "; ".join(f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in backends.items())


def _describe_tuning(bundle: Bundle, chosen: Candidate, requested: torch.device | None) -> tuple[str, bool]:
    """Say that the choice followed a tuning, or that it ignored those there are, and return whether it did."""
    of_kind = known_tunings(bundle, BACKENDS, (chosen.device.type,), requested)
    if chosen.plan or not of_kind:
        return "", False
    for each in of_kind:
        if not each.ignored:
            timed = chosen.backend in {timed.backend for timed in each.tuning.backends}
            return (f", by the tuning of {each.tuning.date}" if timed else ""), False
    ignored = "; ".join(
        f"ignored the tuning of {each.tuning.date} on {each.tuning.device}, because {each.ignored}" for each in of_kind
    )
    return f"; {ignored}: trtower tune {bundle.path}", True


def tunings_here(bundle: Bundle) -> list[KnownTuning]:
    """List a bundle's tunings, and which of them `auto` follows here."""
    return known_tunings(bundle, BACKENDS, KINDS, None)


def _deserves_warning(
    chosen: Candidate, better: Sequence[Candidate], requested: torch.device | None, *, certified: bool
) -> bool:
    """Return whether `auto`'s choice deserves a warning: no plan despite a GPU, or a better one failed its check.

    Coarse candidates never count as better. If the caller requires a certificate, no candidate does, because its
    reservation may only mean that it has none.
    """
    if has_gpu() and not chosen.plan and (requested is None or requested.type == "cuda"):
        return True
    return not certified and any(each.reservation and not (each.obstacle or each.coarse) for each in better)


def order_for_auto(listed: Sequence[Candidate]) -> list[Candidate]:
    """Return what `auto` tries, in order. Those with a reservation come last, and coarse ones among them not at all."""
    reserved = [each for each in listed if each.reservation and not each.obstacle]
    return [each for each in listed if each not in reserved] + [each for each in reserved if not each.coarse]


def auto_choice(listed: Sequence[Candidate]) -> Candidate | None:
    """Return the candidate that `auto` would open, as far as is known without opening it; None if nothing runs."""
    return next((each for each in order_for_auto(listed) if not each.obstacle), None)


def candidates(
    bundle: Bundle, device: str | torch.device | None = None, backend: str = "auto", *, certified: bool = False
) -> list[Candidate]:
    """List every way to run ``bundle`` on this machine, best first, without loading any of it.

    A ``backend`` other than "auto" limits the list to what it stands for.
    """
    requested, found = parse_device(device), find_backends(backend)
    known = known_tunings(bundle, BACKENDS, kinds_to_order(found, requested), requested)
    return [
        candidate
        for each in fastest_first(found, known)
        for candidate in _candidates_of(each, bundle, requested, certified=certified)
    ]


def _candidates_of(
    backend: Backend, bundle: Bundle, requested: torch.device | None, *, certified: bool
) -> list[Candidate]:
    """List what one backend could run of a bundle."""
    device, without_device = _find_device(backend, requested)
    coarse = backend.why_coarse(bundle.manifest.precision)
    plans: dict[str | None, PlanEntry] = {plan.file: plan for plan in bundle.manifest.plans}
    files: Sequence[str | None] = backend.files(bundle) or (None,)
    return [
        Candidate(
            backend=backend.name,
            file=file,
            device=device,
            find_obstacle=partial(_find_obstacle, backend, bundle, file, device, without_device),
            reservation=_reservation(backend, bundle, file, coarse=coarse, certified=certified),
            coarse=coarse is not None,
            plan=plans.get(file),
        )
        for file in files
    ]


def _find_device(backend: Backend, requested: torch.device | None) -> tuple[torch.device, str | None]:
    """Return the device that a backend would run on, and why it cannot use it; None if it can."""
    if requested and requested.type != backend.kind:
        return torch.device(backend.kind), f"device {requested} was requested"
    # Asking torch for its current device creates a CUDA context, which a tower on the CPU does not need.
    device = requested or default_device(backend.kind)
    return device, device_obstacle(device)


def _find_obstacle(
    backend: Backend, bundle: Bundle, file: str | None, device: torch.device, without_device: str | None
) -> str | None:
    """Ask a backend for its obstacle. ``file`` is None if the bundle lacks a plan for it; every bundle has a graph."""
    if file and without_device:
        return without_device
    try:
        return backend.lacks(bundle) if file is None else backend.obstacle(bundle, file, device)
    except ImportError as err:
        return str(err)
    except Exception as err:  # noqa: BLE001 - a broken installation may raise anything
        return f"the installed {backend.package} is broken: {one_line(err)}"


def _reservation(
    backend: Backend, bundle: Bundle, file: str | None, *, coarse: str | None, certified: bool
) -> str | None:
    """Return a candidate's reservation, by the bundle's certificates and the hashes in its manifest."""
    certificate = bundle.find_certificate(backend.name, file)
    if certificate and not certificate.passed and not bundle.changed_since(certificate):
        return f"its {certificate.proof} of {certificate.date} missed {', '.join(certificate.missed)}"
    if coarse:
        certificate = bundle.find_certificate(backend.name, file, CHECK)
    if (certificate and not bundle.changed_since(certificate)) or not (coarse or certified):
        return None
    if not coarse:
        return f"it has no valid certificate: {proof_command(bundle, backend.name)}"
    command = f"trtower check {bundle.path} --backend {backend.name}"
    return f"{coarse}, and the bundle has no valid certificate of a check on it: {command}"
