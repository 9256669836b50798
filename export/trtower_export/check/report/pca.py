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
from PIL import Image, ImageColor, ImageOps
from torch import Tensor

from trtower.errors import InputError
from trtower_export.drawing import GREY, INK, new_figure, to_png

Pixels = npt.NDArray[np.uint8]

PERCENTILES = (0.02, 0.98)  # a few outlier patches would otherwise take the whole range of colour

DIRECTIONS = 16
SWEEPS = 30
"""Subspace iteration on 16 directions, of which three are shown: each sweep shrinks what is wrong with them by the
ratio of the 17th variance to the third. An eigendecomposition of (D, D) takes minutes where D is five layers wide."""

MARKED = 5
"""How many patches are outlined where somebody asks for the worst."""

WORST, WORSE, EDGE = "#ff2d95", "#ffd400", "#101418"
"""The worst patch, the next ones, and the hairline around both that shows them on a photograph of any colour."""

DECADES = 4
"""How far down the error panel looks: black is a ten-thousandth of what it shows white."""

EXACT = 1e-12
"""Below it 1 - cosine is the rounding of FP64, and a token is as good as equal."""

# The layout of the picture, in pixels.
DPI = 150
PANEL = 192
GAP = 6
GUTTER = 40
MARGIN = 36
TITLE = 66
HEADER = 34
CAPTION = 46
COLUMNS = 3

PANEL_OF_ONE_PIXEL = 120
"""A frame is one pixel wide for so many of a panel's side."""

