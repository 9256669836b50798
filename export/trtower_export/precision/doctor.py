"""Measure for every operation of a tower how close its values come to FP16's limits, and what its rounding costs.

The cut tower runs in FP32 over images. Then each operation in turn runs in half precision while the rest stays exact,
so that the error at the output is that operation's own. `rounding.py` defines how half precision is simulated.
"""

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trtower.dtypes import DTYPES
from trtower.errors import CheckpointError
from trtower.spec import HALVES, PRECISIONS, BatchProfile, TowerSpec
from trtower_export.checkpoint.checkpoint import Checkpoint
from trtower_export.console import Progress
from trtower_export.graph.operations import Operation, Operations, trace
from trtower_export.graph.reference import UncutTower
from trtower_export.precision.rounding import FP16_RANGE, Simulation, Values


@dataclass(frozen=True, kw_only=True)
class OperationFigures:
    """The doctor's figures for one operation.

    Attributes:
        name: The operation, such as layers.3.mlp.fc1.
        layer: Its layer; None outside the layers.
        part: Its name within the layer, or the whole name outside the layers.
        largest: The largest magnitude that it computes: in its results, in products before a bias is added, and in
            the sums and sums of squares of a LayerNorm.
        overflow: How many of its values and weights exceed FP16's largest number.
        subnormal: The share of its non-zero results below FP16's smallest normal number.
        error: The relative error at the output when only this operation runs in "fp16" or "bf16", by precision; None
            if the output is not finite. Empty if no error was measured.
        headroom: How many times larger its values could be in FP16; None if all of them are 0.
    """

    name: str
    layer: int | None
    part: str
    largest: float
    overflow: int
    subnormal: float
    error: dict[str, float | None]
    headroom: float | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "headroom", FP16_RANGE.max / self.largest if self.largest else None)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The doctor's findings about a checkpoint, as `trtower doctor --json` writes them.

    Attributes:
        checkpoint: The checkpoint, as the user named it.
        image_size: The side of the images, in pixels.
        layers: The hidden states that are read.
        images: The images that the tower ran on.
        error_images: The images on which each operation was rounded by itself, the hardest first.
        skipped: Files that could not be read.
        overflowing: The operations with values that FP16 cannot hold.
        operations: The figures of every operation, in execution order.
    """

    checkpoint: str
    image_size: int
    layers: tuple[int, ...]
    images: tuple[str, ...]
    error_images: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    overflowing: tuple[str, ...]
    operations: tuple[OperationFigures, ...]


@dataclass
class Extremes:
    """Extremes of the values that operations compute, over any number of images."""

    largest: dict[str, float] = field(default_factory=dict)
    overflow: Counter[str] = field(default_factory=Counter)
    small: Counter[str] = field(default_factory=Counter)
    nonzero: Counter[str] = field(default_factory=Counter)

    def observe(self, operation: Operation, numbers: Tensor, *, result: bool) -> None:
        """Record values of an operation; raise CheckpointError if one of them is not finite."""
        name = operation.name
        largest = max(abs(float(extreme)) for extreme in numbers.aminmax())
        if not math.isfinite(largest):  # one NaN makes both extremes NaN
            raise CheckpointError(
                f"this tower is not finite even in FP32: {name} is the first operation to compute NaN or infinity "
                f"({numbers.numel() - int(numbers.isfinite().sum())} values). No precision can fix that: check its "
                "weights."
            )
        self.largest[name] = max(largest, self.largest.get(name, 0.0))
        if largest > FP16_RANGE.max:
            self.overflow[name] += int((numbers.abs() > FP16_RANGE.max).sum())
        if result:
            nonzero = int(numbers.count_nonzero())
            below = int((numbers.abs() < FP16_RANGE.smallest_normal).count_nonzero())
            self.nonzero[name] += nonzero
            self.small[name] += below - (numbers.numel() - nonzero)

    def observe_weights(self, operations: Operations, weights: dict[str, Tensor]) -> None:
        """Count the weights that FP16 cannot hold. Nothing else is recorded of weights."""
        for operation in operations:
            for weight in (weights[name] for name in operation.weights if weights[name].is_floating_point()):
                if beyond := int((weight.abs() > FP16_RANGE.max).sum()):
                    self.overflow[operation.name] += beyond

    def add(self, other: "Extremes") -> None:
        """Merge the extremes of another image."""
        for name, largest in other.largest.items():
            self.largest[name] = max(largest, self.largest.get(name, 0.0))
        self.overflow.update(other.overflow)
        self.small.update(other.small)
        self.nonzero.update(other.nonzero)

    def overflowing(self, operations: Operations) -> list[str]:
        """List the operations that compute values, or read weights, that FP16 cannot hold, in execution order."""
        return [name for name in operations.names if self.overflow[name]]


def simulate(tower: nn.Module, spec: TowerSpec) -> Simulation:
    """Return a simulation of a tower, and leave the tower as it is."""
    program = trace(copy.deepcopy(tower), spec.of_floats.input("fp16"), BatchProfile(min=1, opt=1, max=2))
    return Simulation(Operations(program, spelled_out=True), named_weights(tower))


def named_weights(tower: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers under every name that they have."""
    parameters = dict(tower.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(tower.named_buffers(remove_duplicate=False))}


