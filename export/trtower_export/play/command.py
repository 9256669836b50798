"""The command `trtower play`."""

from importlib.util import find_spec
from typing import Annotated

import typer
from rich.console import Console

from trtower_export.arguments import (
    BackendOption,
    BundleArgument,
    ExportedTowerOption,
    PickleOption,
    RemoteCodeOption,
    WeightsOption,
)
from trtower_export.console import ConsoleProgress, importing, say

EXAMPLES = 6
"""Photographs that are offered, if scikit-image is installed: the demo's."""


def play(
    bundle: BundleArgument,
    checkpoint: WeightsOption = None,
    tower: ExportedTowerOption = None,
    backend: BackendOption = "auto",
    host: Annotated[str, typer.Option(metavar="NAME", help="Where to listen; 0.0.0.0 lets others in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="The port to listen at.")] = 7860,
    allow_pickle: PickleOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> int:
    """Show what a tower sees, in the browser.

    Drop a picture, and see its patches as colours, from PyTorch and from the bundle; click one to see which others are
    like it.
    """
    from trtower.bundle.bundle import Bundle

    console, progress = Console(), ConsoleProgress(Console(stderr=True))
    opened = Bundle.open(bundle)
    with importing(progress):
        from trtower_export.check.photographs import load_photographs
        from trtower_export.checkpoint.checkpoint import reopen_checkpoint
        from trtower_export.options import Trust
        from trtower_export.play.page import make_page, serve
        from trtower_export.play.towers import Towers

    trust = Trust(allow_pickle=allow_pickle, remote_code=trust_remote_code)
    source = reopen_checkpoint(opened.manifest.source, moved_to=checkpoint, tower=tower, trust=trust)
    with progress.step("Load both towers"):
        towers = Towers.open(opened, source, backend)
    examples = load_photographs(None, limit=EXAMPLES).images if find_spec("skimage") else ()
    page = make_page(towers, opened.path.name, [each.image for each in examples])
    say(console, f"http://{host}:{port} (Ctrl-C ends it)")
    serve(page, host, port)
    return 0
