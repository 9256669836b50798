"""Turn tokens and reference tokens into the figures of a certificate, over one image or many."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from trtower.bundle.certificate import Figures

TAIL = 0.999
"""The quantile behind `token_error_p999`: at most one token in a thousand exceeds it."""


@dataclass
class MetricSums:
    """The sums from which the figures of one image, or of many, are computed, in FP64.

    Of a pair of towers each is measured by itself, and the worse one counts.
    """

    squared_error: "np.typing.NDArray[np.float64]" = field(default_factory=lambda: np.zeros(1))
    squared_reference: "np.typing.NDArray[np.float64]" = field(default_factory=lambda: np.zeros(1))
    max_abs_error: float = 0.0
    non_finite: int = 0
    cosines: list[Tensor] = field(default_factory=list)
    token_errors: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, tokens: Tensor, reference: Tensor, parts: Sequence[int] = ()) -> "MetricSums":
        """Compare tokens (..., D) with reference tokens of the same shape, or each of their ``parts``, widths of D."""
        widths = [*parts] or [tokens.shape[-1]]
        found, expected = tokens.double().split(widths, dim=-1), reference.double().split(widths, dim=-1)
        errors = [x - ref for x, ref in zip(found, expected, strict=True)]
        norms = [ref.norm(dim=-1).clamp_min(torch.finfo(torch.double).tiny) for ref in expected]
        similar = torch.nn.functional.cosine_similarity
        cosines = torch.stack([similar(x, ref, dim=-1) for x, ref in zip(found, expected, strict=True)])
        token_errors = torch.stack([error.norm(dim=-1) / norm for error, norm in zip(errors, norms, strict=True)])
        return cls(
            squared_error=np.array([float(error.square().sum()) for error in errors]),
            squared_reference=np.array([float(ref.square().sum()) for ref in expected]),
            max_abs_error=float(torch.stack([error.abs().max() for error in errors]).max()),
            non_finite=tokens.numel() - int(tokens.isfinite().sum()),
            cosines=[cosines.amin(0).flatten()],
            token_errors=[token_errors.amax(0).flatten()],
        )

    def add(self, other: "MetricSums") -> None:
        """Add another image."""
        self.squared_error = self.squared_error + other.squared_error
        self.squared_reference = self.squared_reference + other.squared_reference
        self.max_abs_error = float(np.maximum(self.max_abs_error, other.max_abs_error))  # max() may drop a NaN
        self.non_finite += other.non_finite
        self.cosines += other.cosines
        self.token_errors += other.token_errors

    def figures(self) -> Figures:
        """Return the figures of everything that was added."""
        cosines, reference = torch.cat(self.cosines), np.maximum(self.squared_reference, math.ulp(0.0))
        return Figures(
            token_cosine_mean=_finite(float(cosines.mean())),
            token_cosine_min=_finite(float(cosines.min())),
            token_error_p999=_finite(float(np.quantile(torch.cat(self.token_errors), TAIL, method="inverted_cdf"))),
            relative_error=_finite(float(np.sqrt(self.squared_error / reference).max())),
            max_abs_error=_finite(self.max_abs_error),
            non_finite=self.non_finite,
        )


def total(parts: Iterable[MetricSums]) -> MetricSums:
    """Add up several sums."""
    whole = MetricSums()
    for part in parts:
        whole.add(part)
    return whole


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
