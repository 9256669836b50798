"""Plots are tested by the ink that each fact must leave in them."""

import io
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageColor

from tests.export import made_up
from trtower_export.check.report.plots import TokenDistances, draw_layers, draw_tokens
from trtower_export.drawing import BLUE, ORANGE, RED, to_png
from trtower_export.precision import heatmap
from trtower_export.precision.doctor import OperationFigures
from trtower_export.precision.heatmap import draw_heatmap

pytest.importorskip("matplotlib")

LINE = 200
"""A line leaves at least this many pixels of its colour; its entry in the legend leaves fewer."""

LABELS: dict[str, Any] = {"num_layers": 4, "torch_label": "PyTorch FP16"}


def operation(name: str, layer: int | None = None, part: str = "") -> OperationFigures:
    return OperationFigures(
        name=name,
        layer=layer,
        part=part or name,
        largest=10.0,
        overflow=0,
        subnormal=0.0,
        error={"fp16": 1e-5, "bf16": 1e-4},
    )


def tower(layers: int, parts: int) -> list[OperationFigures]:
    inner = [
        operation(f"layers.{layer}.op{part}", layer, f"op{part}") for layer in range(layers) for part in range(parts)
    ]
    return [operation("stem.0.patch"), *inner, operation("final_norm")]


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


def test_drawing_does_not_import_pyplot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails, even if another test has
    draw_tokens([TokenDistances(label="p", values=np.array([1e-3]))])
    draw_heatmap(tower(2, 2))


def test_plot_is_the_same_file_each_time() -> None:
    assert draw_layers(made_up.layers(), **LABELS) == draw_layers(made_up.layers(), **LABELS)
    assert draw_heatmap(tower(2, 2)) == draw_heatmap(tower(2, 2))


class HeatMap:
    """A heat map as drawn: the colours and texts of its cells, by panel, row and column."""

    def __init__(self, operations: Sequence[OperationFigures]) -> None:
        figures: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(heatmap, "to_png", lambda figure: figures.append(figure) or to_png(figure))
            self.pixels = pixels(draw_heatmap(operations))
        (self.figure,) = figures
        # In the list of axes, each panel is followed by its scale.
        self.panels = [axes for axes in self.figure.axes if axes.get_title(loc="left")]
        self.scales = [axes for axes in self.figure.axes if axes not in self.panels]

    def box(self, row: str, column: str | None, panel: int) -> tuple[slice, slice]:
        """Find a cell by the labels of its row and column; without a column, the whole row."""
        axes, first = self.panels[panel], self.panels[0]  # only the first has row names
        y = dict(zip(map(text_of, first.get_yticklabels()), first.get_yticks(), strict=True))[row]
        places = dict(zip(map(text_of, axes.get_xticklabels()), axes.get_xticks(), strict=True))
        left, right = axes.get_xlim() if column is None else (places[column] - 0.5, places[column] + 0.5)
        (x0, y0), (x1, y1) = axes.transData.transform([(left, y - 0.5), (right, y + 0.5)]).round().astype(int)
        height = len(self.pixels)
        return slice(height - y0, height - y1), slice(x0, x1)

    def cell(self, row: str, column: str | None = None, panel: int = 0) -> np.ndarray:
        return self.pixels[self.box(row, column, panel)]

    def fill(self, row: str, column: str | None = None, panel: int = 0) -> tuple[int, ...]:
        """Find the most frequent colour of a cell."""
        shades, counts = np.unique(self.cell(row, column, panel).reshape(-1, 3), axis=0, return_counts=True)
        return tuple(shades[counts.argmax()].tolist())

    def mark(self, row: str, column: str | None = None, panel: int = 0) -> str:
        """Find the text in the middle of a cell."""
        rows, columns = self.box(row, column, panel)
        words = ""
        for text in self.panels[panel].texts:
            box = text.get_window_extent()
            x, y = (box.x0 + box.x1) / 2, len(self.pixels) - (box.y0 + box.y1) / 2
            if text_of(text) and rows.start < y < rows.stop and columns.start < x < columns.stop:
                words += text_of(text)
        return words

    def marks(self) -> list[str]:
        return [text_of(text) for axes in self.panels for text in axes.texts if text_of(text)]

    def legend(self) -> list[str]:
        return [text_of(text) for text in self.figure.legends[0].get_texts()]


