"""Turn the patch features of PyTorch and of a bundle into pictures in which a difference would show.

Both are projected on one basis and scaled by one range, fitted on PyTorch's features of all
photographs: a basis of its own for each would rotate an error away.

Letters: N patches of a photograph, D width, P pixels of a panel's side.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageColor, ImageDraw, ImageOps
from torch import Tensor

from trtower_export.drawing import GREY, INK, new_figure, to_png

Pixels = npt.NDArray[np.uint8]

PERCENTILES = (0.02, 0.98)  # a few outlier patches would otherwise take the whole range of colour

DIRECTIONS = 16
SWEEPS = 30
"""Subspace iteration on 16 directions, of which three are shown: each sweep shrinks what is wrong with them by the
ratio of the 17th variance to the third. An eigendecomposition of (D, D) takes minutes where D is five layers wide."""

WORST, WORSE, EDGE = "#ff2d95", "#ffd400", "#101418"
"""The worst patch, the next ones, and the hairline around both that shows them on a photograph of any colour."""

DECADES = 4
"""How far down the error panel looks: black is a ten-thousandth of what it shows white."""

EXACT = 1e-12
"""Below it 1 - cosine is the rounding of FP64, and a token is as good as equal."""

GAP = 1 / 37
"""Between two panels, as a share of a panel's side."""

PANEL_OF_ONE_PIXEL = 120
"""A frame is one pixel wide for so many of a panel's side."""

# The layout of a sheet, in pixels.
DPI = 150
PANEL = 192
GUTTER = 40
MARGIN = 36
HEADINGS = 100
CAPTION = 46
COLUMNS = 3


@dataclass(frozen=True, eq=False)
class PcaRow:
    """One photograph, square as the tower saw it, and its patch features, prefix tokens dropped, each (N, D)."""

    name: str
    image: Image.Image
    reference: Tensor
    bundle: Tensor
    caption: str


def draw_strips(rows: Sequence[PcaRow], *, panel: int, mark: int = 0, limit: float | None = None) -> list[Pixels]:
    """Draw each row as a strip of panels without words: the photograph, PyTorch's colours, the bundle's colours.

    ``panel`` is about how many pixels the side of one takes, and ``mark`` how many of the worst patches are outlined in
    the photograph. With ``limit`` a fourth panel shows the error of each patch, 1 - cosine, on a log scale whose white
    is ``limit`` and beyond. What is not finite has the colour of the worst patch there.
    """
    side = isqrt(len(rows[0].reference))
    cell = max(1, round(panel / side))  # whole pixels per patch, so that every patch is drawn the same size
    gap = np.full((side * cell, round(side * cell * GAP), 3), 255, np.uint8)
    references, bundles = pca_colours([row.reference for row in rows], [row.bundle for row in rows])
    strips = []
    for row, *colours in zip(rows, references, bundles, strict=True):
        if limit is not None:
            colours.append(_error_colours(token_distances(row.bundle, row.reference), limit))
        panels = [_photograph(row, cell, mark), *(_grid(each, cell) for each in colours)]
        strips.append(np.concatenate([piece for each in panels for piece in (gap, each)][1:], axis=1))
    return strips


