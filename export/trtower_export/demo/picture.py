"""Turn the patch features of PyTorch and of a bundle into one picture in which a difference would show.

Both are projected on one basis and scaled by one range, fitted on PyTorch's features of all
photographs: a basis of its own for each would rotate an error away.

Letters: N patches of a photograph, D width, P pixels of a panel's side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from trtower.errors import InputError
from trtower.extras import import_extra

Pixels = npt.NDArray[np.uint8]

PERCENTILES = (0.02, 0.98)  # a few outlier patches would otherwise take the whole range of colour

# The layout, in pixels.
DPI = 150
PANEL = 192
GAP = 6
GUTTER = 40
MARGIN = 36
TITLE = 66
HEADER = 34
CAPTION = 46
COLUMNS = 3

INK, GREY = "#1b1f24", "#6a737d"


@dataclass(frozen=True)
class PcaRow:
    """One photograph, square as the tower saw it, and its patch features, prefix tokens dropped, each (N, D)."""

    name: str
    image: Image.Image
    reference: Tensor
    bundle: Tensor
    caption: str


def draw_pca(
    rows: Sequence[PcaRow],
    path: Path,
    *,
    title: str = "Patch features on one PCA basis",
    reference_label: str = "PyTorch FP32",
    bundle_label: str = "bundle",
) -> None:
    """Write a PNG of photograph, PyTorch's colours and the bundle's colours, three photographs to a line."""
    side = _check(rows)
    references, bundles = pca_colours([row.reference for row in rows], [row.bundle for row in rows])
    cell = max(1, round(PANEL / side))  # whole pixels per patch, so that every patch is drawn the same size
    panel = side * cell
    columns = min(COLUMNS, len(rows))
    lines = -(-len(rows) // columns)
    triple = 3 * panel + 2 * GAP
    width = 2 * MARGIN + columns * triple + (columns - 1) * GUTTER
    height = TITLE + HEADER + lines * (panel + CAPTION) + GAP

    figure = _figure(width, height)
    renderer = figure.canvas.get_renderer()

    def write(x: float, y: float, text: str, size: float, room: float, **style: object) -> float:
        """Write ``text``, cut to ``room``, and return the pixels it takes."""
        artist = figure.text(x / width, 1 - y / height, text, fontsize=size, va="center", **style)
        while artist.get_window_extent(renderer).width > room and len(text) > 1:
            text = text[:-1]
            artist.set_text(text.rstrip() + "…")
        return float(artist.get_window_extent(renderer).width)

    write(MARGIN, TITLE / 2 + 6, title, 12, width - 2 * MARGIN, color=INK, weight="bold")
    for column in range(columns):
        x, y = MARGIN + column * (triple + GUTTER), TITLE + HEADER / 2
        write(x, y, "photograph", 6.5, panel, color=GREY)
        taken = write(x + panel + GAP, y, reference_label, 6.5, panel, color=GREY)
        write(x + triple, y, bundle_label, 6.5, 2 * panel - taken, color=GREY, ha="right")
    for index, row in enumerate(rows):
        x = MARGIN + index % columns * (triple + GUTTER)
        y = TITLE + HEADER + index // columns * (panel + CAPTION)
        photograph = np.asarray(ImageOps.fit(row.image.convert("RGB"), (panel, panel), Image.Resampling.LANCZOS))
        for place, pixels in enumerate((photograph, _panel(references[index], cell), _panel(bundles[index], cell))):
            figure.figimage(pixels, x + place * (panel + GAP), height - y - panel, origin="upper")
        taken = write(x + triple, y + panel + 15, row.caption, 6.5, 2 * panel, color=GREY, ha="right")
        write(x, y + panel + 15, row.name, 7, triple - taken - 2 * GAP, color=INK, weight="bold")
    figure.savefig(path, format="png", dpi=DPI, metadata={"Software": None})


def pca_colours(references: Sequence[Tensor], bundles: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Colour the patches of each (N, D) as uint8 (N, 3), on the basis and range of ``references``.

    What is not finite comes out black. Each axis points where its largest weight is
    positive, as in scikit-learn's ``svd_flip``: the colours do not change from run to run.
    """
    centred = torch.cat([_float64(features) for features in references])  # (photographs * N, D)
    mean = centred.mean(dim=0)
    centred -= mean
    basis = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].flip(1)  # (D, 3), largest variance first
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))  # (1, 3)
    basis = basis * largest.sign()
    low, high = torch.quantile(centred @ basis, torch.tensor(PERCENTILES, dtype=torch.float64), dim=0)
    span = (high - low).clamp_min(torch.finfo(torch.float64).tiny)

    def colour(features: Tensor) -> Tensor:
        scaled: Tensor = ((_float64(features) - mean) @ basis - low) / span  # (N, 3)
        return (scaled.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(0, 1) * 255).round().to(torch.uint8)

    return [colour(features) for features in references], [colour(features) for features in bundles]


def _float64(features: Tensor) -> Tensor:
    return features.detach().to("cpu", torch.float64)


def _figure(width: int, height: int) -> Any:
    """Make a matplotlib figure of so many pixels on an Agg canvas of its own; pyplot's state is not touched."""
    agg = import_extra("matplotlib.backends.backend_agg", extra="demo", purpose="the PCA picture")
    figure = import_extra("matplotlib.figure", extra="demo", purpose="the PCA picture").Figure(
        figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white"
    )
    agg.FigureCanvasAgg(figure)
    return figure


def _panel(colours: Tensor, cell: int) -> Pixels:
    side = isqrt(len(colours))
    grid: Pixels = colours.reshape(side, side, 3).numpy()
    return grid.repeat(cell, axis=0).repeat(cell, axis=1)  # (P, P, 3)


def _check(rows: Sequence[PcaRow]) -> int:
    """Return the patches of a side."""
    if not rows:
        raise InputError("the PCA picture has no photograph; expected one row or more")
    expected = tuple(rows[0].reference.shape)
    for row in rows:
        for label, features in (("reference", row.reference), ("bundle", row.bundle)):
            found = tuple(features.shape)
            if found != expected:
                raise InputError(
                    f"{label} features of {row.name} have shape {found}; the first photograph's are {expected}: "
                    "give every photograph's patches from the same tower"
                )
    if len(expected) != 2 or isqrt(expected[0]) ** 2 != expected[0] or expected[1] < 3:
        raise InputError(
            f"features have shape {expected}; expected (N, D) with a square number N of patches and D of 3 or more: "
            "drop the prefix tokens and the batch"
        )
    return isqrt(expected[0])
