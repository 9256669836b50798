"""Find a model's projector, and compare it with the one inside a bundle, before anything is changed.

The proof runs the model's own method from pixels to features once, with the eager tower and projector in place, and
compares what the projector returned with what the engine returns for the same pixels.

Shapes: B images, N tokens, D features per token (see spec.py).
"""

import json
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trtower.bundle.bundle import Bundle
from trtower.dtypes import DTYPES
from trtower.errors import ConfigError, one_line
from trtower.fingerprint import weights_sha256
from trtower.head import HeadSpec
from trtower.installation.compare import SAME_TOWER, SAME_TOWER_8_BIT, relative_error
from trtower.installation.find import Slot, called_by_peft
from trtower.installation.match import check_replaceable, ways_out
from trtower.installation.reach import run_ways
from trtower.spec import EIGHT_BIT
from trtower.tower.vision_tower import VisionTower

logger = logging.getLogger(__name__)

DIVIDES = 1e-2
"""Relative error within which the model's features are its projector's output divided by a number: BF16 rounds."""


def find_projector(model: nn.Module, head: HeadSpec) -> Slot:
    """Find the module that a model keeps under the head's name; raise ConfigError if there is none, or several.

    Of the copies that PEFT keeps, it is the one that runs.
    """
    holders = [(name, module) for name, module in model.named_modules() if head.attribute in module._modules]
    found = [_inside(module, head.attribute) for _, module in holders]
    if len({id(container[key]) for container, key in found}) != 1:
        number = "several" if holders else "no"
        raise ConfigError(
            f"{type(model).__name__} has {number} {head.attribute}, which the {head.describe()} of this bundle would "
            "replace: export the model's own checkpoint, or export without --head."
        )
    return Slot(
        module=found[0][0][found[0][1]],
        paths=[".".join(filter(None, (name, head.attribute))) for name, _ in holders],
        slots=found,
        holder=holders[0][1],
    )


def _inside(holder: nn.Module, attribute: str) -> tuple[Any, Any]:
    """Return the container and key of the module that runs, inside a wrapper of PEFT if there is one."""
    container, key = holder._modules, attribute
    while (called := called_by_peft(container[key])) is not None:
        container, key, *_ = called
    return container, key


def find_replaceable(model: nn.Module, bundle: Bundle, *, dropped: bool, compared: bool) -> Slot | None:
    """Find the projector that a bundle replaces; None if it replaces none.

    Raises ConfigError if there is none to find, it cannot be replaced or its weights ``dropped``, or if ``compared``
    and it is not the one that the bundle was made of.
    """
    if bundle.manifest.spec.head is None:
        return None
    place = find_projector(model, bundle.manifest.spec.head)
    check_replaceable(model, place, dropped=dropped)
    if compared:
        check_settings(place, model, bundle)
        check_projector(place, model, bundle)
    return place


def check_settings(place: Slot, model: nn.Module, bundle: Bundle) -> None:
    """Raise ConfigError if a config of the model says that its projector computes otherwise than the bundle's."""
    head = bundle.manifest.spec.head
    assert head is not None  # noqa: S101 - only bundles with a head come here
    configs = [config for each in (place.holder, model) if (config := getattr(each, "config", None)) is not None]
    for name, expected in head.settings.items():
        value = next((value for config in configs if (value := getattr(config, name, None)) is not None), None)
        if value is not None and json.dumps(value) != expected:
            raise ConfigError(
                f"{bundle.path} was made of a projector with {name}={expected}; {place.path} of this model has "
                f"{json.dumps(value)}. {ways_out(model, place, bundle)[0]}"
            )


def check_projector(place: Slot, model: nn.Module, bundle: Bundle) -> None:
    """Raise ConfigError unless the projector has the weights that the bundle was exported from."""
    source, parameters = bundle.manifest.source, list(place.module.parameters())
    held = {parameter.dtype for parameter in parameters}
    name = next((name for name, dtype in DTYPES.items() if held == {dtype}), None)
    if parameters and name is None:
        dtypes = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in held))
        raise ConfigError(
            f"{place.path} of this model holds weights in {dtypes}, so it is at least partly quantised or converted, "
            f"and {bundle.path} was not made of it: export without --head to keep the model's own."
        )
    expected = source.head_sha256.get(name or "")
    if expected != (weights_sha256(parameters, DTYPES[name]) if name else None):
        _, own = ways_out(model, place, bundle)
        raise ConfigError(
            f"{place.path} of this model has other weights than the one inside {bundle.path}, which was made of "
            f"{source.checkpoint}. {own}"
        )


@dataclass(frozen=True, kw_only=True)
class Projected:
    """What a model's own code did with one image.

    Attributes:
        given: The shape of what its projector got.
        row: The shape of what that returned.
    """

    given: tuple[int, ...]
    row: tuple[int, ...]


