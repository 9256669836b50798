"""Search for a minimal set of operations that a half-precision tower must keep in FP32.

The search judges simulations by the bounds of the check. None of the operations in its result can be removed. Another
set with fewer operations may exist, but there are too many sets to try them all.
Operations that do not fit FP16 are kept in FP32 and not in BF16, because BF16 rounds eight times coarser than FP16 and
Turing does not have it. An operation or two in FP32 cost little.
"""

import copy
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trtower.bundle.certificate import Bound
from trtower.errors import BuildError
from trtower.parity.bounds import judge
from trtower.parity.metrics import MetricSums
from trtower.spec import TowerSpec
from trtower_export.console import Progress, Step
from trtower_export.precision.doctor import Extremes, named_weights, simulate
from trtower_export.precision.rounding import FP16_RANGE, Simulation, Values

MONOTONOUS = ("non_finite", "token_cosine_min")
"""Bounds that are missed as soon as one image misses them."""


@dataclass(frozen=True)
class _Case:
    kind: str
    pixel_values: Tensor
    reference: Tensor


@dataclass(frozen=True, kw_only=True)
class _Trials:
    """A simulation of FP16, judged by the bounds of the check on every image, or until one image misses them.

    ``own`` is PyTorch's own error for each kind of images. ``fixed`` are operations that stay in FP32 in any case.
    """

    simulation: Simulation
    cases: list[_Case]
    own: Mapping[str, MetricSums]
    fixed: Collection[str]
    parts: Sequence[int]

    def hold(self, kept: Collection[str]) -> bool:
        """Return whether the bounds hold with the operations in ``kept`` in FP32."""
        rounded = set(self.simulation.operations.names).difference(kept, self.fixed)
        sums = {kind: MetricSums() for kind in self.own}
        for index, case in enumerate(self.cases):
            output = self.simulation.run(case.pixel_values.half().float(), rounded=rounded)
            error = MetricSums.of(output.half().float(), case.reference, self.parts)
            if not all(bound.holds for bound in self._bounds({case.kind: error}) if bound.figure in MONOTONOUS):
                self.cases.insert(0, self.cases.pop(index))  # tried first next time, to end a bad trial early
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
    """Return a minimal set of operations that must stay in FP32 for FP16 to meet its bounds on ``images``.

    Images are (1, 3, S, S), by kind: "photograph", "drawn". ``always`` are patterns of operations that stay in FP32 in
    any case; the result includes them. Raises BuildError if the bounds are missed even with every operation in FP32,
    for example because the hidden state itself is too large for FP16, ConfigError if a pattern matches nothing, and
    CheckpointError if the tower is not finite in FP32.
    """
    trials = _prepare_trials(tower, spec, images, always, progress)
    names = trials.simulation.operations.names
    with progress.step("Search for operations that must stay in FP32") as step:
        step.update(0.0, "all in FP16")
        kept: list[str] = []
        if not trials.hold(kept):
            kept = _find_enough(trials, tower, step)
            step.update(0.2, f"{len(kept)} are enough; trying fewer")
            kept = _least(kept, trials.hold)
    return tuple(name for name in names if name in trials.fixed or name in kept)


def _prepare_trials(
    tower: nn.Module,
    spec: TowerSpec,
    images: Mapping[str, Sequence[Tensor]],
    always: Sequence[str],
    progress: Progress,
) -> _Trials:
    """Run PyTorch in FP32 for the reference, and in FP16 for its own error, which one bound is relative to."""
    cases: list[_Case] = []
    own = {kind: MetricSums() for kind in images}
    count = sum(map(len, images.values()))
    with progress.step(f"Run PyTorch in FP32 and FP16 on {count} images") as step:
        half = copy.deepcopy(tower).half()
        for kind, pixel_values in ((kind, each) for kind, some in images.items() for each in some):
            step.update(len(cases) / count, kind)
            cases.append(_Case(kind, pixel_values, tower(pixel_values)))
            own[kind].add(MetricSums.of(half(pixel_values.half()).float(), cases[-1].reference, spec.parts))
        del half
        simulation = simulate(tower, spec)
    fixed = set(simulation.operations.match(always))
    return _Trials(simulation=simulation, cases=cases, own=own, fixed=fixed, parts=spec.parts)


def _find_enough(trials: _Trials, tower: nn.Module, step: Step) -> list[str]:
    """Return enough operations for the bounds to hold: those that overflow, and as many more as needed."""
    simulation, cases = trials.simulation, trials.cases
    extremes = Extremes()
    extremes.observe_weights(simulation.operations, named_weights(tower))
    for case in cases:
        simulation.run(case.pixel_values, observe=extremes.observe)
    kept = extremes.overflowing(simulation.operations)
    if trials.hold(kept):
        return kept
    step.update(0.1, "operations with the largest error")
    names = simulation.operations.names
    if not trials.hold(names):
        raise BuildError(f"FP16 misses its bounds even with every operation in FP32: {_why(cases)}")
    ranked = _worst_first(simulation, cases[0].pixel_values, set(names) - set(kept))
    return kept + _shortest(ranked, lambda more: trials.hold([*kept, *more]))


def _why(cases: Sequence[_Case]) -> str:
    if any(float(case.reference.abs().max()) > FP16_RANGE.max for case in cases):
        return "the hidden state is too large for FP16. Export with --precision bf16, which has the range of FP32."
    return "rounding the pixels and features is already too much. Export with --precision fp32."


def _worst_first(simulation: Simulation, pixel_values: Tensor, names: Collection[str]) -> list[str]:
    values: Values = {}
    reference = simulation.run(pixel_values, keep=values)
    operations = [operation for operation in simulation.operations if operation.name in names]
    error = {o.name: float((simulation.rerun(values, o, torch.float16) - reference).norm()) for o in operations}
    return sorted(error, key=lambda name: -error[name] if error[name] == error[name] else -float("inf"))


def _shortest(ranked: list[str], holds: Callable[[list[str]], bool]) -> list[str]:
    """Return a prefix of ``ranked`` that holds, if all of it does. It is the shortest one if more never hurts."""
    enough = bisect_left(range(len(ranked)), True, lo=1, key=lambda count: holds(ranked[:count]))
    return ranked[:enough]


def _least(kept: list[str], holds: Callable[[list[str]], bool]) -> list[str]:
    """Remove operations until none can go. Errors may cancel, so one that was needed beside others can go later."""
    before: list[str] = []
    while kept != before:
        before = list(kept)
        for name in before:
            rest = [other for other in kept if other != name]
            if holds(rest):
                kept = rest
    return kept
