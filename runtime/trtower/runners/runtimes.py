"""Which installed TensorRT runs a plan, or why none does."""

from collections.abc import Sequence
from types import ModuleType

import torch

from trtower.bundle.manifest import GRAPH, PARSES_PLAIN, PlanEntry
from trtower.errors import BackendError, MissingExtraError
from trtower.flavour import LEAN, PLATFORM, capability_obstacle, is_before, load_flavour, load_lean
from trtower.runners.device import JETSON, capability_of, device_obstacle

FIRST_LEAN = "10.15"
"""The first version of the lean runtime on PyPI. TensorRT on a Jetson comes with JetPack, not from PyPI."""


def load_runtime(plan: PlanEntry) -> ModuleType:
    """Import the TensorRT that built a plan, full or lean; raise BackendError if it is not installed."""
    installed, missing = _find_runtimes(plan)
    module = _choose_runtime(plan, installed)
    if module is None:
        raise BackendError(f"{plan.file} {_version_obstacle(plan, installed, missing)}")
    return module


def product_name(module: ModuleType, plan: PlanEntry) -> str:
    """Name the product that a module is: "tensorrt-lean", or the flavour of ``plan``."""
    return "tensorrt-lean" if module.__name__ == LEAN else plan.flavour


def plan_verdicts(plan: PlanEntry, device: torch.device) -> dict[str, str | None]:
    """Return each requirement of a plan with what this machine lacks, or None if it is met. Deserialises nothing."""
    verdicts: dict[str, str | None] = dict.fromkeys(("flavour", "version", "platform", "compute capability"))
    installed, missing = _find_runtimes(plan)
    module = _choose_runtime(plan, installed)
    if not installed:
        verdicts["flavour"] = "; ".join(map(str, missing)) + _lean_remark(plan)
    if module is None:
        verdicts["version"] = _version_obstacle(plan, installed, missing)
    if plan.platform != PLATFORM:
        verdicts["platform"] = f"was built for {plan.platform}, but this machine is {PLATFORM}"
    verdicts["compute capability"] = device_obstacle(device) or capability_obstacle(
        plan.flavour, module or next(iter(installed), None), plan.compute_capabilities, capability_of(device)
    )
    return verdicts


def parse_obstacle(first: str, flavour: str, version: str) -> str | None:
    """Say why a version of TensorRT cannot build a graph that needs ``first``; None if it can, or is TensorRT-RTX."""
    if flavour != "tensorrt" or not is_before(version, first):
        return None
    reason = f"TensorRT {version} cannot build {GRAPH}, which needs {first} or later"
    if not is_before(PARSES_PLAIN, first):
        return reason
    return f"{reason}: export the bundle again with this trtower, whose graphs need {PARSES_PLAIN} or later"


def _find_runtimes(plan: PlanEntry) -> tuple[list[ModuleType], list[Exception]]:
    """Import the modules that may load a plan, the full TensorRT first; also return why others cannot."""
    found: list[ModuleType] = []
    missing: list[Exception] = []
    for load in (lambda: load_flavour(plan.flavour), *((load_lean,) if plan.settings.version_compatible else ())):
        try:
            found.append(load())
        except ImportError as err:  # not installed, or installed and broken
            missing.append(err)
    return found, missing


def _choose_runtime(plan: PlanEntry, installed: Sequence[ModuleType]) -> ModuleType | None:
    """Return the first module of the version that built a plan."""
    return next((module for module in installed if module.__version__ == plan.version), None)


def _version_obstacle(plan: PlanEntry, installed: Sequence[ModuleType], missing: Sequence[Exception]) -> str:
    """Say that no installed TensorRT has the version of a plan."""
    if not installed:
        is_broken = not all(isinstance(err, MissingExtraError) for err in missing)
        lacking = "the installed one is broken" if is_broken else "none is installed"
        return f"was built by {plan.flavour} {plan.version}, but {lacking}"
    others = " and ".join(f"{product_name(module, plan)} {module.__version__}" for module in installed)
    return f"was built by {plan.flavour} {plan.version}, but this machine has {others}: {_remedy(plan, installed)}"


def _remedy(plan: PlanEntry, installed: Sequence[ModuleType]) -> str:
    """Say how to get a plan and a TensorRT of the same version."""
    lean = plan.settings.version_compatible and not is_before(plan.version, FIRST_LEAN)
    package = "tensorrt-lean" if lean else plan.flavour
    remedies = [] if JETSON.exists() and plan.flavour == "tensorrt" else [f"pip install {package}=={plan.version}"]
    remedies += ["run trtower build here"] if any(module.__name__ != LEAN for module in installed) else []
    return ", or ".join(remedies) or "run trtower build where the whole TensorRT is"


def _lean_remark(plan: PlanEntry) -> str:
    """Say why an installed lean runtime is no help for a plan; "" if there is none."""
    if plan.flavour != "tensorrt" or plan.settings.version_compatible:
        return ""
    try:
        load_lean()
    except ImportError:
        return ""
    return "; the installed tensorrt-lean runs only plans that were built with --version-compatible"