STRIP_PANEL = 370
STRIP_GAP = 10


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
    mark: int = 0,
) -> None:
    """Write a PNG of photograph, PyTorch's colours and the bundle's colours, three photographs to a line.

    ``mark`` is how many of the worst patches are outlined in each photograph.
    """
    side = _check(rows)
    references, bundles = pca_colours([row.reference for row in rows], [row.bundle for row in rows])
    cell = max(1, round(PANEL / side))  # whole pixels per patch, so that every patch is drawn the same size
    panel = side * cell
    columns = min(COLUMNS, len(rows))
    lines = -(-len(rows) // columns)
    triple = 3 * panel + 2 * GAP
    width = 2 * MARGIN + columns * triple + (columns - 1) * GUTTER
    height = TITLE + HEADER + lines * (panel + CAPTION) + GAP

    figure = new_figure(width, height, dpi=DPI, purpose="the PCA picture")
    renderer = figure.canvas.get_renderer()

    def write(x: float, y: float, text: str, size: float, room: float, **style: object) -> float:
        """Write ``text``, cut to ``room``, and return the pixels it takes."""
        style |= {"fontsize": size, "va": "center", "parse_math": False}
        artist = figure.text(x / width, 1 - y / height, text, **style)
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
        panels = (_photograph(row, cell, mark), _grid(references[index], cell), _grid(bundles[index], cell))
        for place, pixels in enumerate(panels):
            figure.figimage(pixels, x + place * (panel + GAP), height - y - panel, origin="upper")
        taken = write(x + triple, y + panel + 15, row.caption, 6.5, 2 * panel, color=GREY, ha="right")
        write(x, y + panel + 15, row.name, 7, triple - taken - 2 * GAP, color=INK, weight="bold")
    path.write_bytes(to_png(figure))


def draw_strips(rows: Sequence[PcaRow], *, limit: float, mark: int = MARKED) -> list[bytes]:
    """Make a PNG without words of each row: photograph with its worst patches, both towers' colours, the error.

    The error of a patch is 1 - cosine, on a log scale whose white is ``limit`` and beyond. What is not finite has the
    colour of the worst patch.
    """
    side = _check(rows)
    references, bundles = pca_colours([row.reference for row in rows], [row.bundle for row in rows])
    cell = max(1, round(STRIP_PANEL / side))
    strips = []
    for row, reference, bundle in zip(rows, references, bundles, strict=True):
        error = _error_colours(token_distances(row.bundle, row.reference), limit)
        panels = [
            _photograph(row, cell, mark),
            *(_grid(colours, cell) for colours in (reference, bundle, error)),
        ]
        gap = np.full((side * cell, STRIP_GAP, 3), 255, np.uint8)
        spaced = [piece for panel in panels for piece in (gap, panel)][1:]
        stream = io.BytesIO()
        Image.fromarray(np.concatenate(spaced, axis=1)).save(stream, format="png", optimize=True)
        strips.append(stream.getvalue())
    return strips


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
    width = centred.shape[1]
    start = torch.randn(width, min(DIRECTIONS, width), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    axes, _ = torch.linalg.qr(start)
    for _ in range(SWEEPS):
        axes, _ = torch.linalg.qr(centred.T @ (centred @ axes))
    projected = centred @ axes
    axes = (axes @ torch.linalg.eigh(projected.T @ projected).eigenvectors).flip(1)[:, :3]  # largest variance first
    largest = axes.gather(0, axes.abs().argmax(dim=0, keepdim=True))  # (1, 3)
    return torch.nn.functional.pad(axes * largest.sign(), (0, 3 - axes.shape[1]))


def _float64(features: Tensor) -> Tensor:
    return features.detach().to("cpu", torch.float64)


def _grid(colours: Tensor, cell: int) -> Pixels:
    side = isqrt(len(colours))
    grid: Pixels = colours.reshape(side, side, 3).numpy()
    return grid.repeat(cell, axis=0).repeat(cell, axis=1)  # (P, P, 3)


def _photograph(row: PcaRow, cell: int, mark: int) -> Pixels:
    """Fit the photograph into a panel, and outline its worst patches."""
    side = isqrt(len(row.reference))
    panel = side * cell
    pixels: Pixels = np.array(ImageOps.fit(row.image.convert("RGB"), (panel, panel), Image.Resampling.LANCZOS))
    distances = token_distances(row.bundle, row.reference)
    patches = worst_tokens(distances, mark) if distances.isfinite().any() else []  # where none is finite, none is worst
    for place in reversed(range(len(patches))):  # the worst last, on top
        top, left = (index * cell for index in divmod(patches[place], side))
        _outline(pixels, top, left, cell, WORSE if place else WORST)
    return pixels


def _outline(pixels: Pixels, top: int, left: int, cell: int, colour: str) -> None:
    """Draw a frame around a patch, and a hairline around the frame; at the border of the panel both move inward."""
    panel = len(pixels)
    frame = max(1, panel // PANEL_OF_ONE_PIXEL)
    rings = [(frame + 1, EDGE), *((distance, colour) for distance in range(frame, 0, -1))]
    for distance, shade in rings:
        inset = frame + 1 - distance
        first, last = (
            [min(max(start + offset, inset), panel - 1 - inset) for start in (top, left)]
            for offset in (-distance, cell - 1 + distance)
        )
        rows, columns = (slice(start, stop + 1) for start, stop in zip(first, last, strict=True))
        pixels[[first[0], last[0]], columns] = ImageColor.getrgb(shade)
        pixels[rows, [first[1], last[1]]] = ImageColor.getrgb(shade)


def _error_colours(distances: Tensor, limit: float) -> Tensor:
    """Colour 1 - cosine of N patches as uint8 (N, 3), on a log scale of ``DECADES`` that ends at ``limit``."""
    scaled = 1 + torch.log10(distances.clamp_min(limit * 10.0**-DECADES) / limit) / DECADES
    colours = (scaled.nan_to_num(nan=0.0).clamp(0, 1) * 255).round().to(torch.uint8)[:, None].repeat(1, 3)
    colours[~distances.isfinite()] = torch.tensor(ImageColor.getrgb(WORST), dtype=torch.uint8)
    return colours


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
    if len(expected) != 2 or not expected[1] or not expected[0] or isqrt(expected[0]) ** 2 != expected[0]:
        raise InputError(
            f"features have shape {expected}; expected (N, D) with a square number N of patches: "
            "drop the prefix tokens and the batch"
        )
    return isqrt(expected[0])
