"""What a model's config says of layers and tokens, turned into hidden-state indices. No torch.

A tower of L layers has L + 1 hidden states, counted as transformers counts them: 0 is what enters the first layer
(after `pre_layrnorm` in CLIP) and k the output of layer k, so -1 is L and -2 is L - 1. One more can be read and
stands in no `hidden_states`: `last_hidden_state`, which is state L after the tower's final norm, as PaliGemma
reads it. It is written as index L + 1.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import TypeAlias, TypeGuard

from trtower.errors import ConfigError
from trtower.names import check_name

LayerCode: TypeAlias = int | str | Sequence[int | str]
"""An integer; a list of them, concatenated in its order; "last_hidden_state"; or tinychat's two in one number."""

FEATURES = ("patch", "cls_patch")
"""Which tokens are kept: without the prefix tokens, or with them."""

LAST = "last_hidden_state"

SLICE_FOUR = "slicefour_"
SLICE_M25811_F6 = "slice_m25811_f6_"
M25811_F6 = (-2, -5, -8, -11, 6)
FEATURE_CODES = (*FEATURES, *(code + feature for code in (SLICE_FOUR, SLICE_M25811_F6) for feature in FEATURES))
"""Every `mm_vision_select_feature` of LLaVA and LLaVA-NeXT; the slices also say which layers are read."""

TWO_IN_ONE = 100
"""From here on a layer code of tinychat holds two: -212 is state 12, then state -2."""


def read_layer_code(select_layer: LayerCode, select_feature: str, num_layers: int) -> tuple[tuple[int, ...], str]:
    """Turn a config's layer and feature into hidden-state indices, in the order read, and the tokens that are kept.

    Sources: LLaVA-NeXT's `CLIPVisionTower.feature_select` for the slices, tinychat's `LlavaLlamaForCausalLM` for
    two layers in one number. Raises ConfigError naming what is no code, or is outside a tower of ``num_layers``.
    """
    check_name("select_feature", select_feature, FEATURE_CODES)
    if select_feature.startswith(SLICE_FOUR):
        return _slice_four(select_layer, num_layers), select_feature.removeprefix(SLICE_FOUR)
    if select_feature.startswith(SLICE_M25811_F6):
        return normalise_layers(M25811_F6, num_layers), select_feature.removeprefix(SLICE_M25811_F6)
    return normalise_layers(select_layer, num_layers), select_feature


def normalise_layers(select_layer: LayerCode, num_layers: int) -> tuple[int, ...]:
    """Turn a layer code into hidden-state indices, in the order given; raise ConfigError where it is none."""
    if _is_integer(select_layer) and abs(select_layer) > TWO_IN_ONE:
        deeper, first = divmod(abs(select_layer), TWO_IN_ONE)
        return normalise_layers([first, -deeper], num_layers)
    if isinstance(select_layer, str) or not isinstance(select_layer, Sequence):
        return (_normalise(select_layer, num_layers),)
    if not select_layer:
        raise ConfigError("select_layer is an empty list: name at least one layer.")
    return tuple(_normalise(code, num_layers) for code in select_layer)


def parse_layer_code(text: str) -> LayerCode:
    """Read a layer code as it is typed: "-2", "-2,-5,6", "last_hidden_state"."""
    codes: list[int | str] = []
    for part in text.strip("[]() ").split(","):
        try:
            codes.append(int(part))
        except ValueError:
            codes.append(part.strip())
    return codes[0] if len(codes) == 1 else codes


def name_layer(layer: int, num_layers: int) -> str:
    """Say in a message which hidden state an index is."""
    return LAST if layer == num_layers + 1 else str(layer)


def _normalise(code: object, num_layers: int) -> int:
    if code == LAST:
        return num_layers + 1
    if not _is_integer(code):
        raise ConfigError(
            f"select_layer={code!r} is no layer code: an integer such as -2 is, a list of them, or {LAST!r}."
            f"{_unquoted(code)}"
        )
    if not -(num_layers + 1) <= code <= num_layers:
        raise ConfigError(
            f"select_layer={code} is outside this tower: {num_layers} layers accept -{num_layers + 1} to {num_layers}."
        )
    return int(code % (num_layers + 1))


def _slice_four(select_layer: LayerCode, num_layers: int) -> tuple[int, ...]:
    """Every fourth part of the states, each shifted by the layer: -2 of 24 layers reads 4, 10, 16 and 22."""
    states = num_layers + 1
    step = states // 4
    if not _is_integer(select_layer) or not 0 <= step + select_layer < states or not step:
        raise ConfigError(
            f"select_layer={select_layer!r} is no shift for slicefour: {num_layers} layers accept "
            f"-{step} to {states - step - 1}.{_unquoted(select_layer)}"
        )
    return tuple(range(step + select_layer, states, step))


def _unquoted(code: object) -> str:
    """Say what to write instead of a layer code as it is typed in a command; nothing for anything else."""
    read = parse_layer_code(code) if isinstance(code, str) else code
    codes = read if isinstance(read, list) else [read]
    is_meant = read != code and all(_is_integer(each) or each == LAST for each in codes)
    return f" Write {read!r}, without quotes." if is_meant else ""


def _is_integer(code: object) -> TypeGuard[int]:
    return isinstance(code, Integral) and not isinstance(code, bool)  # numpy's too
