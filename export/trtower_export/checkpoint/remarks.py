"""Tell the user what an export does that they may not expect: defaults nobody chose, and work left to the caller."""

from trtower.bundle.manifest import TO_PAD
from trtower.spec import TowerSpec
from trtower_export.checkpoint.checkpoint import Checkpoint
from trtower_export.checkpoint.preprocessor import image_aspect_ratio
from trtower_export.console import Progress
from trtower_export.options import ExportOptions


def say_what_is_read(
    checkpoint: Checkpoint, spec: TowerSpec, options: ExportOptions, choice: str, progress: Progress
) -> None:
    """Report what an export recognised and reads, and what the user may not expect of it.

    ``choice`` says which plan is built.
    """
    layout = checkpoint.layout
    progress.say(checkpoint.describe())
    taken = "" if spec.takes_floats else f", as bytes in {spec.layout.upper()},"
    progress.say(f"reads {spec.reading}, at {spec.image_size} pixels{taken} in {options.graph_precision}; {choice}")
    for remark in layout.remarks:
        progress.say(remark)
    if spec.head:
        progress.say(f"ends with the {spec.head.describe()}")
        if options.select_layer is not None or options.select_feature is not None:
            progress.say(
                "WARNING: --select-layer or --select-feature may feed the projector what it was not trained on; leave "
                "them out to read what the checkpoint names"
            )
    if layout.contrastive and not spec.embeds:
        progress.say(
            f"this {layout.kind} embeds an image as one pooled vector; a bundle returns the features of "
            f"{spec.reading}, not the pooled embedding, which --head embedding exports"
        )
    if not spec.embeds and options.select_layer is None and layout.select_layer is None and checkpoint.recipe is None:
        progress.say(
            "the checkpoint does not say which layer to read: using LLaVA's default, hidden state -2; choose another "
            "with --select-layer"
        )
    if ratio := image_aspect_ratio(checkpoint):
        progress.say(f"the model prepares pictures by {ratio}: {TO_PAD}")
    if rest := spec.image_size % spec.patch_size:
        whole = spec.image_size - rest
        progress.say(
            f"{spec.image_size} pixels are not a multiple of the patch size {spec.patch_size}: the last {rest} of each "
            f"row and column are not read; the nearest sizes that fit are {whole} and {whole + spec.patch_size}"
        )