@torch.no_grad()
def examine(
    checkpoint: Checkpoint, spec: TowerSpec, images: Mapping[str, Tensor], progress: Progress, *, error_images: int = 1
) -> Diagnosis:
    """Measure every operation on ``images``, each (1, 3, S, S), and its rounding error on the hardest ``error_images``.

    The hardest images are those in which most operations overflow, then those with the largest values. Most of the time
    goes into the errors: half a run for every operation, precision and image. 0 skips them.

    Raises CheckpointError if the tower is not finite in FP32.
    """
    with progress.step("Load PyTorch's tower"):
        tower = UncutTower.load(checkpoint, spec).cut()
        simulation = simulate(tower, spec)
    operations, extremes, hardness = simulation.operations, Extremes(), dict[str, tuple[int, float]]()
    extremes.observe_weights(operations, named_weights(tower))
    with progress.step(f"Run in FP32 on {len(images)} images") as step:
        for name, pixel_values in images.items():
            step.update(len(hardness) / len(images), name)
            of_image = Extremes()
            simulation.run(pixel_values, observe=of_image.observe)
            hardness[name] = (len(of_image.overflow), max(of_image.largest.values()))
            extremes.add(of_image)
    hardest = sorted(hardness, key=hardness.__getitem__, reverse=True)[:error_images]
    errors = _round_one_by_one(simulation, [images[name] for name in hardest], progress) if hardest else {}
    examined = tuple(
        OperationFigures(
            name=operation.name,
            layer=operation.layer,
            part=operation.part,
            largest=extremes.largest[operation.name],
            overflow=extremes.overflow[operation.name],
            subnormal=extremes.small[operation.name] / max(extremes.nonzero[operation.name], 1),
            error={p: e if math.isfinite(e) else None for p, e in errors.get(operation.name, {}).items()},
        )
        for operation in operations
    )
    return Diagnosis(
        checkpoint=checkpoint.source,
        image_size=spec.image_size,
        layers=spec.layers,
        images=tuple(images),
        error_images=tuple(hardest),
        overflowing=tuple(extremes.overflowing(operations)),
        operations=examined,
    )


def _round_one_by_one(
    simulation: Simulation, images: Sequence[Tensor], progress: Progress
) -> dict[str, dict[str, float]]:
    """Return the relative error that each operation causes by itself in each precision, on the worst of the images."""
    operations = simulation.operations
    errors: dict[str, dict[str, float]] = {name: dict.fromkeys(HALVES, 0.0) for name in operations.names}
    with progress.step(f"Round {len(operations)} operations one by one") as step:
        for index, pixel_values in enumerate(images):
            kept: Values = {}
            reference = simulation.run(pixel_values, keep=kept)
            for done, operation in enumerate(operations):
                step.update((index + done / len(operations)) / len(images), operation.name)
                for precision in HALVES:
                    output = simulation.rerun(kept, operation, DTYPES[PRECISIONS[precision].dtype])
                    error = float((output - reference).norm() / reference.norm())
                    worst = errors[operation.name][precision]
                    errors[operation.name][precision] = worst if worst >= error or math.isnan(worst) else error
    return errors
