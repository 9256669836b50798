"""Draw a tower's operations, layer by layer, as two heat maps: the headroom of FP16, and what its rounding costs."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trtower.errors import InputError
from trtower.extras import import_extra
from trtower_export.drawing import GREY, INK, RULE, new_figure, to_png
from trtower_export.precision.rounding import FP16_RANGE

LIMIT = f"{FP16_RANGE.max:,.0f}".replace(",", " ")

PURPOSE = "the heat map"

# The layout, in pixels.
DPI = 200
CELL_WIDTH, CELL_HEIGHT = 58, 40
GAP = 22
MARGIN = 40
TITLE = 150
BAR_GAP, BAR_WIDTH, BAR_LABELS = 34, 26, 150
LEGEND = 96
FONT, HEADING = 6.6, 10
MIN_WIDTH = 600  # of the legend, whatever the columns take
MIN_COLUMNS = 6  # the headings of the two panels would touch

SCALE_FLOOR = -4.0
"""The headroom's colours reach at least from a ten-thousandth of FP16's largest number ..."""
SCALE_TOP = 1.0
"""... to ten times as much."""

CALM = ("#f4f7fa", "#c6dbe9", "#7fb0d0", "#3a7cae", "#17496f")
"""Headroom left: pale where there is much of it, dark towards FP16's largest number."""
ALARM = ("#ff8c69", "#d7263d", "#8d0d1f")
"""None left."""
COST = ("#fbf7ee", "#f3dca6", "#e0a94f", "#b36a1c", "#5f2d07")
BROKEN = "#101418"
UNMEASURED = "#eceff2"


class OperationFigures(Protocol):
    """What one operation's output was over the images, and what rounding it costs."""

    @property
    def name(self) -> str:
        """Its whole name: "layers.3.mlp.fc1"."""

    @property
    def layer(self) -> int | None:
        """Its layer, None outside the layers."""

    @property
    def part(self) -> str:
        """Its name within its layer, "mlp.fc1"; outside, the whole name."""

    @property
    def largest(self) -> float:
        """The largest magnitude."""

    @property
    def overflow(self) -> int:
        """How many values lie beyond FP16's largest number."""

    @property
    def error(self) -> Mapping[str, float | None]:
        """The relative error at the output when this operation alone is rounded, by precision; None: not finite."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where an operation is drawn: its row from the top, its first column, how many columns it spans."""

    operation: OperationFigures
    row: float
    column: int
    span: int


@dataclass(frozen=True, kw_only=True)
class _Layout:
    places: tuple[_Place, ...]
    labels: tuple[tuple[float, str], ...]
    columns: tuple[str, ...]
    rows: float


def draw_heatmap(operations: Sequence[OperationFigures], *, precision: str = "fp16", title: str = "") -> bytes:
    """Draw layers by operations, as a PNG: the largest magnitude beside FP16's, and the error of rounding it alone.

    What lies outside the layers has a row of its own, as wide as all columns, above them or below. A cell is blank
    where a layer has no such operation. The second panel is left out where no error in ``precision`` was measured.
    """
    if not operations:
        raise InputError("the heat map has no operation; expected one or more")
    layout = _arrange(operations)
    measured = any(precision in operation.error for operation in operations)
    measure = _measurer()
    left = MARGIN + measure([text for _, text in layout.labels]) + 14
    bottom = LEGEND + measure(list(layout.columns)) + 24
    columns = max(len(layout.columns), MIN_COLUMNS)
    panel = (columns * CELL_WIDTH, round(layout.rows * CELL_HEIGHT))
    step = panel[0] + BAR_GAP + BAR_WIDTH + BAR_LABELS
    title = title or "Where half precision is at risk"
    width = max(
        left + (2 if measured else 1) * step + MARGIN // 2, measure([title], HEADING) + 2 * MARGIN, left + MIN_WIDTH
    )
    height = TITLE + panel[1] + bottom
    figure = new_figure(width, height, dpi=DPI, purpose=PURPOSE)
    figure.text(
        MARGIN / width, 1 - 48 / height, title, fontsize=HEADING, color=INK, weight="bold",
        va="center", parse_math=False,
    )  # fmt: skip

    def add(x: int, box_width: int) -> Any:
        return figure.add_axes((x / width, bottom / height, box_width / width, panel[1] / height))

    def draw(x: int, heading: str, scale: "_Scale", *, labelled: bool) -> None:
        figure.text(x / width, 1 - 112 / height, heading, fontsize=7.5, color=INK, va="center")
        _draw_cells(add(x, panel[0]), layout, columns, scale, labelled=labelled)
        _draw_bar(add(x + panel[0] + BAR_GAP, BAR_WIDTH), scale)

    draw(left, f"Largest magnitude, as a share of FP16's {LIMIT}", _headroom(operations), labelled=True)
    if measured:
        name = precision.upper()
        draw(
            left + step,
            f"Error at the output, this operation alone in {name}",
            _cost(operations, precision),
            labelled=False,
        )
    gaps = measured and not all(precision in operation.error for operation in operations)
    _draw_legend(figure, left, width, height, gaps=gaps)
    return to_png(figure)


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """How a panel colours an operation: by log10 of ``value``, None where it was not measured.

    ``beyond`` says which operations are past the line at 0 of the scale, where ``line`` has it.
    """

    value: Callable[[OperationFigures], float | None]
    beyond: Callable[[OperationFigures], bool]
    colours: Any
    low: float
    high: float
    line: str = ""

    def log(self, value: float) -> float:
        return math.log10(value) if value > 0 else self.low


