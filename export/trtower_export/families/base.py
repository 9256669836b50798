"""Describe an architecture, so that the layers of its towers can be run one by one."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from trtower.errors import ConfigError
from trtower.layer_codes import LayerCode, read_layer_code
from trtower.spec import Naming, TowerSpec


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """A tower taken apart. The pieces share the model's weights, and the model stays intact.

    What flows between the layers is a hidden state; in a pair of towers it is one of each, which ``join`` makes one.
    """

    stem: nn.Module
    """Pixels (B, 3, S, S) -> hidden state 0 (B, P + N, D)."""

    layers: nn.ModuleList
    """The transformer layers, in order: hidden state k -> hidden state k + 1, both (B, P + N, D)."""

    final_norm: nn.Module
    """Hidden state L -> `last_hidden_state`; nn.Identity() if transformers norms only what it pools."""

    join: Callable[[Any], Tensor] = lambda state: state
    """What flows between the layers -> the hidden state (B, P + N, D)."""


def read_states(model: nn.Module, pixel_values: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Run transformers' own uncut forward pass; return hidden states 0 to L, then `last_hidden_state`."""
    output = model(pixel_values, output_hidden_states=True, **options)
    return (*output.hidden_states, output.last_hidden_state)


def run_layer(layer: nn.Module, hidden_states: Tensor, **options: Any) -> Tensor:
    """Run one layer or another module of a tower. transformers 4.57 returns a tuple, 5.x the hidden state itself."""
    output = layer(hidden_states, **options)
    state: Tensor = output[0] if isinstance(output, tuple) else output
    return state


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture: where its towers lie in a checkpoint, and how to take them apart.

    Towers run piece by piece and never through `output_hidden_states`, because transformers 5 captures hidden states
    with hooks that tracing cannot follow.
    """

    name: str
    """What bundles and messages call it."""

    model_types: tuple[str, ...]
    """`model_type` of the vision config."""

    model_class: str
    """The class that this config belongs to."""

    module: str = "transformers"
    """The module that has this class."""

    patch_embedding: str
    """The patch embedding's weight, as named inside the tower. It shows where in a checkpoint the tower lies."""

    num_prefix_tokens: Callable[[Any], int]
    """Config -> P, the number of tokens before the patches."""

    take_apart: Callable[[nn.Module, int], Pieces]
    """Model and S -> its pieces, with position embeddings interpolated to S pixels a side as transformers does it."""

    preprocessor: dict[str, Any]
    """The preprocessor_config.json for checkpoints that have none."""

    image_size: Callable[[Any], int] = lambda config: square(config.image_size)
    """Config -> S, in pixels a side; 0 if its images are not square."""

    naming: Naming = field(default_factory=Naming)
    """What transformers calls the parts of the tower, so that a bundle recognises it in a loaded model."""

    offsets: Callable[[Any], dict[str, int]] = lambda config: {}
    """Config -> `Naming.offsets`, for a pair of towers."""

    run_layer: Callable[[nn.Module, Tensor], Tensor] = run_layer
    """Layer and hidden state k -> hidden state k + 1."""

    read_states: Callable[[nn.Module, Tensor], tuple[Tensor, ...]] = read_states
    """Model and pixels (B, 3, S, S), for any S that the family supports -> transformers' own states, the reference."""

    obstacle: Callable[[Any], str | None] = lambda config: None
    """Config -> why it cannot be exported, with the nearest that can; None if it can."""

    size_obstacle: Callable[[Any, int], str | None] = lambda config, image_size: None
    """Config and S -> why its tower cannot accept images of S pixels, with the sizes it can; None if it can."""

    @property
    def vision_class(self) -> Any:
        """The class of the vision model, with a `config_class` that reads its config."""
        return getattr(import_module(self.module), self.model_class)

    def naming_in(self, config: Any) -> Naming:
        """Return what the parts of the tower that a config describes are called."""
        return replace(self.naming, offsets=self.offsets(config))

    def named_in(self, vision_class: Any, config: Any, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put before the names in a tower what its class has there: some releases of transformers wrap it."""
        with torch.device("meta"):
            names = vision_class(config).state_dict()
        home = next(name for name in names if name.endswith(self.patch_embedding))
        home = home.removesuffix(self.patch_embedding)
        return {home + name: tensor for name, tensor in weights.items()}

    def spec(
        self, config: Any, select_layer: LayerCode, select_feature: str, image_size: int | None = None
    ) -> TowerSpec:
        """Describe the cut tower that a config makes.

        Args:
            config: The vision config.
            select_layer: Layer code: a hidden state, a list of them, or "last_hidden_state".
            select_feature: "patch" (without the prefix tokens), "cls_patch" (with them), or a slice of LLaVA-NeXT.
            image_size: S, in pixels a side. By default the config's.

        Returns:
            The spec, with the layers as indices of hidden states.

        Raises:
            ConfigError: if a code is invalid, the patches are not square, or the tower cannot accept this image size.
        """
        patch = square(config.patch_size)
        size = self.image_size(config) if image_size is None else image_size
        if not patch:
            raise ConfigError(
                f"patch_size={config.patch_size} of a {self.name} tower is not a square, but engines need one."
            )
        if not size and image_size is None:
            raise ConfigError(
                f"image_size={config.image_size} of a {self.name} tower is not a square; choose one with --image-size."
            )
        if size < patch:
            raise ConfigError(
                f"image_size={size} is smaller than one patch of {patch} pixels; choose a larger one with --image-size."
            )
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
            naming=self.naming_in(config),
            towers=tuple(part.hidden_size for part in getattr(config, "parts", ())),
        )


def square(size: Any) -> int:
    """Return the side of a square that a config writes as n or as (n, n); 0 if it is not a square."""
    sides = {size} if isinstance(size, int) else set(size)
    return sides.pop() if len(sides) == 1 else 0


def replaced(module: nn.Module, **changes: Any) -> Any:
    """Return a copy of ``module`` that shares all its tensors except those that ``changes`` replaces."""
    clone = copy.copy(module)
    for kind in ("_parameters", "_buffers", "_modules"):
        setattr(clone, kind, dict(getattr(module, kind)))
    for name, value in changes.items():
        setattr(clone, name, value)
    return clone


def interpolate_positions(embeddings: Any, num_tokens: int, width: int, image_size: int) -> Tensor:
    """Interpolate the position embeddings of a stem to S pixels with transformers' own code: (1, P + N, D)."""
    tokens = torch.empty(1, num_tokens, width)
    with torch.no_grad():
        positions: Tensor = embeddings.interpolate_pos_encoding(tokens, image_size, image_size)
    return positions


def resized_positions(embeddings: Any, positions: Tensor, image_size: int) -> Tensor:
    """Fit the position embeddings (1, 1 + N, D) of a stem to S pixels; return the same object if they already fit."""
    num_tokens = 1 + (image_size // square(embeddings.patch_size)) ** 2
    if num_tokens == positions.shape[1]:
        return positions
    return nn.Parameter(interpolate_positions(embeddings, num_tokens, positions.shape[2], image_size))
