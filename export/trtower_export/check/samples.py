"""Load the images that an export needs: for the golden answers, the precision, and the check at the end."""

from importlib.util import find_spec

import torch

from trtower.extras import import_extra
from trtower.parity.bounds import DRAWN, PHOTOGRAPH
from trtower.parity.golden import GoldenImage, GoldenInputs, count_images, golden_dtype
from trtower.spec import PRECISIONS, TowerSpec
from trtower.tower.image_processor import ImageProcessor
from trtower_export.check.photographs import (
    Photographs,
    draw_images,
    load_photographs,
    prepare,
    prepare_floats,
    say_skipped,
)
from trtower_export.console import Progress
from trtower_export.options import ExportOptions
from trtower_export.precision.program import Samples

CHECK_PHOTOGRAPHS = 2
"""Photographs in the check at the end of an export: enough to find a wrong graph. `trtower check` uses all of them."""


def load_for_export(options: ExportOptions, progress: Progress) -> Photographs | None:
    """Load the photographs of --images, or the demo's by default; None if this export needs none.

    Raises MissingExtraError, before any work is done, if the check at the end could not run on this machine.
    """
    is_half = PRECISIONS[options.graph_precision].dtype == "float16"  # ONNX Runtime emulates it, whatever else runs
    if options.check and not torch.cuda.is_available() and (is_half or not find_spec("openvino")):
        purpose = f"checking {options.graph_precision.upper()} without a GPU (--no-check leaves it out)"
        import_extra("onnxruntime", extra="cpu", purpose=purpose)
    if not options.check and not options.runs_on_images:
        return None
    photographs = load_photographs(options.images, limit=None if options.runs_on_images else CHECK_PHOTOGRAPHS)
    say_skipped(photographs, progress)
    if options.calibrates and options.images is None:
        progress.say(
            f"WARNING: calibrating {options.precision} on the demo's {len(photographs.images)} photographs: use "
            "--images to name photographs like the ones the tower will see"
        )
    return photographs


def make_golden_inputs(processor: ImageProcessor, spec: TowerSpec, precision: str) -> GoldenInputs:
    """Prepare golden images with the bundle's processor: drawn ones, and two of the demo's photographs if here.

    Never photographs of the user's, because a bundle is passed on.
    """
    drawn = {image.name: image for image in draw_images(spec.image_size)}
    chosen = [drawn["squares"], drawn["noise"]]
    if find_spec("skimage"):
        first, second = load_photographs(None, limit=2).images
        chosen = [first, drawn["squares"], second]
    pixels = torch.cat(prepare(chosen, processor)).to(golden_dtype(spec.input(precision)))
    prepared = pixels.float() if spec.takes_floats else torch.cat(prepare_floats(chosen, processor, spec))
    count = count_images(chosen, pixels[0].nbytes)
    return GoldenInputs(
        images=tuple(GoldenImage(name=image.name, kind=image.kind) for image in chosen[:count]),
        pixel_values=pixels[:count],
        prepared=prepared[:count],
    )


def make_samples(
    options: ExportOptions, photographs: Photographs | None, processor: ImageProcessor, spec: TowerSpec
) -> Samples:
    """Prepare the images for choosing a precision: the photographs and, for a search, drawn images."""
    if not options.runs_on_images or photographs is None:
        return Samples()
    pixel_values = {PHOTOGRAPH: prepare_floats(photographs.images, processor, spec)}
    if options.searches:
        pixel_values[DRAWN] = prepare_floats(draw_images(spec.image_size), processor, spec)
    return Samples(pixel_values=pixel_values, sha256=photographs.sha256)