def draw_sheet(rows: Sequence[PcaRow], path: Path, *, runner: str) -> None:
    """Write a PNG of all strips, three to a line, each with its name and caption; the bundle ran on ``runner``.

    Raises MissingExtraError if matplotlib is not installed.
    """
    strips = draw_strips(rows, panel=PANEL)
    high, wide, _ = strips[0].shape
    width = 2 * MARGIN + COLUMNS * wide + (COLUMNS - 1) * GUTTER
    height = HEADINGS + -(-len(rows) // COLUMNS) * (high + CAPTION)
    figure = new_figure(width, height, dpi=DPI, purpose="the PCA picture")
    small = {"fontsize": 6.5, "color": GREY, "va": "center", "parse_math": False, "transform": None}  # None: in pixels
    bold = small | {"color": INK, "weight": "bold"}
    figure.text(MARGIN, height - 39, "Patch features on one PCA basis", **bold | {"fontsize": 12})
    figure.text(width - MARGIN, height - 39, f"bundle: {runner}", ha="right", **small)
    for index, (row, strip) in enumerate(zip(rows, strips, strict=True)):
        line, column = divmod(index, COLUMNS)
        x, y = MARGIN + column * (wide + GUTTER), height - HEADINGS - line * (high + CAPTION)  # its upper left corner
        figure.figimage(strip, x, y - high, origin="upper")
        if line == 0:
            for place, heading in enumerate(("photograph", "PyTorch FP32", "bundle")):
                figure.text(x + place * (wide - high) / 2, y + 17, heading, **small)
        figure.text(x, y - high - 15, row.name, **bold | {"fontsize": 7})
        figure.text(x + wide, y - high - 15, row.caption, ha="right", **small)
    path.write_bytes(to_png(figure))


def strip_png(strip: Pixels) -> bytes:
    """Encode a strip."""
    stream = io.BytesIO()
    Image.fromarray(strip).save(stream, format="png", optimize=True)
    return stream.getvalue()


def pca_colours(references: Sequence[Tensor], bundles: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Colour the patches of each (N, D) as uint8 (N, 3), on the basis and range of ``references``.

    What is not finite comes out black. Each axis points where its largest weight is
    positive, as in scikit-learn's ``svd_flip``: the colours do not change from run to run.
    """
    fitted = torch.cat([_float64(features) for features in references])  # (photographs * N, D)
    fitted = fitted[fitted.isfinite().all(dim=-1)]
    if not len(fitted):
        fitted = torch.zeros(1, references[0].shape[-1], dtype=torch.float64)
    mean = fitted.mean(dim=0)
    fitted = fitted - mean
    basis = _principal_axes(fitted)
    low, high = torch.quantile(fitted @ basis, torch.tensor(PERCENTILES, dtype=torch.float64), dim=0)
    span = (high - low).clamp_min(torch.finfo(torch.float64).tiny)

    def colour(features: Tensor) -> Tensor:
        scaled: Tensor = ((_float64(features) - mean) @ basis - low) / span  # (N, 3)
        return (scaled.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(0, 1) * 255).round().to(torch.uint8)

    return [colour(features) for features in references], [colour(features) for features in bundles]


def token_distances(found: Tensor, reference: Tensor) -> Tensor:
    """Give 1 - cosine of each token, (..., D) -> (...), in FP64; NaN where a token is not finite."""
    return 1 - torch.nn.functional.cosine_similarity(_float64(found), _float64(reference), dim=-1)


def worst_tokens(distances: Tensor, count: int) -> list[int]:
    """Find the tokens farthest off, the worst first; one that is not finite is worse than any, an exact one is none."""
    badness = distances.nan_to_num(nan=torch.inf)
    order = badness.argsort(descending=True, stable=True)[:count]
    found: list[int] = order[badness[order] > EXACT].tolist()
    return found


def _principal_axes(centred: Tensor) -> Tensor:
    """Find the three directions of largest variance, (n, D) -> (D, 3), largest first; zeros where D has fewer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        axes = torch.svd_lowrank(centred, q=DIRECTIONS, niter=SWEEPS)[2][:, :3]
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))  # (1, 3)
    return torch.nn.functional.pad(axes * largest.sign(), (0, 3 - axes.shape[1]))


def _float64(features: Tensor) -> Tensor:
    return features.detach().to("cpu", torch.float64)


def _grid(colours: Tensor, cell: int) -> Pixels:
    side = isqrt(len(colours))
    grid: Pixels = colours.reshape(side, side, 3).numpy()
    return grid.repeat(cell, axis=0).repeat(cell, axis=1)  # (P, P, 3)


def _photograph(row: PcaRow, cell: int, mark: int) -> Pixels:
    """Fit the photograph into a panel, and outline its worst patches: a frame around each, a hairline around that."""
    side = isqrt(len(row.reference))
    panel = side * cell
    image = ImageOps.fit(row.image.convert("RGB"), (panel, panel), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(image)
    frame = max(1, panel // PANEL_OF_ONE_PIXEL)
    distances = token_distances(row.bundle, row.reference)
    patches = worst_tokens(distances, mark) if distances.isfinite().any() else []  # where none is finite, none is worst
    for place in reversed(range(len(patches))):  # the worst last, on top
        top, left = (index * cell for index in divmod(patches[place], side))
        hairline = [max(start - frame - 1, 0) for start in (left, top)]  # moves inward at the border of the panel
        hairline += [min(start + cell + frame, panel - 1) for start in (left, top)]
        draw.rectangle(hairline, outline=EDGE)
        inside = [hairline[0] + 1, hairline[1] + 1, hairline[2] - 1, hairline[3] - 1]
        draw.rectangle(inside, outline=WORSE if place else WORST, width=frame)
    return np.array(image)


def _error_colours(distances: Tensor, limit: float) -> Tensor:
    """Colour 1 - cosine of N patches as uint8 (N, 3), on a log scale of ``DECADES`` that ends at ``limit``."""
    scaled = 1 + torch.log10(distances.clamp_min(limit * 10.0**-DECADES) / limit) / DECADES
    colours = (scaled.nan_to_num(nan=0.0).clamp(0, 1) * 255).round().to(torch.uint8)[:, None].repeat(1, 3)
    colours[~distances.isfinite()] = torch.tensor(ImageColor.getrgb(WORST), dtype=torch.uint8)
    return colours
