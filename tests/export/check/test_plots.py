"""A plot is held by the ink that a fact must leave in it."""

import io
import math
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from PIL import Image, ImageColor

from tests.export import made_up
from trtower.errors import InputError
from trtower_export.check.report.plots import TokenDistances, draw_layers, draw_tokens
from trtower_export.drawing import BLUE, ORANGE, RED
from trtower_export.precision import heatmap
from trtower_export.precision.heatmap import draw_heatmap

pytest.importorskip("matplotlib")

LINE = 200
"""Pixels of one colour that a line leaves at least; its entry in the legend leaves fewer."""

LABELS = {"num_layers": 4, "torch_label": "PyTorch FP16"}


@dataclass(frozen=True, kw_only=True)
class Operation:
    name: str
    layer: int | None
    part: str
    largest: float = 10.0
    overflow: int = 0
    error: dict[str, float | None] = field(default_factory=lambda: {"fp16": 1e-5})


def tower(layers: int, parts: int) -> list[Operation]:
    inner = [
        Operation(name=f"layers.{layer}.op{part}", layer=layer, part=f"op{part}")
        for layer in range(layers)
        for part in range(parts)
    ]
    stem, norm = (Operation(name=name, layer=None, part=name) for name in ("stem.0.patch", "final_norm"))
    return [stem, *inner, norm]


