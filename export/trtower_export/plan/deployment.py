"""Choose an export's plan: for the target that is named, or else as `trtower build` does."""

from dataclasses import replace

import torch

from trtower.bundle.manifest import BUILD_NOTES, PARSES_PLAIN
from trtower.errors import ConfigError
from trtower.flavour import FLAVOURS, PLATFORM, is_before
from trtower.names import check_name, list_choices
from trtower.runners.device import capability_of
from trtower.spec import PRECISIONS
from trtower_export.console import Progress
from trtower_export.options import ExportOptions
from trtower_export.plan.choice import PlanChoice, check_builder, choose_plan, load_builder, read_capabilities
from trtower_export.targets import Target, find_target
from trtower_export.targets.faults import check_faults


def choose_first_plan(options: ExportOptions) -> tuple[Target | None, PlanChoice | None, str]:
    """Return the target of an export, its plan and why it is this one; the first two are None if there is none.

    A target's plan is built here only if this machine can: data-centre TensorRT has to be that of the target, and on
    its GPU. Compute capabilities in ``options`` limit a target to these GPUs. Raises the errors of `choose_plan`.
    """
    flavour, precision = options.flavour, options.graph_precision
    if options.target is None:
        return None, *choose_plan(flavour, options.compute_capabilities, precision)
    target = _limit(find_target(options.target), read_capabilities(options.compute_capabilities))
    _check_flavour(target, flavour)
    _check_precision(target, precision)
    if flavour == "none":
        return target, None, f"no plan (--flavour none); {BUILD_NOTES} in the bundle says how to build it"
    if not (obstacle := _obstacle(target)):
        gpus = target.compute_capabilities if target.flavour == "tensorrt-rtx" else ()
        return target, *choose_plan(target.flavour, gpus, precision)
    if flavour == "auto":
        reason = f"no plan for {target.name} here, because {obstacle}; {BUILD_NOTES} in the bundle says how to build it"
        return target, None, reason
    raise ConfigError(
        f"no plan for {target.name} can be built here, because {obstacle}: export with --flavour none, and build it "
        f"there as {BUILD_NOTES} in the bundle says."
    )


def check_first_plan(
    target: Target | None, choice: PlanChoice | None, family: str, options: ExportOptions, progress: Progress
) -> None:
    """Check the TensorRT that builds an export's plan: the one here, or that of the target, if it is built there.

    Raises ConfigError if it cannot parse the graph, or has a known fault that ``options`` do not accept.
    """
    facts = (family, options.graph_precision, options.accept_known_faults)
    if choice:
        check_builder(choice, PARSES_PLAIN, *facts, progress)
    elif target:
        check_faults(*target.where, *facts, progress.say)


def _limit(target: Target, capabilities: tuple[str, ...]) -> Target:
    """Limit a target to some of its GPUs, if any are named; raise ConfigError if it does not have them."""
    own = target.compute_capabilities
    if others := [each for each in capabilities if own and each not in own]:
        raise ConfigError(
            f"--target {target.name} has compute capability {list_choices(own)}, not {list_choices(others)}: drop "
            "--compute-capability or --target."
        )
    return replace(target, compute_capabilities=capabilities or own)


def _check_flavour(target: Target, flavour: str) -> None:
    """Refuse a TensorRT that is too old for every graph, and a flavour that is not the target's."""
    check_name("flavour", flavour, ("auto", "none", *FLAVOURS))
    if target.tensorrt and is_before(target.tensorrt, PARSES_PLAIN):
        raise ConfigError(
            f"{target.name} has TensorRT {target.tensorrt}, and trtower's graphs need {PARSES_PLAIN} or later: update "
            "it, or export without --target and serve without a plan."
        )
    if flavour not in ("auto", "none", target.flavour):
        raise ConfigError(
            f"a plan for {target.name} is one of {target.flavour}, not of {flavour}: drop --flavour or --target."
        )


def _check_precision(target: Target, precision: str) -> None:
    """Refuse a precision that a GPU of ``target`` lacks."""
    needed = PRECISIONS[precision].first_capability
    lacking = [each for each in target.compute_capabilities if float(each) < needed]
    if lacking:
        able = [each for each in target.compute_capabilities if each not in lacking]
        instead = f"for {able[0]} only, add --compute-capability {able[0]}" if able else "export with --precision fp16"
        raise ConfigError(
            f"{precision} needs compute capability {needed} or later, and {target.name} has {list_choices(lacking)}: "
            f"{instead}."
        )


def _obstacle(target: Target) -> str | None:
    """Say why a target's plan cannot be built on this machine; None if it can."""
    if target.platform not in ("", PLATFORM):
        return f"it is {target.platform} and this machine is {PLATFORM}"
    if target.flavour == "tensorrt":
        if not torch.cuda.is_available():
            return "torch finds no GPU"
        if target.compute_capabilities and (here := capability_of()) not in target.compute_capabilities:
            return f"this GPU has compute capability {here}"
    try:
        version: str = load_builder(target.flavour).__version__
    except ImportError as err:  # not installed, or installed and broken
        return str(err)
    if target.tensorrt and (is_before(version, target.tensorrt) or is_before(target.tensorrt, version)):
        return f"it has TensorRT {target.tensorrt} and this machine {version}"
    return None
