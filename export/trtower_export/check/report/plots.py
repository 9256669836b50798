"""Plot the figures of a certificate: the error of each layer, and the distances of the tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trtower.bundle.certificate import LayerFigures
from trtower.layer_codes import name_layer
from trtower_export.drawing import BLUE, GREY, INK, ORANGE, RED, RULE, new_figure, to_png

DPI = 200
WIDTH, HEIGHT = 1500, 640
LEFT, RIGHT, BOTTOM, TOP = 0.085, 0.985, 0.155, 0.87
"""The position of the axes, as fractions of the figure."""

EXACT = 1e-16
"""The place of zero on a log scale: FP64 cannot resolve a smaller 1 - cosine."""

HALF_A_TOKEN = 0.5
"""The start of a histogram's log axis, so that a single token has a visible height."""

BINS_PER_DECADE = 8
MAX_TICKS = 28


@dataclass(frozen=True, kw_only=True)
class TokenDistances:
    """1 - cosine of many tokens, NaN if not finite, and its ``limit`` if it has one."""

    label: str
    values: npt.NDArray[Any]
    limit: float | None = None


def draw_layers(
    layers: Sequence[LayerFigures],
    *,
    num_layers: int,
    torch_label: str,
    read: Sequence[int] = (),
    limit: float | None = None,
    first_jump: int | None = None,
) -> bytes:
    """Plot the relative error of each hidden state, for the bundle and for PyTorch in the same precision, as a PNG.

    ``read`` are the states that the model reads, to which ``limit`` applies. ``first_jump`` is the first state where
    the bundle's error jumps.
    """
    figure, axes = _axes(purpose="the plot of the layers")
    states = [figures.layer for figures in layers]
    drawn = [] if limit is None else [limit]
    for label, colour, marker, errors in (
        (torch_label, ORANGE, "s", [figures.torch.relative_error for figures in layers]),
        ("bundle", BLUE, "o", [figures.bundle.relative_error for figures in layers]),
    ):
        values = np.array(errors, float)  # None becomes NaN
        broken = [state for state, value in zip(states, values, strict=True) if not np.isfinite(value)]
        values[(values <= 0) | np.isinf(values)] = np.nan  # a log scale has a gap there
        drawn += values[values > 0].tolist()
        style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.6, "label": label}
        axes.plot(states, values, **style)
        if broken:
            top = {"transform": axes.get_xaxis_transform(), "clip_on": False, "linestyle": "none", "zorder": 5}
            heights = [0.97 if label == "bundle" else 0.91] * len(broken)
            axes.plot(
                broken, heights, marker="X", color=RED, markersize=7, mec=colour, **top, label=f"{label}: not finite"
            )
    axes.set(yscale="log", ylim=_frame(drawn), xlim=(min(states, default=0) - 0.5, max(states, default=0) + 0.5))
    for index, state in enumerate(dict.fromkeys(read)):
        axes.axvline(state, color=RULE, linewidth=7, zorder=0, label="" if index else "read by the model")
    if limit is not None:
        axes.axhline(limit, color=RED, linewidth=1, linestyle=(0, (5, 3)), label=f"bound, {limit:g}")
    if first_jump in states:
        _mark_jump(axes, first_jump, values[states.index(first_jump)])
    every = -(-len(states) // MAX_TICKS) if states else 1
    ticks = states[::every]
    axes.set_xticks(ticks, [name_layer(s, num_layers).replace("last_hidden_state", "normed") for s in ticks])
    axes.set(xlabel="hidden state (0 is the input of the first layer)", ylabel="relative error")
    _legend(axes)
    return to_png(figure)


def draw_tokens(series: Sequence[TokenDistances]) -> bytes:
    """Plot histograms of 1 - cosine over the tokens, both axes logarithmic, as a PNG.

    The first series is filled, the others are outlines. The legend counts tokens that are not finite.
    """
    figure, axes = _axes(purpose="the plot of the tokens")
    finite = [np.maximum(one.values[np.isfinite(one.values)], EXACT) for one in series]
    limits = sorted({one.limit for one in series if one.limit is not None})
    edges = _edges(np.concatenate([*finite, np.array(limits, float)]))
    for index, (one, values, colour) in enumerate(zip(series, finite, (BLUE, GREY, ORANGE), strict=False)):
        broken = one.values.size - values.size
        label = f"{one.label}: {one.values.size:,} tokens" + (f", {broken:,} NOT FINITE" if broken else "")
        heights = np.maximum(np.histogram(values, edges)[0], HALF_A_TOKEN)
        style = {"baseline": HALF_A_TOKEN, "color": colour, "linewidth": 1.3}
        if index:
            axes.stairs(heights, edges, label=label, **style)
        else:
            axes.stairs(heights, edges, label=label, fill=True, alpha=0.3, **style)
            axes.stairs(heights, edges, **style)
    for limit in limits:
        name = ", ".join(one.label for one in series if one.limit == limit)
        axes.axvline(limit, color=RED, linewidth=1.2, linestyle=(0, (5, 3)))
        place = {"xy": (limit, 0.97), "xycoords": ("data", "axes fraction"), "xytext": (-5, 0)}
        text = f"bound for\n{name}\n{limit:.1g}"
        axes.annotate(
            text, **place, textcoords="offset points", ha="right", va="top", fontsize=7, color=RED, linespacing=1.4
        )
    axes.set(xscale="log", xlabel="1 - token cosine (smaller is better)", yscale="log", ylabel="number of tokens")
    axes.set_ylim(bottom=HALF_A_TOKEN)
    axes.set_xlim(edges[0], edges[-1] * 1.3)  # keeps a line on the last edge off the frame
    _legend(axes)
    return to_png(figure)


def _axes(*, purpose: str) -> tuple[Any, Any]:
    figure = new_figure(WIDTH, HEIGHT, dpi=DPI, purpose=purpose)
    axes = figure.add_axes((LEFT, BOTTOM, RIGHT - LEFT, TOP - BOTTOM))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)
    axes.tick_params(colors=GREY, labelsize=7, which="both", length=0, pad=4)
    axes.grid(visible=True, which="major", color=RULE, linewidth=0.5)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(fontsize=7.5, color=INK)
    return figure, axes


