"""What a model reads from a bundle: some of its hidden states, and some of their tokens.

An engine returns its hidden states side by side, so picking some means slicing columns. Neighbours are sliced as one: a
model that reads all states of a bundle, or a run of them, pays for no copy. What a head returns is always read whole.

Shapes: B images, P prefix tokens, N patches, D features per token (see spec.py).
"""

from collections.abc import Sequence
from typing import Any

import torch

from trtower.bundle.bundle import Bundle
from trtower.bundle.suggest import export_command, name_layers
from trtower.errors import ConfigError
from trtower.layer_codes import FEATURES, LAST, LayerCode, read_layer_code
from trtower.spec import TowerSpec


class Pick:
    """The hidden states ``layers`` of a tower, in this order, each with its tokens from ``first_token`` on.

    ``whole``: whether that is everything the engine returns, in its order. ``row`` is the shape of one image's
    features: (N, D), or (D,) for an embedding.
    """

    def __init__(self, spec: TowerSpec, layers: tuple[int, ...], first_token: int) -> None:
        self.layers, self.first_token = layers, first_token
        self._columns = _joined(spec.columns(layers))
        self.row: tuple[int, ...] = (spec.num_tokens - first_token, spec.width * len(layers))
        self.whole = not first_token and self._columns == _joined(spec.columns(spec.layers))
        self._num_layers, self._head = spec.num_layers, spec.head
        if spec.head:
            self.row, self.whole = spec.head.row, True

    @property
    def num_tokens(self) -> int:
        """The number of feature vectors of an image."""
        return self.row[0] if len(self.row) > 1 else 1

    @property
    def hidden_size(self) -> int:
        """D, the width of a feature vector."""
        return self.row[-1]

    def cut(self, image_forward_outs: Any) -> torch.Tensor:
        """Slice out the picked layers and tokens: (B, P + N, all that the bundle holds) -> (B, N, D).

        Accepts all tokens as a tensor, or an output of the full tower with `hidden_states` and `last_hidden_state`.
        What a head returned is passed on. Raises ConfigError for hidden states that a head should have read.
        """
        if isinstance(image_forward_outs, torch.Tensor) and self._head:
            return image_forward_outs
        if self._head:
            raise ConfigError(
                f"this bundle returns what its {self._head.describe()} makes of the hidden states, and cannot select "
                "among those of another tower: call the tower itself."
            )
        if isinstance(image_forward_outs, torch.Tensor):
            states = [image_forward_outs[:, self.first_token :, columns] for columns in self._columns]
        else:
            states = [self._state(image_forward_outs, layer)[:, self.first_token :] for layer in self.layers]
        return states[0] if len(states) == 1 else torch.cat(states, dim=-1)

    def _state(self, output: Any, layer: int) -> torch.Tensor:
        state: torch.Tensor = output.last_hidden_state if layer > self._num_layers else output.hidden_states[layer]
        return state


def _joined(columns: Sequence[slice]) -> list[slice]:
    joined: list[slice] = []
    for column in columns:
        if joined and joined[-1].stop == column.start:
            column = slice(joined.pop().start, column.stop)
        joined.append(column)
    return joined


def pick(bundle: Bundle, select_layer: LayerCode, select_feature: str) -> Pick:
    """Turn a model's layer and feature codes into a pick; raise ConfigError if the bundle lacks a layer."""
    spec = bundle.manifest.spec
    layers, tokens = read_layer_code(select_layer, select_feature, spec.num_layers)
    if spec.head and (layers, spec.first_token(tokens)) != (spec.layers, spec.first_read):
        raise ConfigError(
            f"select_layer={select_layer} with select_feature={select_feature!r} differs from {spec.reading}, which "
            f"the {spec.head.describe()} inside {bundle.path} reads: leave both out, or export without --head to read "
            "hidden states."
        )
    if not set(layers) <= set(spec.layers):
        is_plain = select_feature in FEATURES
        command = export_command(bundle, select_layer if is_plain else layers, spec.image_size)
        raise ConfigError(
            f"select_layer={select_layer}{'' if is_plain else f' with {select_feature}'} reads hidden state "
            f"{', '.join(name_layers(spec, layers))} of {spec.num_layers} layers, but {bundle.path} contains only "
            f"{', '.join(name_layers(spec, spec.layers))}. Export it: {command}"
        )
    return Pick(spec, layers, spec.first_token(tokens))


def whole_code(spec: TowerSpec) -> LayerCode:
    """Return the layer code that reads every layer of a bundle, in its order."""
    held = [LAST if layer > spec.num_layers else layer for layer in spec.layers]
    return held[0] if len(held) == 1 else held
