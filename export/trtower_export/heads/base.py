"""Describe a head: what lies between the hidden states of a tower and whoever reads its features.

Shapes: B images, T of the tokens that a model reads, D features per token (see spec.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from trtower.head import EMBEDDING, PROJECTOR


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the steps of a head are made from.

    Attributes:
        config: The config that the head belongs to: for a projector the whole model's, for an embedding the tower's.
        tower: The full vision model, with its poolers.
        own: The module that the head keeps outside the tower, with its weights; None if it has none.
        pool: The user's choice among the head's ``pools``; None if it has none.
    """

    config: Any
    tower: nn.Module
    own: nn.Module | None
    pool: str | None

    @property
    def projector(self) -> nn.Module:
        """The module outside the tower, of a head that has one."""
        assert self.own is not None  # noqa: S101 - `Head.own` makes it
        return self.own


@dataclass(frozen=True, kw_only=True)
class Head:
    """One kind of head: which checkpoints have it, its weights, and its steps.

    transformers' own classes do the work, so a head is what the installed version computes.
    """

    name: str
    """What bundles and messages call it: a class of transformers, or LLaVA's name for a projector."""

    kind: str = PROJECTOR
    """One of `trtower.spec.HEADS`."""

    model_types: tuple[str, ...] = ()
    """`model_type` of the config that it belongs to."""

    belongs: Callable[[Any], bool] | None = None
    """Config -> whether it has this head, for configs whose `model_type` does not say."""

    attribute: str = ""
    """What models and checkpoints call the module outside the tower, such as "multi_modal_projector"; "" if none."""

    own: Callable[[Any], nn.Module] | None = None
    """Config -> the module outside the tower, yet without weights, whose tensors are named as in checkpoints."""

    steps: Callable[[Parts], Mapping[str, nn.Module]] = lambda parts: {"projector": parts.projector}
    """Parts -> modules that run one after the other, the first on (B, T, D). Their names become those of operations."""

    pools: tuple[str, ...] = ()
    """What ``Parts.pool`` may be, the default first."""

    obstacle: Callable[[Any], str | None] = lambda config: None
    """Config -> why this head cannot be exported, and what can; None if it can."""

    describe: Callable[[Any], str] | None = None
    """Config -> its name, for heads of several types; by default it is always ``name``."""

    settings: tuple[str, ...] = ()
    """Fields of the config that decide, besides the weights, what it computes. `trtower.install` compares them."""

    divisor: Callable[[Any], float] = lambda config: 1.0
    """Config -> what the model's code divides the features by, after the module."""

    def is_of(self, config: Any) -> bool:
        """Return whether a config has this head."""
        if self.belongs:
            return self.belongs(config)
        return getattr(config, "model_type", None) in self.model_types

    def name_in(self, config: Any) -> str:
        """Return what bundles and messages call the head of a config."""
        return self.describe(config) if self.describe else self.name

    @property
    def embeds(self) -> bool:
        """Whether it returns one vector per image."""
        return self.kind == EMBEDDING


def projector_of(
    model: str, name: str, *settings: str, attribute: str = "multi_modal_projector", **others: Any
) -> Head:
    """Describe the projector class ``name`` of a model of transformers, as it keeps it under ``attribute``."""

    def own(config: Any) -> nn.Module:
        module: nn.Module = transformers_class(model, name)(config)
        return module

    return Head(name=name, model_types=(model,), attribute=attribute, own=own, settings=settings, **others)


class Divide(nn.Module):
    """Divides features, whatever their shape."""

    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.divisor = divisor

    def forward(self, features: Tensor) -> Tensor:
        """Divide (…, D)."""
        return features / self.divisor


class Flatten(nn.Module):
    """Turns a grid of features into a list: (B, H, W, D) -> (B, H * W, D)."""

    def forward(self, features: Tensor) -> Tensor:
        """Flatten the grid, row by row."""
        return features.flatten(1, 2)


class UnitLength(nn.Module):
    """Scales vectors (B, D) to length 1, in FP32: the squares of some embeddings do not fit FP16."""

    def forward(self, vectors: Tensor) -> Tensor:
        """Divide each by its length."""
        return functional.normalize(vectors.float(), dim=-1).to(vectors.dtype)


def transformers_class(model: str, name: str) -> Any:
    """Return a class that transformers keeps in the module of a model and does not export."""
    return getattr(import_module(f"transformers.models.{model}.modeling_{model}"), name)