def _headroom(operations: Sequence[OperationFigures]) -> _Scale:
    shares = [operation.largest / FP16_RANGE.max for operation in operations]
    logs = [math.log10(share) for share in shares if share > 0 and math.isfinite(share)]
    low = min([SCALE_FLOOR, *(math.floor(log) for log in logs)])
    high = max([SCALE_TOP, *(math.ceil(log) for log in logs)])
    zero = -low / (high - low)
    stops = [(zero * index / (len(CALM) - 1), colour) for index, colour in enumerate(CALM)]
    stops += [(zero + (1 - zero) * index / (len(ALARM) - 1), colour) for index, colour in enumerate(ALARM)]
    return _Scale(
        value=lambda operation: operation.largest / FP16_RANGE.max,
        beyond=lambda operation: operation.overflow > 0 or operation.largest > FP16_RANGE.max,
        colours=_colormap(stops),
        low=low,
        high=high,
        line=LIMIT,
    )


def _cost(operations: Sequence[OperationFigures], precision: str) -> _Scale:
    errors = [operation.error.get(precision) for operation in operations]
    logs = [math.log10(error) for error in errors if error is not None and 0 < error < math.inf]
    low, high = (math.floor(min(logs)), math.ceil(max(logs))) if logs else (-6, -2)
    if high - low < 2:
        low = high - 2
    stops = [(index / (len(COST) - 1), colour) for index, colour in enumerate(COST)]

    def value(operation: OperationFigures) -> float | None:
        if precision not in operation.error:
            return None
        error = operation.error[precision]
        return math.inf if error is None else error

    return _Scale(value=value, beyond=lambda operation: False, colours=_colormap(stops), low=low, high=high)


def _arrange(operations: Sequence[OperationFigures]) -> _Layout:
    """Give each operation its place. Columns stand in the order of first appearance, layers in their own."""
    columns = tuple(dict.fromkeys(operation.part for operation in operations if operation.layer is not None))
    layers = sorted({operation.layer for operation in operations if operation.layer is not None})
    first = next((index for index, operation in enumerate(operations) if operation.layer is not None), len(operations))
    above = [operation for operation in operations[:first] if operation.layer is None]
    below = [operation for operation in operations[first:] if operation.layer is None]
    span = max(len(columns), MIN_COLUMNS)
    gap = GAP / CELL_HEIGHT
    start = len(above) + (gap if above else 0)
    end = start + len(layers) + (gap if below else 0)
    rows = {layer: start + index for index, layer in enumerate(layers)}
    places = [_Place(operation=operation, row=index, column=0, span=span) for index, operation in enumerate(above)]
    places += [
        _Place(operation=operation, row=end + index, column=0, span=span) for index, operation in enumerate(below)
    ]
    for operation in operations:
        if operation.layer is not None:
            column = columns.index(operation.part)
            places.append(_Place(operation=operation, row=rows[operation.layer], column=column, span=1))
    labels = [(place.row, place.operation.part) for place in places if place.operation.layer is None]
    labels += [(row, f"layer {layer}") for layer, row in rows.items()]
    return _Layout(places=tuple(places), labels=tuple(labels), columns=columns, rows=end + len(below))


