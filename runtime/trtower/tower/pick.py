"""What a model reads out of a bundle: some of its hidden states, and some of their tokens.

An engine gives the hidden states it holds side by side, so a pick among them is a cut of columns. Neighbours are cut
as one: a model that reads all of a bundle, or a run of it, pays no copy.

Shapes: B images, P prefix tokens, N patches, D features a token (see spec.py).
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
    """Hidden states ``layers`` of a tower, in their order, and of each the tokens from ``first_token`` on.

    It is ``whole`` where that is all a bundle holds, as it holds it.
    """

    def __init__(self, spec: TowerSpec, layers: tuple[int, ...], first_token: int) -> None:
        self.layers, self.first_token = layers, first_token
        self.hidden_size = spec.width * len(layers)
        self.num_tokens = spec.num_tokens - first_token
        self._columns = _joined(spec.columns(layers))
        self.whole = not first_token and self._columns == _joined(spec.columns(spec.layers))
        self._num_layers = spec.num_layers

    def cut(self, image_forward_outs: Any) -> torch.Tensor:
        """Cut out what is picked: (B, P + N, all that the bundle holds) -> (B, N, D).

        Takes all tokens as a tensor, or an output of the full tower with `hidden_states` and `last_hidden_state`.
        """
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
    """Read a model's codes into what is cut out of a bundle; raise ConfigError naming what it lacks."""
    spec = bundle.manifest.spec
    layers, tokens = read_layer_code(select_layer, select_feature, spec.num_layers)
    if not set(layers) <= set(spec.layers):
        plain = select_feature in FEATURES
        command = export_command(bundle, select_layer if plain else layers, spec.image_size)
        raise ConfigError(
            f"select_layer={select_layer}{'' if plain else f' under {select_feature}'} is hidden state "
            f"{', '.join(name_layers(spec, layers))} of {spec.num_layers} layers; {bundle.path} holds "
            f"{', '.join(name_layers(spec, spec.layers))}. Export it: {command}"
        )
    return Pick(spec, layers, spec.first_token(tokens))


def whole_code(spec: TowerSpec) -> LayerCode:
    """Return the layer code that reads every layer of a bundle, in its order."""
    held = [LAST if layer > spec.num_layers else layer for layer in spec.layers]
    return held[0] if len(held) == 1 else held