def _edges(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Divide whole decades into bins, from below the smallest value to above the largest."""
    low, high = (round(math.log10(value), 9) for value in (values.min(), values.max()))
    bottom, top = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    return np.logspace(bottom, top, BINS_PER_DECADE * (top - bottom) + 1)


def _legend(axes: Any) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.01), ncols=6, frameon=False, fontsize=7, labelcolor=INK,
        handlelength=1.6, columnspacing=1.4, borderaxespad=0,
    )  # fmt: skip


def _mark_jump(axes: Any, state: int, error: float) -> None:
    """Circle the first jump and label it; if its error is not finite, put the label at the top."""
    where: dict[str, Any] = {"xy": (state, 0.97), "xycoords": ("data", "axes fraction")}
    if error > 0:
        where = {"xy": (state, error), "xycoords": "data"}
        axes.plot([state], [error], marker="o", markersize=11, fillstyle="none", color=RED, markeredgewidth=1.6)
    left = state <= sum(axes.get_xlim()) / 2
    axes.annotate(
        f"first jump: state {state}", **where, xytext=(12 if left else -12, 12), textcoords="offset points",
        ha="left" if left else "right", color=RED, fontsize=7.5, weight="bold",
    )  # fmt: skip


def _frame(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of a log axis that shows these values with a margin, at least a decade apart.

    A shorter axis has no numbered tick, and makes noise look like a mountain.
    """
    low, high = (min(values), max(values)) if values else (1e-4, 1e-3)
    if high < 10 * low:
        middle = math.sqrt(low * high)
        low, high = middle / 3, middle * 3
    return low / 1.6, high * 2.5
