"""What one architecture must say of itself so that its layers can be run one by one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture.

    Towers are run piece by piece and never through `output_hidden_states`: transformers 5 captures states with
    hooks that tracing cannot follow.
    """

    name: str

    model_types: tuple[str, ...]
    """`model_type` of every config that holds such a tower; where it is nested, in `vision_config`."""

    model_class: str
    """The class in transformers that loads the tower from any of them."""

    num_prefix_tokens: Callable[[Any], int]
    """P of a config: the tokens before the patches."""

    stem: Callable[[nn.Module], nn.Module]
    """The part of the model that turns pixels (B, 3, S, S) into hidden state 0 (B, P + N, D)."""

    layers: Callable[[nn.Module], nn.ModuleList]
    """The transformer layers, in order."""

    run_layer: Callable[[nn.Module, Tensor], Tensor]
    """Hidden state k -> hidden state k + 1, both (B, P + N, D)."""

    preprocessor: dict[str, Any]
    """How images are prepared where the checkpoint does not say."""
