"""Make an empty matplotlib figure, and make a PNG of a finished one.

Figures are made without pyplot: its global state and its search for a display are not touched.
"""

import io
from typing import Any

from trtower.extras import import_extra

INK, GREY, RULE = "#1b1f24", "#6a737d", "#d8dee4"
BLUE, ORANGE, RED = "#0a5ea8", "#c2700a", "#c1121f"
"""One hue each for the bundle, for what it is compared with, and for what is wrong; told apart by the colour-blind."""


def new_figure(width: int, height: int, *, dpi: int, purpose: str) -> Any:
    """Make a white figure of so many pixels; raise MissingExtraError where matplotlib is not installed."""
    figure = import_extra("matplotlib.figure", extra="report", purpose=purpose)
    return figure.Figure(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor="white")


def to_png(figure: Any) -> bytes:
    """Draw a figure. The same figure gives the same bytes: neither date nor version is written into it."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=figure.dpi, metadata={"Software": None})
    return stream.getvalue()
