"""Draw a tower's operations, layer by layer, as two heat maps: the largest magnitude of each, and its error in FP16."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trtower_export.drawing import GREY, INK, RULE, new_figure, to_png
from trtower_export.precision.doctor import OperationFigures
from trtower_export.precision.rounding import FP16_RANGE

LIMIT = f"{FP16_RANGE.max:,.0f}".replace(",", " ")

# In pixels. They determine the size of the figure; matplotlib lays out its contents.
DPI = 200
CELL_WIDTH, CELL_HEIGHT = 58, 40
CHARACTER, BAR, HEADINGS = 11, 190, 280
MIN_COLUMNS = 11  # wide enough for a panel's title

GAP = 0.06
"""The gap between two cells, as a share of a cell."""

CALM = ("#f4f7fa", "#c6dbe9", "#7fb0d0", "#3a7cae", "#17496f")
"""Colours of values that fit FP16: pale with much headroom, dark near FP16's largest number."""
ALARM = ("#ff8c69", "#d7263d", "#8d0d1f")
"""Colours of values that do not fit."""
COST = ("#fbf7ee", "#f3dca6", "#e0a94f", "#b36a1c", "#5f2d07")
BROKEN, UNMEASURED = "#101418", "#eceff2"
BEYOND = "✕"


@dataclass(frozen=True)
class _Panel:
    """One heat map: a value for each operation (None if not measured) on a log scale that spans at least ``decades``.

    ``alarm`` are colours for values above 1. A panel that has them also marks the operations that overflow in FP16.
    """

    title: str
    values: Sequence[float | None]
    decades: tuple[int, int]
    calm: Sequence[str]
    alarm: Sequence[str] = ()

    def scale(self) -> tuple[Any, range]:
        """Return matplotlib's mapping from values to colours, and the powers of ten that it spans."""
        from matplotlib import cm, colors

        logs = [math.log10(value) for value in self.values if value is not None and 0 < value < math.inf]
        low, high = min([self.decades[0], *map(math.floor, logs)]), max([self.decades[1], *map(math.ceil, logs)])
        full = -low / (high - low) if self.alarm else 1.0  # the position of the value 1 on the scale, from 0 to 1
        stops = [(full * index / (len(self.calm) - 1), colour) for index, colour in enumerate(self.calm)]
        stops += [(full + (1 - full) * index / (len(self.alarm) - 1), each) for index, each in enumerate(self.alarm)]
        cmap = colors.LinearSegmentedColormap.from_list("", stops, N=512).with_extremes(bad=BROKEN)
        norm = colors.LogNorm(10.0**low, 10.0**high)
        return cm.ScalarMappable(norm, cmap), range(low, high + 1)


def draw_heatmap(operations: Sequence[OperationFigures]) -> bytes:
    """Draw a PNG of layers by operations: the largest magnitude as a share of FP16's, and the error of rounding.

    Each operation outside the layers has its own row, as wide as all columns. A cell is blank if a layer has no such
    operation. The second panel is left out if no error in FP16 was measured.
    """
    shares = [each.largest / FP16_RANGE.max for each in operations]
    errors = [_error(each) for each in operations]
    panels = [_Panel(f"Largest magnitude, as a share of FP16's {LIMIT}", shares, (-4, 1), CALM, ALARM)]
    if any(error is not None for error in errors):
        panels.append(_Panel("Error at the output, only this operation in FP16", errors, (-5, -3), COST))
    parts = list(dict.fromkeys(each.part for each in operations if each.layer is not None))
    rows = _arrange(operations)
    width = max(map(len, rows)) * CHARACTER + len(panels) * (max(len(parts), MIN_COLUMNS) * CELL_WIDTH + BAR)
    height = HEADINGS + (len(rows) + 1) * CELL_HEIGHT + max(map(len, parts), default=0) * CHARACTER
    figure = new_figure(width, height, dpi=DPI, purpose="the heat map")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    figure.suptitle("Where half precision is at risk", x=0.02, ha="left", fontsize=10, color=INK, weight="bold")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        axes.set_title(panel.title, loc="left", fontsize=7.5, color=INK, pad=9)
        axes.tick_params(length=0, labelsize=6.6, labelcolor=INK)
        axes.set_xticks([index + 0.5 for index in range(len(parts))], parts, rotation=90, parse_math=False)
        axes.set_yticks(list(rows.values()), list(rows), parse_math=False)
        axes.set(xlim=(0, max(len(parts), 1)), ylim=(max(rows.values()) + 0.5, -0.5))
        axes.spines[:].set_visible(False)
        scale, decades = panel.scale()
        _draw_cells(axes, panel, scale, operations, parts, rows)
        bar = figure.colorbar(scale, ax=axes, fraction=0.06, pad=0.03, aspect=1.6 * len(rows))
        _label_scale(bar, decades, limited=bool(panel.alarm))
    _draw_legend(figure, gaps=len(panels) > 1 and None in errors)
    return to_png(figure)


