"""Turn tokens and reference tokens into the figures of a certificate, over one image or many."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from trtower.bundle.certificate import Figures

TAIL = 0.999
"""The quantile behind `token_error_p999`: at most one token in a thousand exceeds it."""


@dataclass
class MetricSums:
    """The sums from which the figures of one image, or of many, are computed, in FP64."""

    squared_error: float = 0.0
    squared_reference: float = 0.0
    max_abs_error: float = 0.0
    non_finite: int = 0
    cosines: list[Tensor] = field(default_factory=list)
    token_errors: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, tokens: Tensor, reference: Tensor) -> "MetricSums":
        """Compare tokens (..., D) with reference tokens of the same shape."""
        x, ref = tokens.double(), reference.double()
        error = x - ref
        norms = ref.norm(dim=-1).clamp_min(torch.finfo(torch.double).tiny)
        return cls(
            squared_error=float(error.square().sum()),
            squared_reference=float(ref.square().sum()),
            max_abs_error=float(error.abs().max()),
            non_finite=tokens.numel() - int(tokens.isfinite().sum()),
            cosines=[torch.nn.functional.cosine_similarity(x, ref, dim=-1).flatten()],
            token_errors=[(error.norm(dim=-1) / norms).flatten()],
        )

    def add(self, other: "MetricSums") -> None:
        """Add another image."""
        self.squared_error += other.squared_error
        self.squared_reference += other.squared_reference
        self.max_abs_error = float(np.maximum(self.max_abs_error, other.max_abs_error))  # max() may drop a NaN
        self.non_finite += other.non_finite
        self.cosines += other.cosines
        self.token_errors += other.token_errors

    def figures(self) -> Figures:
        """Return the figures of everything that was added."""
        cosines = torch.cat(self.cosines)
        return Figures(
            token_cosine_mean=_finite(float(cosines.mean())),
            token_cosine_min=_finite(float(cosines.min())),
            token_error_p999=_finite(float(np.quantile(torch.cat(self.token_errors), TAIL, method="inverted_cdf"))),
            relative_error=_finite(math.sqrt(self.squared_error / max(self.squared_reference, math.ulp(0.0)))),
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
