"""Carry an engine's features from the place of a tower to the place of a projector, through the model's own code.

A bundle with a projector computes both in one engine. Between the two, model code picks hidden states, drops tokens and
rearranges patches. It gets a tensor of the right shape and without numbers, which carries the features along.

Shapes: B images, P prefix tokens, N patches, D features per token (see spec.py).
"""

from typing import Any

import torch
from torch import Tensor

from trtower.errors import ConfigError
from trtower.spec import TowerSpec
from trtower.tower.outputs import BACK

_MOVES = (
    "__getitem__ chunk contiguous flatten permute reshape split squeeze to transpose type_as unflatten unsqueeze view"
)
PASSED_ON = frozenset(_MOVES.split())
"""What model code may do with hidden states on their way to the projector: what moves them, image by image."""

ASKED = frozenset(["__get__", "__len__", "dim", "is_contiguous", "is_floating_point", "numel", "size", "stride"])
"""What it may ask of them."""


class Carried(Tensor):
    """Stands where hidden states were, and holds the ``features`` that the projector made of them, (B, …).

    ``layers`` are the states that stand side by side in it, each of ``width``.
    """

    features: Tensor
    layers: tuple[int, ...]
    width: int

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Let what moves the states pass the features on; raise ConfigError for anything that would need numbers."""
        kwargs, name = kwargs or {}, func.__name__
        if name == "cat":
            return _concatenate(args, kwargs)
        if name not in PASSED_ON | ASKED or not isinstance(args[0], Carried):
            raise ConfigError(
                f"this model computes {name} with the hidden states of its tower before it projects them, but the "
                f"installed bundle computes both in one engine: export it without --head. {BACK}."
            )
        source, layers = args[0], args[0].layers
        if name == "__getitem__":
            layers = _picked(source, args[1])
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if name in ASKED:
            return result
        if isinstance(result, Tensor):
            return _carrying(result, source.features, layers, source.width)
        return type(result)(_carrying(each, source.features, layers, source.width) for each in result)


def carry(features: Tensor, spec: TowerSpec) -> Tensor:
    """Return hidden states of all layers that are read, (B, P + N, D), that carry ``features``."""
    shape = (len(features), spec.num_tokens, spec.hidden_size)
    states = torch.zeros((), dtype=features.dtype, device=features.device).expand(shape)
    return _carrying(states, features, spec.layers, spec.width)


def beside(states: Tensor, pictures: int) -> Tensor:
    """Put the patches of several pictures behind each other, and so what they carry: (B * C, N, D) -> (B, C * N, D)."""
    if pictures == 1:
        return states
    batch = len(states) // pictures
    with torch._C.DisableTorchFunctionSubclass():
        together = states.reshape(batch, -1, states.shape[-1])
    if not isinstance(states, Carried):
        return together
    features = states.features.reshape(batch, -1, states.features.shape[-1])
    return _carrying(together, features, states.layers, states.width)


def _carrying(states: Tensor, features: Tensor, layers: tuple[int, ...], width: int) -> Tensor:
    carried = states.as_subclass(Carried)
    carried.features, carried.layers, carried.width = features, layers, width
    return carried


def _picked(states: Carried, index: Any) -> tuple[int, ...]:
    """Return the layers that an index keeps. Raise ConfigError if it keeps only some images, or parts of a state.

    The features of some images could no longer be told apart, and a projector reads whole states.
    """
    first, *others = index if isinstance(index, tuple) else (index,)
    if first is Ellipsis and len(others) == 1 and isinstance(others[0], slice):  # as `Outputs` cuts states apart
        start, stop, _ = others[0].indices(states.shape[-1])
        if not (start % states.width or stop % states.width):
            return states.layers[start // states.width : stop // states.width]
    if first != slice(None) or (len(others) > 1 and any(each != slice(None) for each in others[1:])):
        raise ConfigError(
            "this model picks among the images, or parts of a state, between its tower and its projector, but the "
            f"installed bundle computes both in one engine: export it without --head. {BACK}."
        )
    return states.layers


def _concatenate(args: Any, kwargs: Any) -> Tensor:
    """Concatenate states of the same images, or images."""
    states, dim = args[0] if args else kwargs["tensors"], kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if not all(isinstance(each, Carried) for each in states):
        raise ConfigError(
            f"this model mixes the hidden states of its tower with others: export without --head. {BACK}."
        )
    features = [each.features for each in states]
    with torch._C.DisableTorchFunctionSubclass():
        whole = torch.cat(list(states), dim=dim)
    first, layers = states[0], [each.layers for each in states]
    if dim == 0 and len(set(layers)) == 1:
        return _carrying(whole, torch.cat(features), first.layers, first.width)
    if dim not in (-1, first.ndim - 1) or any(each is not features[0] for each in features):
        raise ConfigError(f"this model mixes hidden states of several images: export without --head. {BACK}.")
    return _carrying(whole, features[0], tuple(layer for each in layers for layer in each), first.width)
