"""Search for the fewest operations of a half-precision tower that must stay in FP32.

The search judges simulations by the very bounds of the check, and ends with a set of which none can be left out.
That is the smallest by inclusion; another set of fewer operations may exist, but nobody would look at all of them.
What does not fit FP16 is kept in FP32 and not in BF16, which rounds eight times coarser than FP16 and which Turing
does not have; an operation or two in FP32 cost little.
"""

import copy
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trtower.bundle.certificate import Bound
from trtower.errors import BuildError
from trtower.spec import TowerSpec
from trtower_export.console import Progress, Step
from trtower_export.precision.bounds import judge
from trtower_export.precision.doctor import Extremes, named_weights, simulate
from trtower_export.precision.metrics import MetricSums
from trtower_export.precision.rounding import FP16_RANGE, Simulation, Values

MONOTONOUS = ("non_finite", "token_cosine_min")
"""Bounds that one image can miss for all."""


@dataclass(frozen=True)
class _Case:
    kind: str
    pixel_values: Tensor
    reference: Tensor


@dataclass(frozen=True, kw_only=True)
class _Trials:
    """A simulation of FP16 that is judged by the bounds of the check, on every image or until one misses them.

    ``own`` is PyTorch's own error, by the kind of the images; ``fixed`` are operations that stay in FP32 in any case.
    """

    simulation: Simulation
    cases: list[_Case]
    own: Mapping[str, MetricSums]
    fixed: Collection[str]

    def hold(self, kept: Collection[str]) -> bool:
        """Whether the bounds hold with these operations in FP32."""
        rounded = set(self.simulation.operations.names).difference(kept, self.fixed)
        sums = {kind: MetricSums() for kind in self.own}
        for index, case in enumerate(self.cases):
            output = self.simulation.run(case.pixel_values.half().float(), rounded=rounded)
            error = MetricSums.of(output.half().float(), case.reference)
            if not all(bound.holds for bound in self._bounds({case.kind: error}) if bound.figure in MONOTONOUS):
                self.cases.insert(0, self.cases.pop(index))  # where it ends the next trial early
                return False
            sums[case.kind].add(error)
        return all(bound.holds for bound in self._bounds(sums))

    def _bounds(self, measured: Mapping[str, MetricSums]) -> tuple[Bound, ...]:
        return judge("fp16", {kind: ([sums.figures()], self.own[kind].figures()) for kind, sums in measured.items()})


@torch.no_grad()
def find_islands(
    tower: nn.Module,
    spec: TowerSpec,
    images: Mapping[str, Sequence[Tensor]],
    progress: Progress,
    *,
    always: Sequence[str] = (),
) -> tuple[str, ...]:
    """Find the fewest operations that must stay in FP32 for the bounds of FP16 to hold on ``images``.

    These are (1, 3, S, S), by what bounds call them: "photograph", "drawn". ``always`` are patterns of operations that
    stay in FP32 whatever is found. Raises BuildError if the bounds are missed with every operation in FP32, as when the
    state that is read is itself too large for FP16.
    """
    trials = _prepare_trials(tower, spec, images, always, progress)
    names = trials.simulation.operations.names
    with progress.step("Search for what must stay in FP32") as step:
        step.update(0.0, "all in FP16")
        kept: list[str] = []
        if not trials.hold(kept):
            kept = _find_enough(trials, tower, step)
            step.update(0.2, f"which of {len(kept)} can go")
            kept = _least(kept, trials.hold)
    return tuple(name for name in names if name in trials.fixed or name in kept)


def _prepare_trials(
    tower: nn.Module,
    spec: TowerSpec,
    images: Mapping[str, Sequence[Tensor]],
    always: Sequence[str],
    progress: Progress,
) -> _Trials:
    """Run PyTorch in FP32, which is the reference, and in FP16, which may be as wrong as the bounds allow."""
    cases: list[_Case] = []
    own = {kind: MetricSums() for kind in images}
    count = sum(map(len, images.values()))
    with progress.step(f"Run PyTorch in FP32 and FP16 on {count} images") as step:
        half = copy.deepcopy(tower).half()
        for kind, pixel_values in ((kind, each) for kind, some in images.items() for each in some):
            step.update(len(cases) / count, kind)
            cases.append(_Case(kind, pixel_values, tower(pixel_values)))
            own[kind].add(MetricSums.of(half(pixel_values.half()).float(), cases[-1].reference))
        del half
        simulation = simulate(tower, spec)
    return _Trials(simulation=simulation, cases=cases, own=own, fixed=set(simulation.operations.match(always)))


def _find_enough(trials: _Trials, tower: nn.Module, step: Step) -> list[str]:
    """Find operations with which the bounds hold: those that overflow, and as many more as it takes."""
    simulation, cases = trials.simulation, trials.cases
    extremes = Extremes()
    extremes.observe_weights(simulation.operations, named_weights(tower))
    for case in cases:
        simulation.run(case.pixel_values, observe=extremes.observe)
    kept = extremes.overflowing(simulation.operations)
    if trials.hold(kept):
        return kept
    step.update(0.1, "what rounds worst")
    names = simulation.operations.names
    if not trials.hold(names):
        raise BuildError(f"the bounds of FP16 are missed with every operation in FP32: {_why(cases)}")
    ranked = _worst_first(simulation, cases[0].pixel_values, set(names) - set(kept))
    return kept + _shortest(ranked, lambda more: trials.hold([*kept, *more]))


def _why(cases: Sequence[_Case]) -> str:
    if any(float(case.reference.abs().max()) > FP16_RANGE.max for case in cases):
        return "the hidden state that is read does not fit. Export with --precision bf16, whose range is FP32's."
    return "rounding pixels and features is too much for this tower already. Export with --precision fp32."


def _worst_first(simulation: Simulation, pixel_values: Tensor, names: Collection[str]) -> list[str]:
    values: Values = {}
    reference = simulation.run(pixel_values, keep=values)
    operations = [operation for operation in simulation.operations if operation.name in names]
    error = {o.name: float((simulation.rerun(values, o, torch.float16) - reference).norm()) for o in operations}
    return sorted(error, key=lambda name: -error[name] if error[name] == error[name] else -float("inf"))


def _shortest(ranked: list[str], holds: Callable[[list[str]], bool]) -> list[str]:
    """Find a beginning of ``ranked`` that holds, of which the whole does: the shortest, as far as more never hurts."""
    enough = bisect_left(range(len(ranked)), True, lo=1, key=lambda count: holds(ranked[:count]))
    return ranked[:enough]


def _least(kept: list[str], holds: Callable[[list[str]], bool]) -> list[str]:
    """Leave out whatever can be, until nothing more can: what must stay beside others need not without them."""
    before: list[str] = []
    while kept != before:
        before = list(kept)
        for name in before:
            rest = [other for other in kept if other != name]
            if holds(rest):
                kept = rest
    return kept
