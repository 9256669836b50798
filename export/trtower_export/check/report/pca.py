"""Draw the patch features of PyTorch and of a bundle as colours, so that a difference shows.

Both are projected on the same basis and scaled by the same range, fitted on PyTorch's features of the photographs that
are drawn. With a basis for each, an error could be rotated away.

Letters: N patches of a photograph, D features per token, W pixels per side of a panel.
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

PERCENTILES = (0.02, 0.98)  # otherwise a few outlier patches use up the whole range of colours

DIRECTIONS = 16
SWEEPS = 30
"""Subspace iteration on 16 directions, of which three are shown. Each sweep shrinks their error by the ratio of the
17th variance to the third. An eigendecomposition of (D, D) takes minutes when D is the width of five layers."""

WORST, WORSE, EDGE = "#ff2d95", "#ffd400", "#101418"
"""The worst patch, the next ones, and the hairline around both that stands out on any photograph."""

DECADES = 4
"""The range of the error panel: black is a ten-thousandth of white."""

EXACT = 1e-12
"""A smaller 1 - cosine is rounding in FP64; the token counts as equal."""

GAP = 1 / 37
"""The gap between two panels, as a fraction of a panel's width."""

PANEL_OF_ONE_PIXEL = 120
"""A frame is one pixel wide per this many pixels of a panel's width."""

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
    """One photograph, square as the tower received it, and its patch features (N, D) without prefix tokens."""

    name: str
    image: Image.Image
    reference: Tensor
    bundle: Tensor
    caption: str


def draw_strips(rows: Sequence[PcaRow], *, panel: int, mark: int = 0, limit: float | None = None) -> list[Pixels]:
    """Draw each row as a strip of panels without text: the photograph, PyTorch's colours, the bundle's colours.

    ``panel`` is the approximate width of a panel in pixels. The ``mark`` worst patches are outlined in the photograph.
    With ``limit``, a fourth panel shows the error of each patch, 1 - cosine, on a log scale that is white from
    ``limit`` on. There, patches that are not finite have the colour of the worst patch.
    """
    side = isqrt(len(rows[0].reference))
    cell = max(1, round(panel / side))  # whole pixels per patch, so that all patches have the same size
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
    """Write a PNG of all strips, three to a row, each with name and caption; the bundle ran on ``runner``.

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
        x, y = MARGIN + column * (wide + GUTTER), height - HEADINGS - line * (high + CAPTION)  # the top left corner
        figure.figimage(strip, x, y - high, origin="upper")
        if line == 0:
            for place, heading in enumerate(("photograph", "PyTorch FP32", "bundle")):
                figure.text(x + place * (wide - high) / 2, y + 17, heading, **small)
        figure.text(x, y - high - 15, row.name, **bold | {"fontsize": 7})
        figure.text(x + wide, y - high - 15, row.caption, ha="right", **small)
    path.write_bytes(to_png(figure))


def strip_png(strip: Pixels) -> bytes:
    """Encode a strip as a PNG."""
    stream = io.BytesIO()
    Image.fromarray(strip).save(stream, format="png", optimize=True)
    return stream.getvalue()


def pca_colours(references: Sequence[Tensor], bundles: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Colour the patches of each (N, D) as uint8 (N, 3), on the basis and range of ``references``.

    Values that are not finite become black. Each axis points to where its largest weight is positive, as in
    scikit-learn's ``svd_flip``, so the colours are the same in every run.
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


def token_distances(features: Tensor, reference: Tensor) -> Tensor:
    """Return 1 - cosine of each token, (..., D) -> (...), in FP64; NaN for tokens that are not finite."""
    return 1 - torch.nn.functional.cosine_similarity(_float64(features), _float64(reference), dim=-1)


def worst_tokens(distances: Tensor, count: int) -> list[int]:
    """Find the worst tokens, worst first. Non-finite tokens come first; exact ones are left out."""
    badness = distances.nan_to_num(nan=torch.inf)
    order = badness.argsort(descending=True, stable=True)[:count]
    worst: list[int] = order[badness[order] > EXACT].tolist()
    return worst


def _principal_axes(centred: Tensor) -> Tensor:
    """Find the three directions of largest variance, (n, D) -> (D, 3), largest first; padded with zeros if D < 3."""
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
    return grid.repeat(cell, axis=0).repeat(cell, axis=1)  # (W, W, 3)


def _photograph(row: PcaRow, cell: int, mark: int) -> Pixels:
    """Fit the photograph into a panel, and outline its worst patches with a frame and a hairline around it."""
    side = isqrt(len(row.reference))
    panel = side * cell
    image = ImageOps.fit(row.image.convert("RGB"), (panel, panel), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(image)
    frame = max(1, panel // PANEL_OF_ONE_PIXEL)
    distances = token_distances(row.bundle, row.reference)
    patches = worst_tokens(distances, mark) if distances.isfinite().any() else []  # none is finite: none is the worst
    for place in reversed(range(len(patches))):  # the worst is drawn last, on top
        top, left = (index * cell for index in divmod(patches[place], side))
        hairline = [max(start - frame - 1, 0) for start in (left, top)]  # moved inward at the border of the panel
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