def _error(operation: OperationFigures) -> float | None:
    """Return the error in FP16: infinite if it is not finite, None if it was not measured."""
    error = operation.error.get("fp16")
    return math.inf if error is None and "fp16" in operation.error else error


def _row(operation: OperationFigures) -> str:
    return operation.part if operation.layer is None else f"layer {operation.layer}"


def _mark(operation: OperationFigures, value: float | None, *, limited: bool) -> str:
    """Return the symbol in an operation's cell."""
    if value is not None and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞"
    return BEYOND if limited and (operation.overflow or operation.largest > FP16_RANGE.max) else ""


def _arrange(operations: Sequence[OperationFigures]) -> dict[str, float]:
    """Return each row's position, from the top down in execution order, with a gap between layers and the rest."""
    rows: dict[str, float] = {}
    y, inside = -1.0, operations[0].layer is not None
    for operation in operations:
        if _row(operation) not in rows:
            y += 1.0 if inside == (operation.layer is not None) else 1.5
            inside = operation.layer is not None
            rows[_row(operation)] = y
    return rows


def _draw_cells(
    axes: Any,
    panel: _Panel,
    scale: Any,
    operations: Sequence[OperationFigures],
    parts: Sequence[str],
    rows: Mapping[str, float],
) -> None:
    limited = bool(panel.alarm)
    marks = [_mark(each, value, limited=limited) for each, value in zip(operations, panel.values, strict=True)]
    cells = axes.barh(
        [rows[_row(each)] for each in operations],
        [(1 if each.layer is not None else max(len(parts), 1)) - GAP for each in operations],
        left=[GAP / 2 + (parts.index(each.part) if each.layer is not None else 0) for each in operations],
        height=1 - GAP,
        color=[UNMEASURED if value is None else scale.to_rgba(max(value, scale.norm.vmin)) for value in panel.values],
        edgecolor=[BROKEN if mark == BEYOND else "none" for mark in marks],
        linewidth=1.3,
    )
    axes.bar_label(cells, marks, label_type="center", color="white", fontsize=6, weight="bold")


def _label_scale(bar: Any, decades: range, *, limited: bool) -> None:
    names = {each: rf"$10^{{{each}}}$" for each in decades} | ({0: LIMIT} if limited else {})
    bar.set_ticks([10.0**each for each in decades], labels=list(names.values()))
    bar.minorticks_off()
    bar.ax.tick_params(length=2, color=RULE, labelsize=6.6, labelcolor=GREY)
    bar.outline.set_color(RULE)
    if limited:
        bar.ax.axhline(1, color=BROKEN, linewidth=2)


def _draw_legend(figure: Any, *, gaps: bool) -> None:
    from matplotlib.patches import Patch

    entries = [
        Patch(facecolor=ALARM[1], edgecolor=BROKEN, label=f"{BEYOND} beyond {LIMIT}: infinite in FP16"),
        Patch(facecolor=BROKEN, label="∞ not finite"),
        *([Patch(facecolor=UNMEASURED, edgecolor=RULE, label="not measured")] if gaps else []),
    ]
    figure.legend(handles=entries, loc="outside lower left", ncols=3, frameon=False, fontsize=6.6, labelcolor=GREY)