def text_of(text: Any) -> str:
    return str(text.get_text())


def outlined(cell: np.ndarray) -> bool:
    """Tell whether a dark line surrounds a cell; it may lie a pixel or two inside."""
    dark = (cell == ImageColor.getrgb(heatmap.BROKEN)).all(axis=-1)
    sides = (dark[:6].any(axis=0), dark[-6:].any(axis=0), dark[:, :6].any(axis=1), dark[:, -6:].any(axis=1))
    return all(side.mean() > 0.9 for side in sides)


def test_cells_beyond_the_largest_fp16_are_outlined_and_red_and_no_others() -> None:
    operations = tower(3, 7)
    operations[1 + 7 + 4] = replace(operations[1 + 7 + 4], largest=3e5, overflow=2)  # layer 1, op4
    drawn = HeatMap(operations)
    assert drawn.mark("layer 1", "op4") == "✕"
    assert outlined(drawn.cell("layer 1", "op4"))
    red, _, blue = drawn.fill("layer 1", "op4")
    assert red > 2 * blue
    assert drawn.marks() == ["✕"]
    calm = drawn.cell("layer 0", "op0")
    assert not outlined(calm)
    assert drawn.fill("layer 0", "op0")[2] > drawn.fill("layer 0", "op0")[0]
    assert not outlined(drawn.cell("layer 1", "op4", panel=1))


@pytest.mark.parametrize("changes", [{"largest": 65504.0, "overflow": 1}, {"largest": 65505.0}])
def test_overflow_or_magnitude_marks_a_cell(changes: dict[str, Any]) -> None:
    operations = tower(3, 7)
    operations[1] = replace(operations[1], **changes)
    drawn = HeatMap(operations)
    assert drawn.mark("layer 0", "op0") == "✕"
    assert outlined(drawn.cell("layer 0", "op0"))


def test_operation_that_fits_exactly_is_not_marked() -> None:
    operations = tower(3, 7)
    operations[1] = replace(operations[1], largest=65504.0)
    assert HeatMap(operations).marks() == []


def test_operation_outside_the_layers_can_be_marked() -> None:
    operations = tower(3, 7)
    operations[0] = replace(operations[0], largest=1e5, overflow=1)
    drawn = HeatMap(operations)
    assert drawn.mark("stem.0.patch") == "✕"
    assert outlined(drawn.cell("stem.0.patch"))


@pytest.mark.parametrize(("largest", "sign"), [(math.nan, "NaN"), (math.inf, "∞")])
def test_cell_that_is_not_finite_is_black(largest: float, sign: str) -> None:
    operations = tower(3, 7)
    operations[1] = replace(operations[1], largest=largest, error={"fp16": None})
    drawn = HeatMap(operations)
    for panel, mark in enumerate((sign, "∞")):
        assert drawn.fill("layer 0", "op0", panel) == ImageColor.getrgb(heatmap.BROKEN)
        assert drawn.mark("layer 0", "op0", panel) == mark
        assert drawn.fill("layer 0", "op1", panel) != ImageColor.getrgb(heatmap.BROKEN)
    assert drawn.marks() == [sign, "∞"]


def test_operation_that_a_layer_lacks_is_blank() -> None:
    drawn = HeatMap([each for each in tower(3, 7) if each.name != "layers.2.op5"])
    for panel in (0, 1):
        assert (drawn.cell("layer 2", "op5", panel) == 255).all()
        assert drawn.fill("layer 1", "op5", panel) != (255, 255, 255)


def test_cell_has_the_colour_of_its_value_on_the_scale() -> None:
    operations = tower(1, 5)
    for place, (largest, error) in enumerate([(40.0, 2e-5), (4e2, 5e-5), (4e3, 1e-4), (3e4, 5e-4), (2e5, 9e-4)], 1):
        operations[place] = replace(operations[place], largest=largest, error={"fp16": error})
    drawn = HeatMap(operations)
    for panel, axes in enumerate(drawn.scales):
        fills = []
        for place in range(5):
            shown = operations[1 + place]
            value = (shown.largest / 65504, shown.error["fp16"])[panel]
            x, y = axes.transAxes.transform((0.5, 0))[0], axes.transData.transform((0.5, value))[1]
            fills.append(drawn.fill("layer 0", f"op{place}", panel))
            on_scale = drawn.pixels[len(drawn.pixels) - round(y), round(x)]
            assert np.abs(on_scale - np.array(fills[-1])).max() <= 6
        brightness = [sum(fill) for fill in fills]
        assert brightness[:4] == sorted(brightness[:4], reverse=True), "cells must get darker towards the limit"


