"""Prove that the model's own code calls the tower that a bundle will replace, before anything is changed.

A model can hold a tower and never call it: PEFT keeps the copy that it does not train, and model code may bypass
`forward` and call the layers. The proof runs the model's methods from pixels to features until one calls the tower.

Shapes: S pixels per side.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from trtower.dtypes import DTYPES
from trtower.errors import ConfigError
from trtower.installation.find import Slot, find_towers
from trtower.installation.prismatic import is_prismatic

logger = logging.getLogger(__name__)

WAYS = (
    *("get_image_features", "get_video_features", "encode_images", "embed_image", "extract_feature"),
    "_process_vision_features",  # of OpenVLA-OFT
)
"""Methods that turn pixels into features, in transformers, in LLaVA, VILA and their forks, and in robot policies."""

PIXELS = ("pixel_values", "pixel_values_videos", "images", "image")
"""What these methods call the pixels."""


class _Called(BaseException):
    """The tower was called."""


@torch.no_grad()
def check_reached(model: nn.Module, place: Slot, *, named: bool) -> None:
    """Raise ConfigError if the model turns pixels into features without calling the tower at ``place``.

    Only warn if no such method was found or could be run on pixels, if the caller ``named`` the tower, or if the model
    has several.
    """
    bypassed = None
    with _stopping(place.module):
        for name, way in _ways(model, place):
            for arguments in _arguments(way, model, place):
                try:
                    features = way(**arguments)
                except _Called:
                    return
                except Exception as err:  # noqa: BLE001 - model code that needs other inputs may raise anything
                    logger.debug("%s could not be run: %r", name, err)
                else:
                    bypassed = bypassed if features is None else name
    if bypassed and not named and len(find_towers(model)) == 1:
        raise ConfigError(
            f"{type(model).__name__}.{bypassed} runs without calling {place.path}, so a bundle there would never run. "
            "Does the model's code call another module, or the tower's layers one by one? Install it nevertheless with "
            f"tower={place.path!r}."
        )
    logger.warning(
        "%s: could not prove that it calls %s: none of its methods that turn pixels into features called it. Set "
        "installation.tower.on_batch, and verify that the first image calls it.", type(model).__name__, place.path
    )  # fmt: skip


def run_ways(model: nn.Module, place: Slot) -> Iterator[tuple[Any, Exception | None]]:
    """Run the model's methods from an image to features, each with every input to try; yield what each returned.

    Or None and what it raised, which may be after it has reached the tower.
    """
    for name, way in _ways(model, place):
        for arguments in _arguments(way, model, place):
            result, failure = None, None
            try:
                result = way(**arguments)
            except Exception as err:  # noqa: BLE001 - model code that needs other inputs may raise anything
                logger.debug("%s could not be run: %r", name, err)
                failure = err
            yield result, failure


@contextmanager
def _stopping(tower: nn.Module) -> Iterator[None]:
    """Make every call of a tower, by `__call__` or by `forward`, raise _Called before its hooks and code run."""

    def stop(*_: Any, **__: Any) -> None:
        raise _Called

    hook = tower.register_forward_pre_hook(stop, prepend=True)
    before = vars(tower).get("forward")
    vars(tower)["forward"] = stop
    try:
        yield
    finally:
        hook.remove()
        del vars(tower)["forward"]
        if before is not None:
            vars(tower)["forward"] = before


def modules_around(model: nn.Module, place: Slot) -> list[nn.Module]:
    """List the modules that hold the tower, outermost first."""
    around = [model]
    for part in place.path.split(".")[:-1]:
        inner = getattr(around[-1], part, None)  # items of lists, and get_vision_tower(), are not attributes
        if not isinstance(inner, nn.Module):
            break
        around.append(inner)
    return around


def methods_around(model: nn.Module, place: Slot) -> Iterator[tuple[nn.Module, str, str]]:
    """List the methods that may call the tower, as module, name and path; outermost first."""
    parts = place.path.split(".")
    for depth, module in enumerate(modules_around(model, place)):
        for method in WAYS:
            if callable(_attribute(module, method)):
                yield module, method, ".".join([*parts[:depth], method])


def _ways(model: nn.Module, place: Slot) -> Iterator[tuple[str, Callable[..., Any]]]:
    """List what may call the tower: methods of the modules around it, outermost first, then its holder."""
    for module, method, path in methods_around(model, place):
        yield path, getattr(module, method)
    parts = place.path.split(".")
    if place.holder is not model and next(iter(_parameters(place.holder.forward)), None) in PIXELS:
        yield ".".join([*parts[:-1], "forward"]), place.holder.forward
    if is_prismatic(place.module) and isinstance(getattr(model, "language_model", None), nn.Module):
        yield "forward", functools.partial(_forward_to_language, model)


def _forward_to_language(model: Any, pixel_values: Tensor) -> None:
    """Run a model on an image and two words, up to its language model: OpenVLA has no method for the image alone."""
    device = pixel_values.device
    hook = model.language_model.register_forward_pre_hook(_stop)
    try:
        with suppress(_Enough):
            model.forward(input_ids=torch.ones(1, 2, dtype=torch.int64, device=device), pixel_values=pixel_values)
    finally:
        hook.remove()


class _Enough(Exception):  # noqa: N818 - it is no error
    """The image's features have reached the language model."""


def _stop(*_: Any) -> None:
    raise _Enough


def _attribute(module: nn.Module, name: str) -> Any:
    try:
        return getattr(module, name, None)
    except Exception:  # noqa: BLE001 - a property of model code may raise anything
        return None


def _parameters(way: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(way).parameters
    except (TypeError, ValueError):  # not written in Python
        return {}


def _arguments(way: Callable[..., Any], model: nn.Module, place: Slot) -> Iterator[dict[str, Any]]:
    """List the inputs to try: an image as (1, 3, S, S), then as a tile (1, 1, 3, S, S), with its size if accepted.

    Both in the tower's dtype, then in the model's other ones: LLaVA rounds what a tower returns to the dtype of its
    images, which need not be the tower's.
    """
    parameters = _parameters(way)
    name = next((name for name in PIXELS if name in parameters), None)
    if name is None:
        return
    side: Any = place.vision.config.image_size
    shape = (3, side, side) if isinstance(side, int) else (3, *side)
    first = next(place.module.parameters())
    sizes = {"image_sizes": torch.tensor([shape[1:]], device=first.device)}
    others = sizes if "image_sizes" in parameters else {}
    held = {parameter.dtype for parameter in model.parameters()}
    for dtype in (first.dtype, *(each for each in DTYPES.values() if each in held - {first.dtype})):
        image = place.for_tower(torch.ones(1, *shape, dtype=dtype, device=first.device))
        yield {name: image, **others}
        yield {name: image[None], **others}
