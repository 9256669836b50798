"""Create an empty matplotlib figure, and turn a finished one into a PNG.

Figures are created without pyplot, which has global state and looks for a display.
"""

import io
from typing import Any

from trtower.extras import import_extra

INK, GREY, RULE = "#1b1f24", "#6a737d", "#d8dee4"
BLUE, ORANGE, RED = "#0a5ea8", "#c2700a", "#c1121f"
"""Colours for the bundle, for what it is compared with, and for errors; colour-blind readers can tell them apart."""


def new_figure(width: int, height: int, *, dpi: int, purpose: str) -> Any:
    """Create a white figure of this size in pixels; raise MissingExtraError if matplotlib is not installed."""
    figure = import_extra("matplotlib.figure", extra="report", purpose=purpose)
    return figure.Figure(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor="white")


def to_png(figure: Any) -> bytes:
    """Encode a figure as a PNG. The same figure gives the same bytes: it contains neither date nor version."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=figure.dpi, metadata={"Software": None})
    return stream.getvalue()
