"""Print a certificate as a table."""

from collections.abc import Sequence

from rich.console import Console

from trtower.bundle.certificate import Certificate, Figures, LayerFigures, describe_figure
from trtower.parity.bounds import why_not_finite
from trtower_export.check.layers import first_jump
from trtower_export.check.policy import PolicyCheck
from trtower_export.console import new_table, print_whole

COLUMNS = ("cosine mean", "cosine min", "error p99.9", "rel. error", "NaN/inf")


def print_certificate(console: Console, certificate: Certificate, *, rehearsal: bool) -> None:
    """Print the figures of every image, PyTorch's error in the same precision, the bounds and the verdict.

    Names of images are cut to 60 characters.
    """
    table = new_table("image", *COLUMNS, "PyTorch's error", left=("image",))
    table.columns[0].max_width = 60
    for row in certificate.images:
        table.add_row(row.name, *_cells(row.bundle), _own(row.torch))
    table.add_row("all images", *_cells(certificate.bundle), _own(certificate.torch), style="bold")
    if len(certificate.batches) > 1:
        for each in certificate.batches:
            table.add_row(f"batch {each.batch}", *_cells(each.bundle), "")
    if certificate.as_typed:
        table.add_row("FP16 emulated", *_cells(certificate.as_typed), "")
    print_whole(console, table)
    if certificate.layers:
        _print_layers(console, certificate.layers)
    for bound in certificate.bounds:
        console.print(f"  {bound.describe()}", highlight=False)
    verdict = "passed" if certificate.passed else "FAILED"
    if rehearsal:
        verdict += " (rehearsal with random weights)"
    ran = certificate.describe_run()
    not_run = ""
    if certificate.not_run:
        not_run = f". Built but not run: {', '.join(certificate.not_run)}; run `trtower check` on its GPU"
    console.print(f"{verdict}: {ran}. Reference: {certificate.reference}{not_run}", highlight=False, soft_wrap=True)
    if why := why_not_finite(certificate):
        remedy = "find the operation with `trtower doctor`, and keep it in FP32 with `trtower export --keep-fp32`"
        console.print(f"{why}: {remedy} or `--precision auto`", highlight=False, soft_wrap=True)


def print_policy(console: Console, check: PolicyCheck) -> None:
    """Print how far the actions of each joint are apart, and the verdict."""
    with_own = check.own_error is not None
    columns = ("spread", "largest difference", "mean difference", *(["PyTorch's largest"] if with_own else []))
    table = new_table("joint", *columns, left=("joint",))
    for joint in check.joints:
        figures = (joint.spread, joint.largest, joint.mean, *([joint.own] if with_own else []))
        table.add_row(joint.name, *map(describe_figure, figures))
    print_whole(console, table)
    own = f"; PyTorch's own: {describe_figure(check.own_error)}" if with_own else ""
    console.print(
        f"{'passed' if check.passed else 'FAILED'}: actions of {check.policy} on {check.observations} differ by "
        f"{describe_figure(check.relative_error)} of their length, at most {describe_figure(check.limit)} allowed"
        f"{own}. The bundle ran on {check.backend}.",
        highlight=False,
        soft_wrap=True,
    )


def _print_layers(console: Console, layers: Sequence[LayerFigures]) -> None:
    columns = ("hidden state", "cosine min", "rel. error", "PyTorch's error", "worst image", "worst token")
    table = new_table(*columns, left=("worst image",))
    console.print("The ONNX graph layer by layer, on the CPU", highlight=False)
    for layer in layers:
        figures = (layer.bundle.token_cosine_min, layer.bundle.relative_error, layer.torch.relative_error)
        table.add_row(str(layer.layer), *map(describe_figure, figures), layer.worst_image, str(layer.worst_token))
    print_whole(console, table)
    jump = first_jump(layers)
    if jump is None:
        console.print("  no layer's error jumps out of proportion to PyTorch's own", highlight=False)
    else:
        both = jump.bundle.relative_error is None and jump.torch.relative_error is None
        too = "; PyTorch's own result is not finite there either" if both else ""
        where = f"worst at token {jump.worst_token} of {jump.worst_image}{too}"
        console.print(f"  the error jumps at hidden state {jump.layer}, {where}", highlight=False, soft_wrap=True)


def _own(torch: Figures | None) -> str:
    return describe_figure(torch.relative_error) if torch else ""


def _cells(figures: Figures) -> tuple[str, ...]:
    return (
        describe_figure(figures.token_cosine_mean),
        describe_figure(figures.token_cosine_min),
        describe_figure(figures.token_error_p999),
        describe_figure(figures.relative_error),
        str(figures.non_finite),
    )
