"""Turn a manifest, its certificate and their pictures into one HTML page that needs no other file."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtower.bundle.certificate import Bound, Certificate, Figures, LayerFigures
from trtower.bundle.manifest import Manifest
from trtower.extras import import_extra
from trtower.inspection import describe_figure
from trtower.layer_codes import name_layer
from trtower.spec import EIGHT_BIT
from trtower_export.check.photographs import PHOTOGRAPH
from trtower_export.precision.bounds import why_not_finite

TEMPLATE = Path(__file__).parent / "page.html.j2"

COLUMNS = ("cosine, mean", "cosine, worst", "token error, 99.9 %", "relative error", "largest error", "NaN or inf")
"""The heads of what `_cells` gives."""

BOUNDS = {
    "non_finite": "values that are NaN or infinite",
    "token_cosine_min": "cosine of the worst token",
    "token_error_p999": "token error, 99.9th percentile",
    "relative_error": "relative error",
    "relative_error_over_torch": "relative error over PyTorch's own",
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One photograph of the page: ``group`` is "worst" or "best", ``png`` the strip of its four panels."""

    file: str
    group: str
    name: str
    caption: str
    png: bytes


def render(
    manifest: Manifest,
    certificate: Certificate,
    *,
    pictures: Sequence[Picture],
    layers: bytes | None,
    tokens: bytes | None,
    jump: LayerFigures | None,
) -> str:
    """Fill the template. Every name in it comes from somebody else's files, so all of it is escaped."""
    jinja2 = import_extra("jinja2", extra="report", purpose="a report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["data_uri"] = _data_uri
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page: str = template.render(
        m=manifest,
        c=certificate,
        precision=manifest.precision.upper(),
        own=f"PyTorch {manifest.precision.upper()}",
        eight_bit=manifest.precision in EIGHT_BIT,
        why=why_not_finite(certificate),
        run=certificate.describe_run(),
        emulated="emulated" in certificate.backend,
        cut=manifest.cut.describe_cut(manifest.full, manifest.precision),
        columns=COLUMNS,
        bounds=[_bound(bound) for bound in certificate.bounds],
        overall=[
            ("bundle, at every batch", _cells(certificate.bundle)),
            (f"PyTorch {manifest.precision.upper()}", _cells(certificate.torch)),
        ],
        batches=[
            (entry.batch, _batch_note(entry.batch, manifest), _cells(entry.bundle)) for entry in certificate.batches
        ],
        as_typed=_cells(certificate.as_typed) if certificate.as_typed else None,
        images=[
            (image.name, image.kind, _cells(image.bundle), describe_figure(image.torch.relative_error))
            for image in certificate.images
        ],
        kinds=_count_kinds(certificate),
        layer_rows=[_layer(figures, manifest) for figures in certificate.layers],
        layers_png=layers,
        tokens_png=tokens,
        jump=_layer(jump, manifest) if jump else None,
        worst=[picture for picture in pictures if picture.group == "worst"],
        best=[picture for picture in pictures if picture.group == "best"],
        files=[
            (name, entry.sha256, entry.size, _role(name, certificate)) for name, entry in sorted(manifest.files.items())
        ],
    )
    return page


def _cells(figures: Figures) -> tuple[str, ...]:
    return (
        describe_figure(figures.token_cosine_mean),
        describe_figure(figures.token_cosine_min),
        describe_figure(figures.token_error_p999),
        describe_figure(figures.relative_error),
        describe_figure(figures.max_abs_error),
        f"{figures.non_finite:,}",
    )


def _bound(bound: Bound) -> dict[str, Any]:
    counted = bound.figure == "non_finite" and bound.measured is not None
    return {
        "figure": BOUNDS.get(bound.figure, bound.figure),
        "images": "photographs" if bound.images == PHOTOGRAPH else f"{bound.images} images",
        "measured": f"{bound.measured:,.0f}" if counted else describe_figure(bound.measured),
        "limit": f"{'≥' if bound.figure.startswith('token_cosine') else '≤'} {bound.limit:g}",
        "holds": bound.holds,
    }


def _batch_note(batch: int, manifest: Manifest) -> str:
    return f"in pieces of at most {manifest.batch.max}" if batch > manifest.batch.max else "in one call"


def _layer(figures: LayerFigures, manifest: Manifest) -> dict[str, Any]:
    spec = manifest.spec
    token = figures.worst_token - spec.num_prefix_tokens
    row, column = divmod(token, spec.num_patches_per_side)
    return {
        "state": name_layer(figures.layer, spec.num_layers),
        "read": figures.layer in spec.layers,
        "bundle": describe_figure(figures.bundle.relative_error),
        "torch": describe_figure(figures.torch.relative_error),
        "cosine": describe_figure(figures.bundle.token_cosine_min),
        "image": figures.worst_image,
        "place": f"prefix token {figures.worst_token}" if token < 0 else f"row {row}, column {column}",
    }


def _count_kinds(certificate: Certificate) -> str:
    """Count the images: "12 photographs and 3 drawn images (constant, noise, saturated)"."""
    photographs = sum(image.kind == PHOTOGRAPH for image in certificate.images)
    drawn = sorted(image.kind for image in certificate.images if image.kind != PHOTOGRAPH)
    text = f"{photographs} photograph{'' if photographs == 1 else 's'}"
    if drawn:
        text += f" and {len(drawn)} drawn image{'' if len(drawn) == 1 else 's'} ({', '.join(dict.fromkeys(drawn))})"
    return text


def _role(name: str, certificate: Certificate) -> str:
    if name in certificate.executed:
        return "executed"
    if name in certificate.not_run:
        return "built, not run"
    return "certified" if name in certificate.files else ""


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
