"""Say of an export what its reader would not expect: defaults that nobody chose, and what stays with the caller."""

from trtower.bundle.manifest import TO_PAD
from trtower.spec import TowerSpec
from trtower_export.checkpoint.checkpoint import Checkpoint
from trtower_export.checkpoint.preprocessor import image_aspect_ratio
from trtower_export.console import Progress
from trtower_export.options import ExportOptions


def say_what_is_read(
    checkpoint: Checkpoint, spec: TowerSpec, options: ExportOptions, choice: str, progress: Progress
) -> None:
    """Say what an export recognised and reads, and what of it its reader would not expect.

    ``choice`` says which plan is built.
    """
    layout = checkpoint.layout
    progress.say(checkpoint.describe())
    progress.say(f"reads {spec.reading}, at {spec.image_size} pixels in {options.graph_precision}; {choice}")
    for remark in layout.remarks:
        progress.say(remark)
    if layout.contrastive:
        progress.say(
            f"this {layout.kind} embeds an image as one pooled vector; a bundle gives the features of {spec.reading}, "
            "and not the pooled embedding"
        )
    if options.select_layer is None and layout.select_layer is None and checkpoint.recipe is None:
        progress.say(
            "nothing says which layer to read: hidden state -2 is LLaVA's default; --select-layer chooses another"
        )
    if ratio := image_aspect_ratio(checkpoint):
        progress.say(f"the model prepares pictures by {ratio}: {TO_PAD}")
    if rest := spec.image_size % spec.patch_size:
        whole = spec.image_size - rest
        progress.say(
            f"{spec.image_size} pixels are not a multiple of the patch's {spec.patch_size}: the last {rest} of each "
            f"row and column are not read; {whole} and {whole + spec.patch_size} are the nearest sizes read whole"
        )
