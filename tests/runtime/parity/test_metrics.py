"""Each figure measures what its name says, and each bound is judged on the worst batch."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from trtower.bundle.certificate import Figures
from trtower.parity.bounds import BOUNDS, judge
from trtower.parity.metrics import MetricSums, total

LIMITS = BOUNDS["fp16"]

FINE = Figures(
    token_cosine_mean=1.0,
    token_cosine_min=1.0,
    token_error_p999=2e-3,
    relative_error=2e-3,
    max_abs_error=0.0,
    non_finite=0,
)


def tokens(errors: list[float], images: int = 1) -> MetricSums:
    """Compare tokens of length 5 with ones that are off by ``errors``, as shares of that length, over ``images``."""
    reference = torch.tensor([3.0, 4.0]).repeat(len(errors), 1)
    found = reference + torch.tensor(errors)[:, None] * torch.tensor([4.0, -3.0])  # across, as long as the token
    parts = zip(found.chunk(images), reference.chunk(images), strict=True)
    return total(MetricSums.of(x[None], ref[None]) for x, ref in parts)


@pytest.mark.parametrize("images", [1, 10])
def test_percentile_is_the_error_that_one_token_in_a_thousand_exceeds(images: int) -> None:
    steps = [index / 1024 for index in range(1, 1001)]
    assert tokens(steps, images).figures().token_error_p999 == 999 / 1024
    assert tokens(steps[::-1], images).figures().token_error_p999 == 999 / 1024


def test_percentile_of_few_tokens_is_the_worst() -> None:
    assert tokens([0.125, 0.5, 0.25]).figures().token_error_p999 == 0.5
    assert tokens([index / 1024 for index in range(1, 1000)]).figures().token_error_p999 == 999 / 1024


@pytest.mark.parametrize(("bad", "percentile"), [(0, 0.125), (1, 0.125), (2, 0.125), (3, 4.0)])
def test_percentile_leaves_out_two_bad_tokens_in_two_thousand(bad: int, percentile: float) -> None:
    figures = tokens([0.125] * (2000 - bad) + [4.0] * bad).figures()
    assert figures.token_error_p999 == percentile
    assert (figures.token_cosine_min < 0.3) is (bad > 0)  # the minimum includes every token


def test_error_of_a_token_is_relative_to_its_own_length() -> None:
    reference = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    found = reference + torch.tensor([[[4.0, -3.0], [4.0, -3.0]]])
    figures = MetricSums.of(found, reference).figures()
    assert figures.token_error_p999 == 1.0
    assert figures.relative_error == pytest.approx((50 / (25 + 250_000)) ** 0.5)


def test_zero_token_that_matches_has_no_error_and_nan_is_never_a_percentile() -> None:
    zeros = torch.zeros(1, 3, 2)
    assert MetricSums.of(zeros, zeros).figures().token_error_p999 == 0.0
    found = torch.ones(1, 5000, 2)
    found[0, 7, 1] = float("nan")
    figures = MetricSums.of(found, torch.ones(1, 5000, 2)).figures()
    assert figures.token_error_p999 is None
    assert figures.non_finite == 1


def missed(found: list[Figures], own: Figures = FINE, precision: str = "fp16") -> set[str]:
    return {bound.figure for bound in judge(precision, {"photograph": (found, own)}) if not bound.holds}


@pytest.mark.parametrize(
    ("change", "figure"),
    [
        ({"non_finite": 1}, "non_finite"),
        ({"token_cosine_min": LIMITS.token_cosine_min - 1e-6}, "token_cosine_min"),
        ({"token_error_p999": LIMITS.token_error_p999 + 1e-6}, "token_error_p999"),
        ({"relative_error": LIMITS.relative_error_over_torch * 2e-3 + 1e-6}, "relative_error_over_torch"),
        ({"token_cosine_min": None}, "token_cosine_min"),
        ({"token_error_p999": None}, "token_error_p999"),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_each_bound_fails_by_itself_at_any_batch(change: dict[str, Any], figure: str, place: int) -> None:
    found = [FINE, FINE, FINE]
    assert missed(found) == set()
    found[place] = replace(FINE, **change)
    assert missed(found) == {figure}


def test_only_relative_error_fails_if_pytorch_is_no_better() -> None:
    own = replace(FINE, relative_error=LIMITS.relative_error)
    assert missed([replace(FINE, relative_error=LIMITS.relative_error)], own) == set()
    assert missed([replace(FINE, relative_error=LIMITS.relative_error + 1e-6)], own) == {"relative_error"}


def test_worst_batch_is_what_is_measured() -> None:
    worse: dict[str, Any] = {
        "token_cosine_min": 0.9995,
        "token_error_p999": 2.5e-2,
        "relative_error": 5e-3,
        "non_finite": 0,
    }
    for found in ([FINE, replace(FINE, **worse)], [replace(FINE, **worse), FINE]):
        measured = {bound.figure: bound.measured for bound in judge("fp16", {"photograph": (found, FINE)})}
        assert measured == worse | {"relative_error_over_torch": 2.5}


@pytest.mark.parametrize("first", [True, False])
def test_batch_that_is_not_finite_is_not_hidden_by_another(first: bool) -> None:
    broken = replace(FINE, token_cosine_min=None, token_error_p999=None, relative_error=None, non_finite=3)
    found = [broken, FINE] if first else [FINE, broken]
    bounds = judge("fp16", {"photograph": (found, FINE)})
    assert not any(bound.holds for bound in bounds)
    assert {bound.measured for bound in bounds} == {None, 3.0}


def test_each_kind_of_image_is_judged_against_pytorch_on_the_same_images() -> None:
    hard = replace(FINE, relative_error=9e-3)
    bounds = judge("fp16", {"photograph": ([FINE], FINE), "drawn": ([hard], replace(FINE, relative_error=4e-3))})
    assert all(bound.holds for bound in bounds)
    assert {bound.images for bound in bounds} == {"photograph", "drawn"}
    bounds = judge("fp16", {"photograph": ([hard], FINE), "drawn": ([FINE], FINE)})
    assert {(bound.images, bound.figure) for bound in bounds if not bound.holds} == {
        ("photograph", "relative_error_over_torch")
    }


def test_fp32_has_no_ratio_to_itself() -> None:
    exact = replace(FINE, relative_error=0.0, token_error_p999=0.0)
    bounds = judge("fp32", {"photograph": ([exact], exact)})
    assert [bound.figure for bound in bounds] == [
        "non_finite",
        "token_cosine_min",
        "token_error_p999",
        "relative_error",
    ]


def test_worse_tower_of_a_pair_counts() -> None:
    generator = torch.Generator().manual_seed(0)
    small, large = torch.randn(1, 9, 4, generator=generator), 100 * torch.randn(1, 9, 6, generator=generator)
    reference, found = torch.cat([small, large], -1), torch.cat([2 * small, large], -1)
    together, apart = MetricSums.of(found, reference), MetricSums.of(found, reference, (4, 6))
    assert together.figures().relative_error < 0.02
    assert apart.figures().relative_error == pytest.approx(1.0)
    assert apart.figures().token_error_p999 == pytest.approx(1.0)
    turned = MetricSums.of(torch.cat([-small, large], -1), reference, (4, 6)).figures()
    assert turned.token_cosine_min == pytest.approx(-1.0)
    assert total([apart, MetricSums.of(reference, reference, (4, 6))]).figures().relative_error == pytest.approx(
        0.5**0.5
    )
