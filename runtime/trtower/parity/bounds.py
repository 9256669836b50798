"""The accuracy that a check requires of each precision, and the measurements behind each limit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trtower.bundle.certificate import Bound, Certificate, Figures

PHOTOGRAPH, DRAWN = "photograph", "drawn"
"""The kinds of images that bounds are set for."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The limits of a precision, one for each figure."""

    token_cosine_min: float
    """The least cosine of any token of any image. On a pretrained ViT-S/14 and a dozen photographs, PyTorch's own FP16
    and BF16 measured 0.99998 and 0.9990, and ONNX Runtime's FP8 and INT8 0.983 and 0.922. A random ViT-B/32 that is cut
    one layer off measured 0.983, with a relative error of 0.17."""

    token_error_p999: float
    """The error that only one token in a thousand exceeds, relative to the token's own length. That ViT measured 1.0e-2
    in FP16, 0.16 in FP8 and 0.23 in INT8. The limits allow two to three times as much: one photograph measured 0.36."""

    relative_error: float
    """Over all images. The limits are about five times the error of PyTorch's own FP16 (1.7e-3) and BF16 (1.3e-2) on
    that ViT, and twice that of 8 bits (0.085 and 0.077). They are below the error of a cut that is off by one layer."""

    relative_error_over_torch: float | None = 3.0
    """The relative error divided by PyTorch's own in the same precision. ONNX Runtime's FP16 measured 0.36 (random
    ViT-L/14-336) and 1.16 (pretrained ViT-S/14), and its 8 bits 1.0, over PyTorch's simulation of them. There is no
    ratio in FP32, where PyTorch's own error is zero, nor if PyTorch's own result overflows or it did not run."""


BOUNDS = {
    "fp32": Bounds(
        token_cosine_min=0.99999, token_error_p999=1e-3, relative_error=1e-4, relative_error_over_torch=None
    ),
    "fp16": Bounds(token_cosine_min=0.999, token_error_p999=3e-2, relative_error=1e-2),
    "bf16": Bounds(token_cosine_min=0.99, token_error_p999=1.5e-1, relative_error=5e-2),
    "fp8": Bounds(token_cosine_min=0.9, token_error_p999=0.5, relative_error=0.15),
    "int8": Bounds(token_cosine_min=0.9, token_error_p999=0.5, relative_error=0.15),
}

Measured = Mapping[str, tuple[Sequence[Figures], Figures | None]]
"""For each kind of images: the bundle's figures at every batch, and PyTorch's own in its precision, if it ran."""


def judge(precision: str, measured: Measured) -> tuple[Bound, ...]:
    """Compare the worst figure of any batch with each bound of a precision. NaN meets no bound."""
    return tuple(
        bound for images, (batches, own) in measured.items() for bound in _judge(precision, images, batches, own)
    )


def _judge(precision: str, images: str, batches: Sequence[Figures], own: Figures | None) -> list[Bound]:
    def compare(figure: str, limit: float, values: Sequence[float | None], *, is_minimum: bool = False) -> Bound:
        finite = [value for value in values if value is not None]
        worst = None if len(finite) < len(values) else min(finite) if is_minimum else max(finite)
        holds = worst is not None and (worst >= limit if is_minimum else worst <= limit)
        return Bound(figure=figure, images=images, limit=limit, measured=worst, holds=holds)

    limits = BOUNDS[precision]
    bounds = [
        compare("non_finite", 0.0, [float(each.non_finite) for each in batches]),
        compare(
            "token_cosine_min", limits.token_cosine_min, [each.token_cosine_min for each in batches], is_minimum=True
        ),
        compare("token_error_p999", limits.token_error_p999, [each.token_error_p999 for each in batches]),
        compare("relative_error", limits.relative_error, [each.relative_error for each in batches]),
    ]
    ratio = limits.relative_error_over_torch
    if ratio is not None and own and own.relative_error is not None:  # None if PyTorch's own result overflows
        ratios = [_ratio(each.relative_error, own.relative_error) for each in batches]
        bounds.append(compare("relative_error_over_torch", ratio, ratios))
    return bounds


def _ratio(error: float | None, own: float) -> float | None:
    """Divide two relative errors; return None if there is no ratio."""
    if error is None:
        return None
    if error == 0.0:
        return 0.0
    return error / own if own else None


def why_not_finite(certificate: Certificate) -> str:
    """Explain why a result is not finite; return "" if it is finite, or the cause is unknown."""
    typed = certificate.as_typed
    if not certificate.bundle.non_finite and not (typed and typed.non_finite):
        return ""
    if certificate.torch and certificate.torch.relative_error is None:
        return "PyTorch in the same precision is not finite either"
    if certificate.bundle.non_finite:
        return ""
    return "the result is not finite when rounded to the graph's types, although this machine's kernels hide that"
