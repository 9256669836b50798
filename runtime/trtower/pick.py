"""What a model reads out of a bundle: some of its hidden states, and some of their tokens.

An engine gives the hidden states it holds side by side, so a pick among them is a cut of columns. Neighbours are cut
as one: a model that reads all of a bundle, or a run of it, pays no copy.

Shapes: B images, P prefix tokens, N patches, D features a token (see spec.py).
"""

from collections.abc import Sequence
from typing import Any

import torch

from trtower.spec import TowerSpec


class Pick:
    """Hidden states ``layers`` of a tower, in their order, and of each the tokens from ``first_token`` on."""

    def __init__(self, spec: TowerSpec, layers: tuple[int, ...], first_token: int) -> None:
        self.layers, self.first_token = layers, first_token
        self.hidden_size = spec.width * len(layers)
        self.num_tokens = spec.num_tokens - first_token
        self._columns = _joined(spec.columns(layers))
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
