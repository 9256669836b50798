"""Turn the layers and tokens that a model's config names into hidden-state indices. Does not import torch.

A tower of L layers has L + 1 hidden states, numbered as in transformers: 0 is the input of the first layer (after
`pre_layrnorm` in CLIP) and k is the output of layer k, so -1 is L and -2 is L - 1. One more state can be read,
although it is not in `hidden_states`: `last_hidden_state`, which PaliGemma reads. It is state L after the tower's final
norm, or state L itself if no norm follows, as in CLIP. Its index here is L + 1.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import TypeAlias, TypeGuard

from trtower.errors import ConfigError
from trtower.names import check_name

LayerCode: TypeAlias = int | str | Sequence[int | str]
"""An integer, "last_hidden_state", tinychat's two layers in one number, or a list, concatenated in its order."""

FEATURES = ("patch", "cls_patch")
"""Which tokens are kept: without or with the prefix tokens."""

LAST = "last_hidden_state"

SLICE_FOUR = "slicefour_"
SLICE_M25811_F6 = "slice_m25811_f6_"
M25811_F6 = (-2, -5, -8, -11, 6)
FEATURE_CODES = (*FEATURES, *(code + feature for code in (SLICE_FOUR, SLICE_M25811_F6) for feature in FEATURES))
"""Every `mm_vision_select_feature` of LLaVA and LLaVA-NeXT. The slices also choose the layers."""

TWO_IN_ONE = 100
"""Beyond this absolute value, a layer code is tinychat's and holds two layers: -212 is state 12, then state -2."""


def read_layer_code(select_layer: LayerCode, select_feature: str, num_layers: int) -> tuple[tuple[int, ...], str]:
    """Turn a config's layer and feature into hidden-state indices, in reading order, and the tokens to keep.

    Sources: LLaVA-NeXT's `CLIPVisionTower.feature_select` for the slices, tinychat's `LlavaLlamaForCausalLM` for
    two layers in one number. Raises ConfigError if a code is invalid, or outside a tower of ``num_layers``.
    """
    check_name("select_feature", select_feature, FEATURE_CODES)
    if select_feature.startswith(SLICE_FOUR):
        return _slice_four(select_layer, num_layers), select_feature.removeprefix(SLICE_FOUR)
    if select_feature.startswith(SLICE_M25811_F6):
        return normalise_layers(M25811_F6, num_layers), select_feature.removeprefix(SLICE_M25811_F6)
    return normalise_layers(select_layer, num_layers), select_feature


def normalise_layers(select_layer: LayerCode, num_layers: int) -> tuple[int, ...]:
    """Turn a layer code into hidden-state indices, in its order; raise ConfigError if it is invalid."""
    if _is_integer(select_layer) and abs(select_layer) > TWO_IN_ONE:
        deeper, first = divmod(abs(select_layer), TWO_IN_ONE)
        return normalise_layers([first, -deeper], num_layers)
    if isinstance(select_layer, str) or not isinstance(select_layer, Sequence):
        return (_normalise(select_layer, num_layers),)
    if not select_layer:
        raise ConfigError("select_layer is an empty list; name at least one layer.")
    return tuple(_normalise(code, num_layers) for code in select_layer)


def parse_layer_code(text: str) -> LayerCode:
    """Parse a layer code from the command line: "-2", "-2,-5,6", "last_hidden_state"."""
    codes: list[int | str] = []
    for part in text.strip("[]() ").split(","):
        try:
            codes.append(int(part))
        except ValueError:
            codes.append(part.strip())
    return codes[0] if len(codes) == 1 else codes


def name_layer(layer: int, num_layers: int) -> str:
    """Name a hidden state by its index, or as `last_hidden_state`."""
    return LAST if layer == num_layers + 1 else str(layer)


def _normalise(code: object, num_layers: int) -> int:
    if code == LAST:
        return num_layers + 1
    if not _is_integer(code):
        raise ConfigError(
            f"select_layer={code!r} is not a layer code; expected an integer such as -2, {LAST!r}, or a list of these."
            f"{_unquoted(code)}"
        )
    if not -(num_layers + 1) <= code <= num_layers:
        raise ConfigError(
            f"select_layer={code} is outside this tower: {num_layers} layers accept -{num_layers + 1} to {num_layers}."
        )
    return int(code % (num_layers + 1))


def _slice_four(select_layer: LayerCode, num_layers: int) -> tuple[int, ...]:
    """Return the states at each quarter of the tower, shifted by ``select_layer``: -2 of 24 layers is 4, 10, 16, 22."""
    states = num_layers + 1
    step = states // 4
    if not _is_integer(select_layer) or not 0 <= step + select_layer < states or not step:
        raise ConfigError(
            f"select_layer={select_layer!r} is not a valid shift for slicefour: {num_layers} layers accept "
            f"-{step} to {states - step - 1}.{_unquoted(select_layer)}"
        )
    return tuple(range(step + select_layer, states, step))


def _unquoted(code: object) -> str:
    """Return the advice to drop the quotes if ``code`` is a string that holds a valid layer code; otherwise ""."""
    parsed = parse_layer_code(code) if isinstance(code, str) else code
    codes = parsed if isinstance(parsed, list) else [parsed]
    is_valid = parsed != code and all(_is_integer(each) or each == LAST for each in codes)
    return f" Write {parsed!r}, without quotes." if is_valid else ""


def _is_integer(code: object) -> TypeGuard[int]:
    return isinstance(code, Integral) and not isinstance(code, bool)  # including numpy's integers
