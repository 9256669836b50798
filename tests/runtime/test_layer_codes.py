"""A config's layers and tokens become hidden-state indices, or an error that says why not."""

from typing import Any

import pytest

from trtower.errors import ConfigError
from trtower.layer_codes import name_layer, normalise_layers, parse_layer_code, read_layer_code


def test_negative_layer_counts_embeddings() -> None:
    assert normalise_layers(-2, 24) == (23,)
    assert normalise_layers(-25, 24) == (0,)
    assert normalise_layers(-1, 24) == normalise_layers(24, 24) == (24,)


def test_a_list_keeps_its_order() -> None:
    assert normalise_layers([-2, 0, 8], 12) == (11, 0, 8)
    assert normalise_layers((-2, -2), 12) == (11, 11)


def test_last_hidden_state_comes_after_the_last_layer() -> None:
    assert normalise_layers("last_hidden_state", 24) == (25,)
    assert normalise_layers([-1, "last_hidden_state"], 24) == (24, 25)


def test_two_layers_in_one_number_are_the_shallow_and_the_deep_one() -> None:
    assert normalise_layers(-212, 24) == (12, 23)
    assert normalise_layers(-1105, 24) == (5, 14)


@pytest.mark.parametrize("layer", [-26, 25, -30, 100, -100])
def test_layer_outside_the_tower_names_the_range(layer: int) -> None:
    with pytest.raises(ConfigError, match=rf"select_layer={layer} is outside this tower: 24 layers accept -25 to 24\."):
        normalise_layers(layer, 24)


def test_list_and_two_layers_in_one_name_the_layer_that_is_outside() -> None:
    for code in ([-2, 25], 225):
        with pytest.raises(ConfigError, match="select_layer=25 is outside this tower"):
            normalise_layers(code, 24)


@pytest.mark.parametrize("layer", ["sliceseven", "-2", "", 1.5, True, None, [], [[1]], [1.0], [-2, False], [-2, -212]])
def test_invalid_layer_code_is_refused(layer: object) -> None:
    with pytest.raises(ConfigError, match="select_layer") as caught:
        normalise_layers(layer, 24)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
def test_plain_feature_leaves_the_layers_as_they_are(feature: str) -> None:
    assert read_layer_code([-2, 6], feature, 24) == ((23, 6), feature)


@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
@pytest.mark.parametrize(
    ("layer", "num_layers", "layers"),
    [
        (-2, 24, (4, 10, 16, 22)),
        (-2, 12, (1, 4, 7, 10)),
        (0, 24, (6, 12, 18, 24)),
        (-6, 24, (0, 6, 12, 18, 24)),  # five states: LLaVA-NeXT says four, but its range yields five
        (3, 4, (4,)),
    ],
)
def test_slicefour_reads_a_shifted_state_of_every_quarter(
    layer: int, num_layers: int, layers: tuple[int, ...], feature: str
) -> None:
    states = list(range(num_layers + 1))
    assert tuple(states[i] for i in range(len(states) // 4 + layer, len(states), len(states) // 4)) == layers
    assert read_layer_code(layer, f"slicefour_{feature}", num_layers) == (layers, feature)


@pytest.mark.parametrize("layer", [-7, 19, [-2], "last_hidden_state", None])
def test_invalid_shift_for_slicefour_names_the_range(layer: object) -> None:
    with pytest.raises(ConfigError, match="is not a valid shift for slicefour: 24 layers accept -6 to 18"):
        read_layer_code(layer, "slicefour_patch", 24)  # type: ignore[arg-type]


def test_slicefour_needs_four_states() -> None:
    with pytest.raises(ConfigError, match="not a valid shift for slicefour"):
        read_layer_code(0, "slicefour_patch", 2)


@pytest.mark.parametrize("feature", ["patch", "cls_patch"])
@pytest.mark.parametrize("layer", [-2, 99, None])
def test_slice_of_five_ignores_the_configs_layer(layer: object, feature: str) -> None:
    code = f"slice_m25811_f6_{feature}"
    assert read_layer_code(layer, code, 24) == ((23, 20, 17, 14, 6), feature)  # type: ignore[arg-type]


def test_slice_of_five_needs_ten_layers() -> None:
    assert read_layer_code(-2, "slice_m25811_f6_patch", 10)[0] == (9, 6, 3, 0, 6)
    with pytest.raises(ConfigError, match="select_layer=-11 is outside this tower: 9 layers"):
        read_layer_code(-2, "slice_m25811_f6_patch", 9)


@pytest.mark.parametrize("feature", ["cls", "slicefour", "sliceseven_patch", "slicefour_cls", "", None, ["patch"]])
def test_unknown_feature_lists_the_known(feature: object) -> None:
    with pytest.raises(ConfigError, match=r"unknown select_feature .* choose patch, cls_patch, slicefour_patch, .*"):
        read_layer_code(-2, feature, 24)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("-2", -2),
        (" 23 ", 23),
        ("-212", -212),
        ("-2,-5,6", [-2, -5, 6]),
        ("[-2, -5]", [-2, -5]),
        ("last_hidden_state", "last_hidden_state"),
        ("-2, last_hidden_state", [-2, "last_hidden_state"]),
    ],
)
def test_layer_code_is_parsed(text: str, code: object) -> None:
    assert parse_layer_code(text) == code


@pytest.mark.parametrize("text", ["", "-2,", "two", "-2 -5", "1.5"])
def test_typing_errors_are_refused_when_the_code_is_used(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a layer code"):
        normalise_layers(parse_layer_code(text), 24)


def test_layers_are_named_as_on_the_command_line() -> None:
    assert [name_layer(layer, 24) for layer in (0, 24, 25)] == ["0", "24", "last_hidden_state"]


@pytest.mark.parametrize(
    ("layer", "meant"),
    [("-2", "-2"), ("-2,-5", r"\[-2, -5\]"), ("last_hidden_state,3", r"\['last_hidden_state', 3\]"), (["6", -2], "6")],
)
def test_quoted_code_has_advice_to_drop_the_quotes(layer: str | list[str | int], meant: str) -> None:
    with pytest.raises(ConfigError, match=f"is not a layer code; .* Write {meant}, without quotes"):
        read_layer_code(layer, "patch", 24)


def test_quoted_shift_has_advice_to_drop_the_quotes() -> None:
    with pytest.raises(ConfigError, match=r"not a valid shift for slicefour: .* Write -2, without quotes"):
        read_layer_code("-2", "slicefour_patch", 24)


@pytest.mark.parametrize("layer", ["sliceseven", "1.5", "", "a,b", 1.5, True])
def test_invalid_code_has_no_advice_on_quotes(layer: Any) -> None:
    with pytest.raises(ConfigError) as failure:
        read_layer_code(layer, "patch", 24)
    assert "without quotes" not in str(failure.value)
