"""Show a certificate as a table."""

from collections.abc import Sequence

from rich.console import Console

from trtower.bundle.certificate import Bound, Certificate, Figures, LayerFigures
from trtower.inspection import describe_figure
from trtower_export.check.layers import first_jump
from trtower_export.console import new_table, print_whole
from trtower_export.precision.bounds import why_not_finite

COLUMNS = ("cos mean", "cos min", "p99.9", "rel error", "NaN/inf")


def print_certificate(console: Console, certificate: Certificate, *, rehearsal: bool) -> None:
    """Print every image's figures, those of PyTorch in the same precision, the bounds and the verdict."""
    table = new_table("image", *COLUMNS, "PyTorch's", left=("image",))
    table.columns[0].max_width = 18
    for row in certificate.images:
        table.add_row(row.name, *_cells(row.bundle), describe_figure(row.torch.relative_error))
    table.add_row("all", *_cells(certificate.bundle), describe_figure(certificate.torch.relative_error), style="bold")
    if len(certificate.batches) > 1:
        for each in certificate.batches:
            table.add_row(f"{each.batch} at once", *_cells(each.bundle), "")
    if certificate.as_typed:
        table.add_row("as typed", *_cells(certificate.as_typed), "")
    print_whole(console, table)
    if certificate.layers:
        _print_layers(console, certificate.layers)
    for bound in certificate.bounds:
        console.print(f"  {_bound(bound)}", highlight=False)
    verdict = "passed" if certificate.passed else "FAILED"
    if rehearsal:
        verdict += " (a rehearsal, with random weights)"
    ran = certificate.describe_run()
    not_run = ""
    if certificate.not_run:
        not_run = f". Built but not run: {', '.join(certificate.not_run)}; `trtower check` on its GPU does"
    console.print(f"{verdict}: {ran}, against {certificate.reference}{not_run}", highlight=False, soft_wrap=True)
    if why := why_not_finite(certificate):
        mend = "`trtower doctor` names the operation, and `trtower export --keep-fp32`, or `--precision auto`, keeps it"
        console.print(f"{why}: {mend} in FP32", highlight=False, soft_wrap=True)


def _print_layers(console: Console, layers: Sequence[LayerFigures]) -> None:
    columns = ("hidden state", "cos min", "rel error", "PyTorch's", "worst image", "token")
    table = new_table(*columns, left=("worst image",))
    console.print("the ONNX graph, on the CPU, layer by layer", highlight=False)
    for layer in layers:
        figures = (layer.bundle.token_cosine_min, layer.bundle.relative_error, layer.torch.relative_error)
        table.add_row(str(layer.layer), *map(describe_figure, figures), layer.worst_image, str(layer.worst_token))
    print_whole(console, table)
    jump = first_jump(layers)
    if jump is None:
        console.print("  no layer's error jumps out of proportion to PyTorch's own", highlight=False)
    else:
        lost = jump.bundle.relative_error is None and jump.torch.relative_error is None
        too = "; PyTorch's own is not finite there, either" if lost else ""
        where = f"worst in {jump.worst_image} at token {jump.worst_token}{too}"
        console.print(f"  the error jumps at hidden state {jump.layer}, {where}", highlight=False, soft_wrap=True)


def _cells(figures: Figures) -> tuple[str, ...]:
    return (
        describe_figure(figures.token_cosine_mean),
        describe_figure(figures.token_cosine_min),
        describe_figure(figures.token_error_p999),
        describe_figure(figures.relative_error),
        str(figures.non_finite),
    )


def _bound(bound: Bound) -> str:
    sign = ">=" if bound.figure == "token_cosine_min" else "<="
    verdict = "holds" if bound.holds else "MISSED"
    counted = bound.figure == "non_finite" and bound.measured is not None
    measured = f"{bound.measured:.0f}" if counted else describe_figure(bound.measured)
    demanded = f"{sign} {bound.limit:g}" if bound.holds else f"where {sign} {bound.limit:g} is demanded"
    return f"{verdict:<7}{bound.images:<11}{bound.figure} {measured} {demanded}"