def test_scales_name_the_largest_fp16_and_powers_of_ten() -> None:
    headroom, cost = HeatMap(tower(3, 7)).scales
    names = dict(zip(headroom.get_yticks(), map(text_of, headroom.get_yticklabels()), strict=True))
    assert names[1.0] == "65 504"
    assert names[0.1] == "$10^{-1}$"
    assert list(map(text_of, cost.get_yticklabels())) == [f"$10^{{{power}}}$" for power in (-5, -4, -3)]


def test_panel_of_errors_is_left_out_if_none_was_measured() -> None:
    errors: tuple[dict[str, float | None], ...] = ({"fp16": 1e-5}, {})
    measured, bare = (HeatMap([replace(each, error=error) for each in tower(3, 7)]) for error in errors)
    titles = [[axes.get_title(loc="left") for axes in drawn.panels] for drawn in (measured, bare)]
    assert titles[0] == [
        "Largest magnitude, as a share of FP16's 65 504",
        "Error at the output, only this operation in FP16",
    ]
    assert titles[1] == titles[0][:1]
    assert bare.pixels.shape[1] < 0.7 * measured.pixels.shape[1]


def test_operation_without_measured_error_is_grey_and_named_in_the_legend() -> None:
    whole = tower(3, 7)
    signs = ["✕ beyond 65 504: infinite in FP16", "∞ not finite"]
    assert HeatMap(whole).legend() == signs
    partly = HeatMap([replace(whole[0], error={}), *whole[1:]])
    assert partly.legend() == [*signs, "not measured"]
    assert partly.fill("stem.0.patch", panel=1) == ImageColor.getrgb(heatmap.UNMEASURED)
    assert partly.fill("stem.0.patch", panel=0) != ImageColor.getrgb(heatmap.UNMEASURED)
    assert HeatMap([replace(each, error={}) for each in whole]).legend() == signs


@pytest.mark.parametrize(("layers", "parts"), [(48, 16), (24, 14), (12, 16), (4, 3), (1, 1), (0, 0)])
def test_towers_of_any_shape_are_legible(layers: int, parts: int) -> None:
    drawn = HeatMap(tower(layers, parts))
    expected = ["stem.0.patch", *(f"layer {layer}" for layer in range(layers)), "final_norm"]
    assert [text_of(label) for label in drawn.panels[0].get_yticklabels()] == expected
    assert [text_of(label) for label in drawn.panels[0].get_xticklabels()] == [f"op{part}" for part in range(parts)]
    for row in expected:
        height, width, _ = drawn.cell(row, "op0" if row.startswith("layer") else None).shape
        assert height > 30
        assert width > 30
    frame = drawn.figure.bbox
    for axis in (drawn.panels[0].xaxis, drawn.panels[0].yaxis):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
        assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 for box in boxes)
        assert not any(box.overlaps(after) for box, after in itertools.pairwise(boxes))
    titles = [axes._left_title.get_window_extent() for axes in drawn.panels]
    assert titles[0].x1 < titles[1].x0
    assert titles[1].x1 < frame.x1


def test_rows_outside_the_layers_are_as_wide_as_all_columns_and_stand_apart() -> None:
    drawn = HeatMap(tower(3, 7))
    stem, first, second = (drawn.box(row, None, 0)[0] for row in ("stem.0.patch", "layer 0", "layer 1"))
    assert first.start - stem.stop > 10
    assert abs(second.start - first.stop) <= 1
    row = drawn.cell("stem.0.patch")
    assert (row[len(row) // 2, 5:-5] == drawn.fill("stem.0.patch")).all()


def test_heat_map_of_zeros_and_none_is_drawn() -> None:
    zeros = [replace(each, largest=0.0, error={"fp16": 0.0}) for each in tower(2, 2)]
    nothing = [replace(each, error={"fp16": None}) for each in tower(2, 2)]
    for operations in (zeros, nothing, zeros[1:3]):
        pixels(draw_heatmap(operations))
    assert HeatMap(zeros).fill("layer 0", "op0") == ImageColor.getrgb(heatmap.CALM[0])