def pixels(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    image.load()
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


def inked(png: bytes, colour: str) -> int:
    return int((pixels(png) == ImageColor.getrgb(colour)).all(axis=-1).sum())


def test_both_errors_are_drawn() -> None:
    png = draw_layers(made_up.layers(), **LABELS)
    assert inked(png, BLUE) > LINE
    assert inked(png, ORANGE) > LINE


def test_first_jump_is_marked() -> None:
    plain, marked = (draw_layers(made_up.layers(), **LABELS, first_jump=jump) for jump in (None, 2))
    assert inked(plain, RED) == 0
    assert inked(marked, RED) > LINE


def test_first_jump_that_is_not_finite_is_marked() -> None:
    layers = made_up.layers((1e-4, 2e-4, None, None))
    without, marked = (draw_layers(layers, **LABELS, first_jump=jump) for jump in (None, 2))
    assert inked(marked, RED) > inked(without, RED) + LINE


def test_state_that_is_not_finite_leaves_a_cross() -> None:
    assert inked(draw_layers(made_up.layers((1e-4, None, 2e-4, 3e-4)), **LABELS), RED) > LINE


@pytest.mark.parametrize(
    "errors",
    [(), (None,), (0.0,), (1e-3,), (None, None), (0.0, 0.0, 1e-6), (math.nan, math.inf, 1e-3, 1e-3)],
)
def test_layers_of_any_figures_are_drawn(errors: tuple[float | None, ...]) -> None:
    for limit in (None, 1e-2):
        pixels(draw_layers(made_up.layers(errors), **LABELS, read=(3, 5, 3), limit=limit, first_jump=0))


def test_bound_is_drawn_among_the_tokens() -> None:
    values = np.logspace(-7, -4, 500)
    free, bound = (draw_tokens([TokenDistances(label="p", values=values, limit=limit)]) for limit in (None, 1e-3))
    assert inked(free, RED) == 0
    assert inked(bound, RED) > LINE


def test_single_token_far_off_shows_among_thousands() -> None:
    values = np.full(50_000, 1e-6)
    values[7] = 1e-2
    image = pixels(draw_tokens([TokenDistances(label="p", values=values)]))
    blue = np.flatnonzero((image == ImageColor.getrgb(BLUE)).all(axis=-1).sum(axis=0) > 20)
    assert blue.max() - blue.min() > image.shape[1] // 2


@pytest.mark.parametrize(
    "values", [[], [0.0], [math.nan], [math.inf, math.nan], [0.0, math.nan, 2.0], [1e-3], [-1e-17, 1e-6]]
)
def test_tokens_of_any_distance_are_drawn(values: list[float]) -> None:
    series = TokenDistances(label="photographs", values=np.array(values, np.float32), limit=1e-3)
    for several in ([series], [series, replace(series, limit=None), replace(series, limit=1e-2)]):
        pixels(draw_tokens(several))
    pixels(draw_tokens([]))


def test_drawing_leaves_pyplot_out() -> None:
    loaded = "matplotlib.pyplot" in sys.modules
    draw_tokens([TokenDistances(label="p", values=np.array([1e-3]))])
    draw_heatmap(tower(2, 2))
    assert ("matplotlib.pyplot" in sys.modules) == loaded


def test_plot_is_the_same_file_each_time() -> None:
    assert draw_layers(made_up.layers(), **LABELS) == draw_layers(made_up.layers(), **LABELS)
    assert draw_heatmap(tower(2, 2)) == draw_heatmap(tower(2, 2))


def cells(png: bytes, operations: list[Operation], longest: str) -> np.ndarray:
    """Cut the left panel out of a heat map, from the first row of layers: its place follows from the labels."""
    measure = heatmap._measurer()
    left = heatmap.MARGIN + measure([longest]) + 14
    rows = len({operation.layer for operation in operations if operation.layer is not None})
    columns = len({operation.part for operation in operations if operation.layer is not None})
    top = heatmap.TITLE + heatmap.CELL_HEIGHT + heatmap.GAP
    image = pixels(png)[top : top + rows * heatmap.CELL_HEIGHT, left : left + columns * heatmap.CELL_WIDTH]
    return image.reshape(rows, heatmap.CELL_HEIGHT, columns, heatmap.CELL_WIDTH, 3).transpose(0, 2, 1, 3, 4)


def test_cells_beyond_the_largest_fp16_are_outlined_and_red_and_no_others() -> None:
    operations = tower(3, 7)
    operations[1 + 7 + 4] = replace(operations[1 + 7 + 4], largest=3e5, overflow=2)  # layer 1, op4
    grid = cells(draw_heatmap(operations), operations, "stem.0.patch")
    dark = (grid == ImageColor.getrgb(heatmap.BROKEN)).all(axis=-1).sum(axis=(2, 3))
    assert dark[1, 4] > 2 * heatmap.CELL_WIDTH
    dark[1, 4] = 0
    assert not dark.any()
    red, _, blue = grid[1, 4].reshape(-1, 3).mean(axis=0)
    assert red > 2 * blue
    calm = grid[0, 0].reshape(-1, 3).mean(axis=0)
    assert calm[2] > calm[0]


def test_overflow_alone_marks_a_cell() -> None:
    operations = tower(3, 7)
    operations[1] = replace(operations[1], largest=65504.0, overflow=1)
    grid = cells(draw_heatmap(operations), operations, "stem.0.patch")
    assert (grid[0, 0] == ImageColor.getrgb(heatmap.BROKEN)).all(axis=-1).sum() > 2 * heatmap.CELL_WIDTH


@pytest.mark.parametrize("largest", [math.nan, math.inf])
def test_cell_that_is_not_finite_is_black(largest: float) -> None:
    operations = tower(3, 7)
    operations[1] = replace(operations[1], largest=largest, error={"fp16": None})
    grid = cells(draw_heatmap(operations), operations, "stem.0.patch")
    black = (grid == ImageColor.getrgb(heatmap.BROKEN)).all(axis=-1).mean(axis=(2, 3))
    assert black[0, 0] > 0.5
    assert black.sum() == black[0, 0]


def test_operation_that_a_layer_lacks_is_blank() -> None:
    operations = [op for op in tower(3, 7) if op.name != "layers.2.op5"]
    grid = cells(draw_heatmap(operations), operations, "stem.0.patch")
    assert (grid[2, 5] == 255).all()
    assert (grid[1, 5] != 255).any()


def test_panel_of_errors_is_left_out_where_none_was_measured() -> None:
    measured = tower(3, 7)
    bare = [replace(operation, error={}) for operation in measured]
    assert pixels(draw_heatmap(measured)).shape[1] > 1.5 * pixels(draw_heatmap(bare)).shape[1]
    assert draw_heatmap(measured, precision="bf16") == draw_heatmap(bare)


def test_operation_whose_error_was_not_measured_adds_a_word_to_the_legend() -> None:
    whole = tower(3, 7)
    partly = [replace(whole[0], error={}), *whole[1:]]
    legend = [pixels(draw_heatmap(operations))[-heatmap.LEGEND :] for operations in (whole, partly)]
    assert (legend[0] != legend[1]).any()


@pytest.mark.parametrize(("layers", "parts"), [(24, 14), (12, 16), (4, 3), (1, 1), (0, 0)])
def test_towers_of_any_shape_are_drawn(layers: int, parts: int) -> None:
    height, _, _ = pixels(draw_heatmap(tower(layers, parts), title="t" * 90)).shape
    assert height > heatmap.TITLE + layers * heatmap.CELL_HEIGHT


def test_heat_map_of_zeros_and_none_is_drawn() -> None:
    zeros = [replace(operation, largest=0.0, error={"fp16": 0.0}) for operation in tower(2, 2)]
    nothing = [replace(operation, error={"fp16": None}) for operation in tower(2, 2)]
    for operations in (zeros, nothing, zeros[1:3]):
        pixels(draw_heatmap(operations))
    with pytest.raises(InputError, match="no operation"):
        draw_heatmap([])