@torch.no_grad()
def check_projection(
    model: nn.Module, tower: Slot, projector: Slot, compiled: VisionTower, *, compared: bool
) -> Projected:
    """Run the model from pixels to features; raise ConfigError if the engine's features differ from its projector's.

    Also raises it if the model's code cannot be run on an image, or divides the features by another number.
    """
    seen: dict[str, Any] = {}

    def see_pixels(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["pixels"] = kwargs.get("pixel_values", args[0] if args else None)

    def see_features(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen["given"], seen["features"] = args[0], output

    hooks = [
        tower.module.register_forward_pre_hook(see_pixels, with_kwargs=True),
        projector.module.register_forward_hook(see_features),
    ]
    try:
        found = next((result for result, _ in run_ways(model, tower) if "features" in seen), None)
    finally:
        for hook in hooks:
            hook.remove()
    pixels, features = seen.get("pixels"), seen.get("features")
    if not isinstance(features, Tensor) or not isinstance(pixels, Tensor):
        raise ConfigError(
            f"could not run {type(model).__name__} from an image to the output of {projector.path}, so nothing proves "
            f"that {compiled.bundle.path} computes the same: export without --head, which replaces only the tower."
        )
    _check_divisor(compiled.bundle, projector, _divisor(found, features))
    head = compiled.spec.head
    assert head is not None  # noqa: S101 - only bundles with a head come here
    for_engine = tower.for_engine(pixels)
    if features.numel() != len(for_engine) * head.width * (head.tokens or 1):
        raise ConfigError(
            f"{projector.path} of this model returns {tuple(features.shape[1:])} for an image; {compiled.bundle.path} "
            f"ends with the {head.describe()}: export the model's own checkpoint."
        )
    if compared:
        _compare(compiled, for_engine, features / head.divisor, projector)
    return Projected(given=tuple(seen["given"].shape[1:]), row=tuple(features.shape[1:]))


@torch.no_grad()
def check_served(model: nn.Module, tower: Slot, projector: nn.Module) -> None:
    """Run the model once more, with stand-ins for both; raise ConfigError if it does not get to the features."""
    reached: list[bool] = []
    hook = projector.register_forward_hook(lambda *_: reached.append(True))
    why = ""
    try:
        for _, failure in run_ways(model, tower):
            if reached:
                return
            why = why or (f": {one_line(failure).rstrip('.')}" if failure else "")
    finally:
        hook.remove()
    raise ConfigError(
        f"{type(model).__name__} does not get from an image to its features with the bundle installed{why}. Export it "
        "without --head, which replaces only the tower."
    )


def _divisor(found: Any, features: Tensor) -> float:
    """Return what a model's code divided its projector's output by; 1 if it did more than that, such as packing."""
    found = getattr(found, "pooler_output", found)
    if not isinstance(found, Tensor) or found.numel() != features.numel():
        return 1.0
    final, projected = found.flatten().double(), features.flatten().double()
    ratio = float((projected @ projected) / (projected @ final))
    is_ratio = math.isfinite(ratio) and float((final * ratio - projected).norm() / projected.norm()) <= DIVIDES
    return ratio if is_ratio else 1.0


def _check_divisor(bundle: Bundle, projector: Slot, divisor: float) -> None:
    head = bundle.manifest.spec.head
    assert head is not None  # noqa: S101 - only bundles with a head come here
    held = head.divisor
    if not math.isclose(held, divisor, rel_tol=DIVIDES):
        by = ["does not divide" if each <= 1 + DIVIDES else f"divides by {each:.6g}" for each in (divisor, held)]
        raise ConfigError(
            f"the code of this model {by[0]} what {projector.path} returns, but {bundle.path} was exported with a "
            f"transformers that {by[1]}: export it again with the release that serves it."
        )


def _compare(compiled: VisionTower, pixels: Tensor, expected: Tensor, projector: Slot) -> None:
    """Compare the engine's features of these pixels with the projector's, image by image."""
    least = compiled.bundle.manifest.batch.min
    repeated = pixels.repeat(-(-least // len(pixels)), 1, 1, 1) if len(pixels) < least else pixels
    found = compiled.read_tokens(repeated)[: len(pixels)].float()
    expected = expected.reshape(found.shape).float().to(found.device)
    if not expected.isfinite().all():
        logger.warning(
            "%s of this model returns NaN or infinity, so it was not compared with the bundle.", projector.path
        )
        return
    error = relative_error(found, expected)
    limit = SAME_TOWER_8_BIT if compiled.bundle.manifest.precision in EIGHT_BIT else SAME_TOWER
    if not error <= limit:  # catches NaN too
        raise ConfigError(
            f"{projector.path} of this model and {compiled.bundle.path} differ on the same image: the features are off "
            f"by {error:.0%}, expected at most {limit:.0%}. Was the model's code changed, or were its weights swapped?"
        )
