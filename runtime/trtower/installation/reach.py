"""Prove that a model's own code calls the tower whose place a bundle is to take, before anything is changed.

A tower can hang in a model and never be called: PEFT keeps the copy that it does not train, and model code may reach
past `forward` into the layers. The model's way from pixels to features is run up to where it calls the tower.

Shapes: B images, T tiles of one, S pixels a side.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trtower.errors import ConfigError
from trtower.installation.find import TowerSlot, find_towers

logger = logging.getLogger(__name__)

WAYS = ("get_image_features", "get_video_features", "encode_images")
"""Methods that turn pixels into features, in transformers, and in LLaVA, VILA and their like."""

PIXELS = ("pixel_values", "pixel_values_videos", "images", "image")
"""What they call the pixels."""


class _Called(BaseException):
    """The tower was called."""


@torch.no_grad()
def check_reached(model: nn.Module, place: TowerSlot, *, named: bool) -> None:
    """Raise ConfigError if the model turns pixels into features without calling the tower at ``place``.

    A model whose way cannot be found, or wants more than pixels, is passed with a warning; so is one whose tower was
    ``named`` by the caller.
    """
    bypassed = None
    with _stopping(place.module):
        for name, way in _ways(model, place):
            for arguments in _arguments(way, place):
                try:
                    found = way(**arguments)
                except _Called:
                    return
                except Exception as err:  # noqa: BLE001 - model code wants other inputs than these, and says so somehow
                    logger.debug("%s was not run: %r", name, err)
                else:
                    bypassed = bypassed if found is None else name
    if bypassed and not named and len(find_towers(model)) == 1:
        raise ConfigError(
            f"{type(model).__name__}.{bypassed} runs without calling {place.path}, so a bundle there would never run. "
            "Does the model's code call another module, or the tower's layers one by one? tower="
            f"{place.path!r} installs it all the same."
        )
    logger.warning(
        "%s: could not prove that it calls %s, by running a method that turns pixels into features. After the first "
        "picture, see whether installation.tower.on_batch was called.", type(model).__name__, place.path
    )  # fmt: skip


@contextmanager
def _stopping(tower: nn.Module) -> Iterator[None]:
    """Have every call of a tower end before it runs, by `__call__` before any hook hears of it, or by `forward`."""

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


def _ways(model: nn.Module, place: TowerSlot) -> Iterator[tuple[str, Callable[..., Any]]]:
    """List what may lead to the tower, the outermost first: methods of the modules around it, then its own holder."""
    parts = place.path.split(".")
    around = [model]
    for part in parts[:-1]:
        inner = getattr(around[-1], part, None)  # a list's item, or a wrapper that is asked for, is no attribute
        if not isinstance(inner, nn.Module):
            break
        around.append(inner)
    for depth, module in enumerate(around):
        for method in WAYS:
            if callable(way := _attribute(module, method)):
                yield ".".join([*parts[:depth], method]), way
    if place.holder is not model and next(iter(_parameters(place.holder.forward)), None) in PIXELS:
        yield ".".join([*parts[:-1], "forward"]), place.holder.forward


def _attribute(module: nn.Module, name: str) -> Any:
    try:
        return getattr(module, name, None)
    except Exception:  # noqa: BLE001 - a property of somebody's own
        return None


def _parameters(way: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(way).parameters
    except (TypeError, ValueError):  # not written in Python
        return {}


def _arguments(way: Callable[..., Any], place: TowerSlot) -> Iterator[dict[str, Any]]:
    """List the inputs to try: one picture (1, 3, S, S), the same as a tile (1, 1, 3, S, S), and sizes beside it."""
    parameters = _parameters(way)
    name = next((name for name in PIXELS if name in parameters), None)
    if name is None:
        return
    side: Any = place.module.config.image_size
    shape = (3, side, side) if isinstance(side, int) else (3, *side)
    first = next(place.module.parameters())
    picture = torch.ones(1, *shape, dtype=first.dtype, device=first.device)
    sizes = {"image_sizes": torch.tensor([shape[1:]], device=first.device)}
    beside = sizes if "image_sizes" in parameters else {}
    yield {name: picture, **beside}
    yield {name: picture[None], **beside}
