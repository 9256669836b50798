"""What one architecture must say of itself so that its layers can be run one by one."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trtower.errors import ConfigError
from trtower.layer_codes import LayerCode, read_layer_code
from trtower.spec import Naming, TowerSpec


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """A tower taken apart. The pieces share the model's weights, and the model stays whole."""

    stem: nn.Module
    """Pixels (B, 3, S, S) -> hidden state 0 (B, P + N, D)."""

    layers: nn.ModuleList
    """The transformer layers, in order: hidden state k -> hidden state k + 1, both (B, P + N, D)."""

    final_norm: nn.Module
    """Hidden state L -> `last_hidden_state`; nn.Identity() where transformers norms only what it pools."""


def read_states(model: nn.Module, pixel_values: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Run transformers' own forward pass, every layer in place: hidden states 0 to L, then `last_hidden_state`."""
    output = model(pixel_values, output_hidden_states=True, **options)
    return (*output.hidden_states, output.last_hidden_state)


def run_layer(layer: nn.Module, hidden_states: Tensor, **options: Any) -> Tensor:
    """Run one layer, or another module of a tower: transformers 4.57 gives a tuple where 5.x gives the state."""
    output = layer(hidden_states, **options)
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture.

    Towers are run piece by piece and never through `output_hidden_states`: transformers 5 captures states with
    hooks that tracing cannot follow.
    """

    name: str

    model_types: tuple[str, ...]
    """`model_type` of the vision config."""

    model_class: str
    """The class in transformers that this config makes."""

    patch_embedding: str
    """The name of the patch embedding's weight, counted from the tower's root: it shows where in a checkpoint the
    tower lies."""

    num_prefix_tokens: Callable[[Any], int]
    """P of a config: the tokens before the patches."""

    take_apart: Callable[[nn.Module, int], Pieces]
    """Take a model apart, its position embeddings interpolated to S pixels a side as transformers does it."""

    preprocessor: dict[str, Any]
    """How images are prepared where the checkpoint does not say."""

    image_size: Callable[[Any], int] = lambda config: square(config.image_size)
    """S of a config."""

    naming: Naming = field(default_factory=Naming)
    """What transformers calls the parts of the tower, so that a bundle knows it in a loaded model."""

    run_layer: Callable[[nn.Module, Tensor], Tensor] = run_layer

    read_states: Callable[[nn.Module, Tensor], tuple[Tensor, ...]] = read_states
    """The reference: transformers' own states for pixels (B, 3, S, S) of any S that the family can have."""

    obstacle: Callable[[Any], str | None] = lambda config: None
    """Why a config of this family cannot be exported, with the nearest that can; None where it can."""

    size_obstacle: Callable[[Any, int], str | None] = lambda config, image_size: None
    """Why the tower of a config cannot take images of S pixels, with those it can; None where it can."""

    def spec(
        self, config: Any, select_layer: LayerCode, select_feature: str, image_size: int | None = None
    ) -> TowerSpec:
        """Describe the tower that a config makes, read at these layers, for S pixels where that is not the config's.

        Raises ConfigError where there can be no such tower.
        """
        patch = square(config.patch_size)
        size = self.image_size(config) if image_size is None else image_size
        if not patch:
            raise ConfigError(
                f"patch_size={config.patch_size} of a {self.name} tower is no square, as engines need it."
            )
        if not size and image_size is None:
            raise ConfigError(
                f"image_size={config.image_size} of a {self.name} tower is no square; name one with --image-size."
            )
        if size < patch:
            raise ConfigError(f"image_size={size} is smaller than one patch of {patch} pixels.")
        if reason := self.size_obstacle(config, size):
            raise ConfigError(reason)
        layers, feature = read_layer_code(select_layer, select_feature, config.num_hidden_layers)
        return TowerSpec(
            family=self.name,
            image_size=size,
            patch_size=patch,
            num_layers=config.num_hidden_layers,
            num_prefix_tokens=self.num_prefix_tokens(config),
            width=config.hidden_size,
            layers=layers,
            select_feature=feature,
            naming=self.naming,
        )


def square(size: Any) -> int:
    """Give the side of a square that a config writes as n or as (n, n); 0 where it is no square."""
    sides = {size} if isinstance(size, int) else set(size)
    return sides.pop() if len(sides) == 1 else 0


def replaced(module: nn.Module, **changes: Any) -> Any:
    """Give a copy of ``module`` that shares its tensors, but for what ``changes`` puts in their place."""
    clone = copy.copy(module)
    for kind in ("_parameters", "_buffers", "_modules"):
        setattr(clone, kind, dict(getattr(module, kind)))
    for name, value in changes.items():
        setattr(clone, name, value)
    return clone


def interpolate_positions(embeddings: Any, num_tokens: int, width: int, image_size: int) -> Tensor:
    """Have transformers interpolate the position embeddings of a stem to S pixels: (1, P + N, D)."""
    tokens = torch.empty(1, num_tokens, width)
    with torch.no_grad():
        positions: Tensor = embeddings.interpolate_pos_encoding(tokens, image_size, image_size)
    return positions


def resized_positions(embeddings: Any, positions: Tensor, image_size: int) -> Tensor:
    """Fit the position embeddings (1, 1 + N, D) of a stem to S pixels; give the very same ones where they do."""
    num_tokens = 1 + (image_size // square(embeddings.patch_size)) ** 2
    if num_tokens == positions.shape[1]:
        return positions
    return nn.Parameter(interpolate_positions(embeddings, num_tokens, positions.shape[2], image_size))
