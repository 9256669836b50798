"""Show what the doctor found as a table."""

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from trtower.inspection import describe_figure
from trtower.spec import HALVES
from trtower_export.console import print_whole
from trtower_export.precision.doctor import OperationFigures
from trtower_export.precision.rounding import FP16_RANGE


def print_operations(
    console: Console, operations: Sequence[OperationFigures], *, every: bool, images: int, rounded_on: Sequence[str]
) -> None:
    """Print what the doctor found: every operation, or of the same one in all layers the worst of each figure.

    Then what FP16 cannot hold, and what costs most. ``images`` were looked at, and on those in ``rounded_on`` each
    operation was rounded alone.
    """
    table = Table(box=None, pad_edge=False)
    measured = [precision for precision in HALVES if any(precision in each.error for each in operations)]
    heads = [f"alone, {precision.upper()}" for precision in measured]
    for column in ("operation", "largest", "headroom", "overflow", "subnormal", *heads):
        table.add_column(column, justify="left" if column == "operation" else "right", no_wrap=True)
    parts: dict[str, list[OperationFigures]] = {}
    for operation in operations:
        general = f"layers.*.{operation.part}" if operation.layer is not None else operation.name
        parts.setdefault(operation.name if every else general, []).append(operation)
    for name, same in parts.items():
        largest = max(same, key=lambda each: each.largest)
        table.add_row(
            name,
            _at(f"{largest.largest:.4g}", largest, same),
            f"{largest.headroom:.3g}x",
            str(sum(each.overflow for each in same)),
            f"{max(each.subnormal for each in same):.2%}",
            *(_worst(same, precision) for precision in measured),
            style="bold red" if any(each.overflow for each in same) else None,
        )
    print_whole(console, table)
    alone = f"; alone: the error at the output when it alone rounds, on {', '.join(rounded_on)}" if rounded_on else ""
    console.print(
        f"largest: of all that it computes on {images} images, sums of squares included{'' if every else ', @layer'}; "
        f"subnormal: results below {FP16_RANGE.smallest_normal:.2g}, where FP16 loses digits{alone}",
        highlight=False,
        soft_wrap=True,
    )
    overflowing = [operation.name for operation in operations if operation.overflow]
    if overflowing:
        console.print(f"beyond FP16's {FP16_RANGE.max:.0f}: {', '.join(overflowing)}", highlight=False, soft_wrap=True)
    else:
        tightest = max(operations, key=lambda each: each.largest)
        console.print(
            f"nothing is beyond FP16's {FP16_RANGE.max:.0f}; the tightest is {tightest.name}, with "
            f"{tightest.headroom:.3g} times as much room",
            highlight=False,
            soft_wrap=True,
        )
    if "fp16" not in measured:
        return
    costly = sorted(operations, key=lambda each: _error(each, "fp16"), reverse=True)[:3]
    says = ", ".join(f"{each.name} ({describe_figure(each.error['fp16'])})" for each in costly)
    console.print(f"most of the error of FP16: {says}", highlight=False, soft_wrap=True)


def _worst(same: Sequence[OperationFigures], precision: str) -> str:
    worst = max(same, key=lambda each: _error(each, precision))
    return _at(describe_figure(worst.error[precision]), worst, same)


def _at(text: str, operation: OperationFigures, same: Sequence[OperationFigures]) -> str:
    return f"{text} @{operation.layer}" if len(same) > 1 else text


def _error(operation: OperationFigures, precision: str) -> float:
    error = operation.error[precision]
    return math.inf if error is None else error
