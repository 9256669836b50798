"""Render a manifest, its certificate and the pictures as one self-contained HTML page."""

import base64
from collections.abc import Sequence
from pathlib import Path

from trtower.bundle.certificate import Certificate, LayerFigures, describe_figure
from trtower.bundle.manifest import Manifest
from trtower.extras import import_extra
from trtower.layer_codes import name_layer
from trtower.parity.bounds import why_not_finite
from trtower.spec import EIGHT_BIT
from trtower_export.check.policy import PolicyCheck
from trtower_export.check.report.pca import PcaRow

TEMPLATE = Path(__file__).parent / "page.html.j2"


Pictures = Sequence[tuple[PcaRow, bytes]]
"""The photographs of the page, each with the PNG of its four panels."""


def render(
    manifest: Manifest,
    certificate: Certificate,
    *,
    worst: Pictures,
    best: Pictures,
    layers: bytes | None,
    tokens: bytes | None,
    jump: LayerFigures | None,
    policy: PolicyCheck | None,
) -> str:
    """Fill the template. Names come from other people's files, so everything is escaped."""
    jinja2 = import_extra("jinja2", extra="report", purpose="a report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "figure": describe_figure,
        "state": lambda layer: name_layer(layer, manifest.spec.num_layers),
        "data_uri": lambda png: f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}",
    }
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page: str = template.render(
        m=manifest,
        c=certificate,
        precision=manifest.precision.upper(),
        eight_bit=manifest.precision in EIGHT_BIT,
        why=why_not_finite(certificate),
        layers_png=layers,
        tokens_png=tokens,
        jump=jump,
        worst=worst,
        best=best,
        policy=policy,
    )
    return page
