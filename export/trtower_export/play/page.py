"""The page: drop a picture, see its patches as colours, click one and see which others are like it."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from trtower.errors import ConfigError, InputError, one_line
from trtower.extras import import_extra
from trtower_export.check.report.pca import pca_colours
from trtower_export.play.towers import Look, Towers

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # a page about somebody's pictures tells nobody

PANEL = 448
"""Width and height of a panel, in pixels, about: a whole number of pixels for each patch."""

COLD, WARM = (24, 28, 48), (255, 214, 90)
"""The colours of a cosine of 0 or less, and of 1."""

MARK = (255, 45, 149)


def make_page(towers: Towers, title: str, examples: Sequence[Image.Image]) -> Any:
    """Lay the page out with gradio; `.launch()` serves it. Raises MissingExtraError if gradio is not installed."""
    gradio = import_extra("gradio", extra="play", purpose="trtower play")
    theme = gradio.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # nothing from the network

    def show(picture: Image.Image | None) -> tuple[Any, ...]:
        if picture is None:
            return None, None, None, None, "", None, None, ""
        try:
            look = towers.look(picture)
        except InputError as err:
            raise gradio.Error(str(err)) from err
        (reference,), (bundle,) = pca_colours([look.reference], [look.bundle])
        return (
            look,
            look.seen.resize((_width(towers.side),) * 2),
            _panel(reference, towers.side),
            _panel(bundle, towers.side),
            _describe(look),
            None,
            None,
            "Click a patch in any of the pictures.",
        )

    def compare(look: Look | None, event: Any) -> tuple[Any, ...]:
        if look is None:
            return None, None, ""
        patch = patch_at(event.index, towers.side)
        reference, bundle = look.similar_to(patch)
        difference = float((reference - bundle).abs().max())
        row, column = divmod(patch, towers.side)
        text = f"Patch in row {row + 1}, column {column + 1}. Largest difference of a similarity: {difference:.2g}"
        return *(_panel(_warmth(each), towers.side, mark=patch) for each in (reference, bundle)), text

    compare.__annotations__["event"] = gradio.SelectData  # by which gradio knows what to pass
    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        state = gradio.State()
        gradio.Markdown(f"# {title}\n{describe_towers(towers)}")
        with gradio.Row():
            picture = gradio.Image(
                label="Drop a picture", type="pil", image_mode="RGB", height=PANEL, sources=["upload", "clipboard"]
            )
            with gradio.Column():
                figures = gradio.Markdown("")
                if examples:
                    gradio.Examples([[each] for each in examples], picture)
        look_at = {"interactive": False, "format": "png", "buttons": ["fullscreen", "download"]}
        with gradio.Row():
            panels = [gradio.Image(label=label, **look_at) for label in ("What the tower sees", "PyTorch", "Bundle")]
        hint = gradio.Markdown("")
        with gradio.Row():
            similar = [gradio.Image(label=f"Similarity, {label}", **look_at) for label in ("PyTorch", "bundle")]
        picture.change(show, picture, [state, *panels, figures, *similar, hint])
        for panel in (*panels, *similar):
            panel.select(compare, state, [*similar, hint])
    page.theme = theme
    return page


def describe_towers(towers: Towers) -> str:
    """Say what runs, in a line of Markdown."""
    manifest = towers.tower.bundle.manifest
    return (
        f"{manifest.name}: {manifest.spec.reading}. The bundle is in {manifest.precision.upper()} and runs on "
        f"**{towers.tower.backend}**; PyTorch's tower runs in FP32 on {towers.tower.device}, cut at the same layer."
    )


def patch_at(place: Sequence[int], side: int) -> int:
    """Return the index of the patch at pixel (x, y) of a panel of G x G patches."""
    x, y = (min(side - 1, max(0, int(at) * side // _width(side))) for at in place)
    return y * side + x


def _describe(look: Look) -> str:
    cosines = look.cosines
    return (
        f"| | ms, once |\n|---|---|\n| PyTorch | {look.reference_s * 1000:.1f} |\n"
        f"| bundle | {look.bundle_s * 1000:.1f} |\n\n"
        f"Cosine of a patch between the two: {cosines.mean():.6f} on average, {cosines.min():.6f} at worst. The "
        "colours are the first three principal components of PyTorch's patches, for both."
    )


def _warmth(cosines: Tensor) -> Any:
    """Colour cosines (N,) as bytes (N, 3)."""
    cold, warm = np.array(COLD, float), np.array(WARM, float)
    share = cosines.clamp(0, 1).numpy()[:, None]
    return np.round(cold + share * (warm - cold)).astype(np.uint8)


def _width(side: int) -> int:
    return side * max(1, round(PANEL / side))


def _panel(colours: Any, side: int, mark: int | None = None) -> Image.Image:
    """Draw patches (N, 3) as a square, with a frame around one of them."""
    cell = _width(side) // side
    pixels = np.asarray(colours).reshape(side, side, 3).repeat(cell, axis=0).repeat(cell, axis=1)
    if mark is not None:
        row, column = (place * cell for place in divmod(mark, side))
        thick = max(1, cell // 8)
        patch = pixels[row : row + cell, column : column + cell]
        inside = patch[thick : cell - thick, thick : cell - thick].copy()
        patch[:] = MARK
        patch[thick : cell - thick, thick : cell - thick] = inside
    return Image.fromarray(pixels)


def serve(page: Any, host: str, port: int) -> None:
    """Serve the page until Ctrl-C. Raises ConfigError if the address cannot be listened at."""
    try:
        page.launch(server_name=host, server_port=port, share=False, quiet=True, theme=page.theme)
    except OSError as err:
        raise ConfigError(f"cannot serve the page at {host}:{port}: {one_line(err)}") from err
