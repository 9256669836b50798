"""What a check demands of a precision, and why just that much."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trtower.bundle.certificate import Bound, Certificate, Figures


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The limits of a precision, by the figures that they are of."""

    token_cosine_min: float
    """The worst token of any image. On a pretrained ViT-S/14 and a dozen photographs PyTorch's own FP16 and BF16 leave
    0.99998 and 0.9990, ONNX Runtime's FP8 and INT8 0.983 and 0.922; a random ViT-B/32 cut one layer off leaves 0.983,
    with a relative error of 0.17."""

    token_error_p999: float
    """All but one token in a thousand, each by its own length. On that ViT 1.0e-2 in FP16, 0.16 in FP8, 0.23 in INT8:
    two to three times as much is allowed, since one photograph made 0.36."""

    relative_error: float
    """Over all images: about five times what PyTorch's own FP16 (1.7e-3) and BF16 (1.3e-2) make on that ViT, and twice
    what 8 bits do (0.085 and 0.077), below what one layer off makes."""

    relative_error_over_torch: float | None = 3.0
    """The relative error over PyTorch's own in the same precision. ONNX Runtime's FP16 measured 0.36 (random
    ViT-L/14-336) and 1.16 (pretrained ViT-S/14), its 8 bits 1.0 of PyTorch's simulation. In FP32 PyTorch's own error is
    zero, and there is no ratio, as where PyTorch's own overflows."""


BOUNDS = {
    "fp32": Bounds(
        token_cosine_min=0.99999, token_error_p999=1e-3, relative_error=1e-4, relative_error_over_torch=None
    ),
    "fp16": Bounds(token_cosine_min=0.999, token_error_p999=3e-2, relative_error=1e-2),
    "bf16": Bounds(token_cosine_min=0.99, token_error_p999=1.5e-1, relative_error=5e-2),
    "fp8": Bounds(token_cosine_min=0.9, token_error_p999=0.5, relative_error=0.15),
    "int8": Bounds(token_cosine_min=0.9, token_error_p999=0.5, relative_error=0.15),
}

Measured = Mapping[str, tuple[Sequence[Figures], Figures]]
"""By kind of images: the bundle's figures at every batch, and PyTorch's own in the bundle's precision."""


def judge(precision: str, measured: Measured) -> tuple[Bound, ...]:
    """Hold the worst figure of any batch against the bounds of a precision. NaN holds nothing."""
    return tuple(bound for images, (found, own) in measured.items() for bound in _judge(precision, images, found, own))


def _judge(precision: str, images: str, found: Sequence[Figures], own: Figures) -> list[Bound]:
    def hold(figure: str, limit: float, values: Sequence[float | None], *, least: bool = False) -> Bound:
        known = [value for value in values if value is not None]
        worst = None if len(known) < len(values) else min(known) if least else max(known)
        holds = worst is not None and (worst >= limit if least else worst <= limit)
        return Bound(figure=figure, images=images, limit=limit, measured=worst, holds=holds)

    limits = BOUNDS[precision]
    bounds = [
        hold("non_finite", 0.0, [float(figures.non_finite) for figures in found]),
        hold("token_cosine_min", limits.token_cosine_min, [each.token_cosine_min for each in found], least=True),
        hold("token_error_p999", limits.token_error_p999, [each.token_error_p999 for each in found]),
        hold("relative_error", limits.relative_error, [each.relative_error for each in found]),
    ]
    ratio = limits.relative_error_over_torch
    if ratio is not None and own.relative_error is not None:  # where PyTorch's own overflows there is no ratio
        ratios = [_ratio(each.relative_error, own.relative_error) for each in found]
        bounds.append(hold("relative_error_over_torch", ratio, ratios))
    return bounds


def _ratio(found: float | None, own: float) -> float | None:
    """Divide two relative errors."""
    if found is None:
        return None
    if found == 0.0:
        return 0.0
    return found / own if own else None


def why_not_finite(certificate: Certificate) -> str:
    """Say what a result that is not finite comes from, where that is known; "" where it is not, or there is none."""
    typed = certificate.as_typed
    if not certificate.bundle.non_finite and not (typed and typed.non_finite):
        return ""
    if certificate.torch.relative_error is None:
        return "PyTorch in the same precision is not finite, either"
    if certificate.bundle.non_finite:
        return ""
    return "rounded as the graph's types say it is not finite, though this machine's kernels hide that"
