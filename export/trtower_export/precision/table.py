"""Print the doctor's findings as a table."""

import math
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from trtower.bundle.certificate import describe_figure
from trtower.spec import HALVES
from trtower_export.console import new_table, print_whole
from trtower_export.precision.doctor import Diagnosis, OperationFigures
from trtower_export.precision.rounding import FP16_RANGE


def print_operations(console: Console, diagnosis: Diagnosis, *, every: bool) -> None:
    """Print one row per operation if ``every``, else one row per kind of operation for all layers together.

    A row for several layers has the sum of their overflows and the worst of every other figure. Below the table, name
    the operations whose values FP16 cannot hold, and those with the largest error.
    """
    measured = [precision for precision in HALVES if any(precision in each.error for each in diagnosis.operations)]
    print_whole(console, _table(diagnosis.operations, measured, every=every))
    for line in _notes(diagnosis, measured, every=every):
        console.print(line, highlight=False, soft_wrap=True)


def _table(operations: Sequence[OperationFigures], measured: Sequence[str], *, every: bool) -> Table:
    errors = [f"{precision.upper()} error" for precision in measured]
    table = new_table("operation", "largest", "headroom", "overflow", "subnormal", *errors, left=("operation",))
    parts: dict[str, list[OperationFigures]] = {}
    for operation in operations:
        general = f"layers.*.{operation.part}" if operation.layer is not None else operation.name
        parts.setdefault(operation.name if every else general, []).append(operation)
    for name, same in parts.items():
        largest = max(same, key=lambda each: each.largest)
        table.add_row(
            name,
            _at(f"{largest.largest:.4g}", largest, same),
            _headroom(largest) + "x",
            str(sum(each.overflow for each in same)),
            f"{max(each.subnormal for each in same):.2%}",
            *(_worst(same, precision) for precision in measured),
            style="bold red" if any(each.overflow for each in same) else None,
        )
    return table


def _notes(diagnosis: Diagnosis, measured: Sequence[str], *, every: bool) -> Iterator[str]:
    """Explain the columns, then name what FP16 cannot hold and the largest errors in FP16."""
    images = ", ".join(diagnosis.error_images)
    error = f"; error: at the output when only this operation rounds, on {images}" if images else ""
    yield (
        f"largest: magnitude of any value on {len(diagnosis.images)} images, sums of squares included"
        f"{'' if every else '; @N: in layer N'}; subnormal: share of results below {FP16_RANGE.smallest_normal:.2g}, "
        f"where FP16 loses digits{error}"
    )
    if diagnosis.overflowing:
        yield f"beyond FP16's {FP16_RANGE.max:.0f}: {', '.join(diagnosis.overflowing)}"
    else:
        tightest = max(diagnosis.operations, key=lambda each: each.largest)
        closest = f"the closest is {tightest.name}, with {_headroom(tightest)}x headroom"
        yield f"nothing is beyond FP16's {FP16_RANGE.max:.0f}; {closest}"
    if "fp16" in measured:
        costly = sorted(diagnosis.operations, key=lambda each: _error(each, "fp16"), reverse=True)[:3]
        errors = ", ".join(f"{each.name} ({describe_figure(each.error['fp16'])})" for each in costly)
        yield f"largest errors in FP16: {errors}"


def _headroom(operation: OperationFigures) -> str:
    return "inf" if operation.headroom is None else f"{operation.headroom:.3g}"


def _worst(same: Sequence[OperationFigures], precision: str) -> str:
    worst = max(same, key=lambda each: _error(each, precision))
    return _at(describe_figure(worst.error[precision]), worst, same)


def _at(text: str, operation: OperationFigures, same: Sequence[OperationFigures]) -> str:
    return f"{text} @{operation.layer}" if len(same) > 1 else text


def _error(operation: OperationFigures, precision: str) -> float:
    error = operation.error[precision]
    return math.inf if error is None else error
