"""List targets with their TensorRT, CUDA, GPUs, platform and Python."""

from collections.abc import Sequence

from rich.console import Console

from trtower_export.console import new_table, print_whole, say
from trtower_export.targets import Target

COLUMNS = ("name", "title", "plan", "tensorrt", "cuda", "compute capability", "platform", "python", "container")


def print_targets(console: Console, targets: Sequence[Target]) -> None:
    """Print targets as a table, with every name in full. Whatever is open is a dash."""
    table = new_table(*COLUMNS, left=COLUMNS)
    for each in targets:
        cells = (each.name, each.title, each.flavour, each.tensorrt, each.cuda, ", ".join(each.compute_capabilities))
        table.add_row(*(cell or "-" for cell in (*cells, each.platform, each.python, each.container)))
    print_whole(console, table)


def print_sources(console: Console, targets: Sequence[Target]) -> None:
    """Print where each target was read, and what is uncertain about it."""
    for each in targets:
        note = f" ({each.note})" if each.note else ""
        say(console, f"{each.name}: read on {each.read} in {each.source}{note}")
