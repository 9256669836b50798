"""Load the images that an export runs on: for a precision that is decided on them, and for the check at its end."""

from typing import Any

from trtower.tower.image_processor import ImageProcessor
from trtower_export.check.photographs import (
    DRAWN,
    PHOTOGRAPH,
    Photographs,
    draw_images,
    load_photographs,
    prepare,
    say_skipped,
)
from trtower_export.console import Progress
from trtower_export.options import ExportOptions
from trtower_export.precision.program import Samples

CHECK_PHOTOGRAPHS = 2
"""Photographs in the check that ends an export: enough to find a wrong graph; `trtower check` takes them all."""


def load_for_export(options: ExportOptions, progress: Progress) -> Photographs | None:
    """Load the photographs that were named, or else the demo's; None if the export reads none."""
    if not options.check and not options.runs_on_images:
        return None
    photographs = load_photographs(options.images, limit=None if options.runs_on_images else CHECK_PHOTOGRAPHS)
    say_skipped(photographs, progress)
    if options.calibrates and options.images is None:
        progress.say(
            f"WARNING: {options.precision} is calibrated on {len(photographs.images)} photographs of the demo: name "
            "some that are like those the tower will see, with --images"
        )
    return photographs


def make_samples(
    options: ExportOptions, photographs: Photographs | None, preprocessor: dict[str, Any], size: int
) -> Samples:
    """Turn photographs, and for a search drawn images of S pixels a side, into what the precision is decided on."""
    if not options.runs_on_images or photographs is None:
        return Samples()
    processor = ImageProcessor(preprocessor)
    pixel_values = {PHOTOGRAPH: prepare(photographs.images, processor)}
    if options.searches:
        pixel_values[DRAWN] = prepare(draw_images(size), processor)
    return Samples(pixel_values=pixel_values, sha256=photographs.sha256)