def _draw_cells(axes: Any, layout: _Layout, columns: int, scale: _Scale, *, labelled: bool) -> None:
    rectangle = import_extra("matplotlib.patches", extra="report", purpose=PURPOSE).Rectangle
    axes.set(xlim=(0, columns), ylim=(layout.rows, 0))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=FONT, labelcolor=INK, pad=3)
    axes.set_xticks([index + 0.5 for index in range(len(layout.columns))])
    axes.set_xticklabels(layout.columns, rotation=90, parse_math=False)
    axes.set_yticks([row + 0.5 for row, _ in layout.labels] if labelled else [])
    if labelled:
        axes.set_yticklabels([text for _, text in layout.labels], parse_math=False)
    for place in layout.places:
        value = scale.value(place.operation)
        broken = value is not None and not math.isfinite(value)
        if value is None:
            colour = UNMEASURED
        elif broken:
            colour = BROKEN
        else:
            colour = scale.colours((scale.log(value) - scale.low) / (scale.high - scale.low))
        box = {"xy": (place.column, place.row), "width": place.span, "height": 1}
        axes.add_patch(rectangle(**box, facecolor=colour, edgecolor="white", linewidth=0.8))
        middle = (place.column + place.span / 2, place.row + 0.52)
        if broken:
            axes.text(
                *middle,
                "NaN" if math.isnan(value or 0) else "∞",
                fontsize=5.5,
                color="white",
                ha="center",
                va="center",
                weight="bold",
                zorder=4,
            )
        elif scale.beyond(place.operation):
            inner = {"xy": (place.column + 0.04, place.row + 0.06), "width": place.span - 0.08, "height": 0.88}
            axes.add_patch(rectangle(**inner, fill=False, edgecolor=BROKEN, linewidth=1.3, zorder=3))
            axes.text(*middle, "✕", fontsize=6.5, color="white", ha="center", va="center", weight="bold", zorder=4)


def _draw_bar(axes: Any, scale: _Scale) -> None:
    """Draw the scale from bottom to top, in powers of ten, and the line that no value may pass."""
    steps = 256
    axes.imshow(
        [[scale.colours(index / (steps - 1))] for index in range(steps)],
        aspect="auto",
        origin="lower",
        extent=(0, 1, scale.low, scale.high),
    )
    axes.set(xlim=(0, 1), ylim=(scale.low, scale.high), xticks=[])
    axes.yaxis.tick_right()
    exponents = range(math.ceil(scale.low), math.floor(scale.high) + 1)
    ticks = [exponent for exponent in exponents if not (scale.line and exponent == 0)]
    axes.set_yticks(ticks, [rf"$10^{{{exponent}}}$" for exponent in ticks])
    axes.tick_params(length=2, color=RULE, labelsize=FONT, labelcolor=GREY, pad=2)
    axes.spines[:].set_color(RULE)
    if scale.line:
        axes.plot([-0.45, 1.35], [0, 0], color=BROKEN, linewidth=1.6, clip_on=False, zorder=5)
        axes.text(1.5, 0, scale.line, fontsize=FONT, color=INK, weight="bold", va="center")


def _draw_legend(figure: Any, left: int, width: int, height: int, *, gaps: bool) -> None:
    rectangle = import_extra("matplotlib.patches", extra="report", purpose=PURPOSE).Rectangle
    entries = [(ALARM[1], "✕", f"beyond {LIMIT}: infinite in FP16"), (BROKEN, "∞", "not finite")]
    if gaps:
        entries.append((UNMEASURED, "", "not measured"))
    x, y = left, 44
    for colour, sign, text in entries:
        box = {
            "xy": (x / width, (y - CELL_HEIGHT / 2) / height),
            "width": CELL_WIDTH / width,
            "height": CELL_HEIGHT / height,
        }
        edge = BROKEN if sign else RULE
        figure.add_artist(
            rectangle(**box, facecolor=colour, edgecolor=edge, linewidth=1.2, transform=figure.transFigure)
        )
        figure.text(
            (x + CELL_WIDTH / 2) / width,
            y / height,
            sign,
            fontsize=6.5,
            color="white",
            ha="center",
            va="center",
            weight="bold",
        )
        artist = figure.text((x + CELL_WIDTH + 12) / width, y / height, text, fontsize=FONT, color=GREY, va="center")
        x += CELL_WIDTH + 12 + round(artist.get_window_extent(figure.canvas.get_renderer()).width) + 44


def _colormap(stops: Sequence[tuple[float, str]]) -> Any:
    colors = import_extra("matplotlib.colors", extra="report", purpose=PURPOSE)
    return colors.LinearSegmentedColormap.from_list("", list(stops), N=512)


def _measurer() -> Callable[..., int]:
    """Give a function that says how many pixels the widest of some labels takes."""
    figure = new_figure(100, 100, dpi=DPI, purpose=PURPOSE)
    renderer = figure.canvas.get_renderer()

    def measure(texts: Sequence[str], size: float = FONT) -> int:
        artists = [figure.text(0, 0, text, fontsize=size, parse_math=False) for text in texts]
        return max((round(artist.get_window_extent(renderer).width) for artist in artists), default=0)

    return measure
