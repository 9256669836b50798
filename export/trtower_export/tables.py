"""Show a certificate as a table."""

from rich.console import Console
from rich.table import Table

from trtower.inspection import describe_figure
from trtower.manifest import Bound, Certificate, Figures

COLUMNS = ("cos mean", "cos min", "rel error", "max error", "NaN/inf")


def print_certificate(console: Console, certificate: Certificate, *, rehearsal: bool) -> None:
    """Print every image's figures, those of PyTorch in the same precision, the bounds and the verdict."""
    table = Table(box=None, pad_edge=False)
    table.add_column("image", no_wrap=True, max_width=18)
    for column in (*COLUMNS, "PyTorch's"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in certificate.images:
        table.add_row(row.name, *_cells(row.bundle), describe_figure(row.torch.relative_error))
    table.add_row("all", *_cells(certificate.bundle), describe_figure(certificate.torch.relative_error), style="bold")
    console.print(table)
    for bound in certificate.bounds:
        console.print(f"  {_bound(bound)}", highlight=False)
    verdict = "passed" if certificate.passed else "FAILED"
    if rehearsal:
        verdict += " (a rehearsal, with random weights)"
    console.print(f"{verdict}: {_what_ran(certificate)}", highlight=False, soft_wrap=True)


def _what_ran(certificate: Certificate) -> str:
    subject = "the plan was run" if certificate.ran == "plan" else "the ONNX graph was run"
    text = f"{subject} on {certificate.backend}, against {certificate.reference}"
    if certificate.not_run:
        text += f". Built but not run: {', '.join(certificate.not_run)}; `trtower check` on its GPU proves it"
    return text


def _cells(figures: Figures) -> tuple[str, ...]:
    return (
        describe_figure(figures.token_cosine_mean),
        describe_figure(figures.token_cosine_min),
        describe_figure(figures.relative_error),
        describe_figure(figures.max_abs_error),
        str(figures.non_finite),
    )


def _bound(bound: Bound) -> str:
    sign = ">=" if bound.figure == "token_cosine_min" else "<="
    verdict = "holds" if bound.holds else "MISSED"
    return f"{verdict:<7}{bound.figure} {describe_figure(bound.measured)} {sign} {bound.limit:g}"
