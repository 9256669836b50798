"""Whatever is wrong with a tower, the search keeps what the bounds require and nothing that could be left out."""

import copy
import gc
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from tests.conftest import BATCH, IMAGE_SIZE
from tests.export.small_towers import cut, dinov2
from trtower.parity.bounds import judge
from trtower.parity.metrics import MetricSums
from trtower.spec import TowerSpec
from trtower_export.console import LoggedProgress
from trtower_export.graph.truncate import release
from trtower_export.precision import search as module
from trtower_export.precision.doctor import Extremes, simulate
from trtower_export.precision.program import trace_with_islands
from trtower_export.precision.rounding import Simulation
from trtower_export.precision.search import find_islands

pytestmark = pytest.mark.usefixtures("one_thread")

GENERATOR = torch.Generator().manual_seed(5)
IMAGES = [torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE, generator=GENERATOR) for _ in range(3)]


def overflow_projections(tower: nn.Module) -> None:
    """Multiply two products by 2**17, which the layer scales after them divide out exactly."""
    first, second = tower.layers[1], tower.layers[3]
    projection = tower.get_submodule(dinov2("layers.1.attention.o_proj"))
    for linear, scale in ((projection, first.layer_scale1), (second.mlp.fc2, second.layer_scale2)):
        linear.weight.mul_(2.0**17)
        linear.bias.mul_(2.0**17)
        scale.lambda1.div_(2.0**17)


def overflow_unit(tower: nn.Module) -> None:
    """Set one unit of an MLP to -80000, where its activation is exactly 0."""
    tower.layers[2].mlp.fc1.bias[3] = -8e4


def overflow_squares(tower: nn.Module) -> None:
    """Set one channel of the residual stream to 400 between two layers; the others remain visible beside it."""
    tower.layers[0].mlp.fc2.bias[5] = 400.0
    tower.layers[1].mlp.fc2.bias[5] = -400.0
    for norm in (tower.layers[1].layer_norm1, tower.layers[1].layer_norm2):
        norm.weight.mul_(50)
        norm.weight[5] = 0.0


def lose_digits(tower: nn.Module) -> None:
    """Lift the residual stream by 900 between two layers: nothing overflows, but FP16 has steps of 0.5 there."""
    tower.layers[0].mlp.fc2.bias.add_(900.0)
    tower.layers[1].mlp.fc2.bias.sub_(900.0)


FAULTS: dict[str, tuple[str, Callable[[nn.Module], None], set[str]]] = {
    "projections": ("dinov2", overflow_projections, {dinov2("layers.1.attention.o_proj"), "layers.3.mlp.fc2"}),
    "unit": ("clip", overflow_unit, {"layers.2.mlp.fc1"}),
    "squares": ("clip", overflow_squares, {"layers.1.layer_norm1", "layers.1.layer_norm2"}),
    "digits": ("clip", lose_digits, {"layers.0.residual2", "layers.1.residual1"}),
}
"""Which tower is changed how, and which operations must be kept. For "digits", others are kept as well."""


@cache
@torch.no_grad()
def spoil(fault: str) -> tuple[nn.Module, TowerSpec]:
    name, change, _ = FAULTS[fault]
    tower, spec = cut(name)
    spoilt = copy.deepcopy(tower)
    change(spoilt)
    return spoilt, spec


@cache
def simulated(fault: str) -> Simulation:
    return simulate(*spoil(fault))


def search(tower: nn.Module, spec: TowerSpec, **options: Any) -> tuple[str, ...]:
    return find_islands(tower, spec, {"photograph": IMAGES}, LoggedProgress(), **options)


@torch.no_grad()
def holds(fault: str, kept: Collection[str]) -> bool:
    """Judge a simulation by the bounds of the check."""
    tower, names = spoil(fault)[0], set(simulated(fault).operations.names)
    half, simulation, own = copy.deepcopy(tower).half(), MetricSums(), MetricSums()
    for pixel_values in IMAGES:
        reference = tower(pixel_values)
        output = simulated(fault).run(pixel_values.half().float(), rounded=names - set(kept))
        simulation.add(MetricSums.of(output.half().float(), reference))
        own.add(MetricSums.of(half(pixel_values.half()).float(), reference))
    return all(bound.holds for bound in judge("fp16", {"photograph": ([simulation.figures()], own.figures())}))


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_kept_is_the_fault_and_nothing_of_it_can_be_left_out(fault: str) -> None:
    kept, must = search(*spoil(fault)), FAULTS[fault][2]
    assert must <= set(kept) if fault == "digits" else set(kept) == must
    assert list(kept) == [name for name in simulated(fault).operations.names if name in kept]
    assert holds(fault, kept)
    for name in kept:
        assert not holds(fault, set(kept) - {name}), name


@torch.no_grad()
def test_digits_are_lost_where_nothing_overflows() -> None:
    extremes = Extremes()
    for pixel_values in IMAGES:
        simulated("digits").run(pixel_values, observe=extremes.observe)
    assert extremes.overflowing(simulated("digits").operations) == []
    assert not holds("digits", ())


def test_what_is_kept_by_hand_stays_beside_what_is_found_and_is_not_searched_for() -> None:
    layer = simulated("projections").operations.match(["layers.1"])
    kept = search(*spoil("projections"), always=["layers.1", "stem.add"])
    assert kept == ("stem.add", *layer, "layers.3.mlp.fc2")


@pytest.mark.parametrize("kind", ["photograph", "drawn"])
def test_every_image_of_every_kind_is_searched(kind: str) -> None:
    """The squares in the first norm overflow only on the last image."""
    images = {"photograph": [*IMAGES], "drawn": [*IMAGES]}
    assert find_islands(*cut("clip"), images, LoggedProgress()) == ()
    images[kind].append(IMAGES[0] * 500)
    assert find_islands(*cut("clip"), images, LoggedProgress()) == ("stem.1",)


def test_operation_that_can_go_once_others_are_gone_goes() -> None:
    """Errors cancel: one that is needed beside others may not be needed without them."""
    enough = [set("abc"), set("ac"), set("c")]
    kept = module._least(list("abc"), lambda names: set(names) in enough)
    assert kept == ["c"]


def test_error_says_why_a_tower_misses_the_bounds_in_fp32() -> None:
    def why(size: float) -> str:
        return module._why([module._Case("photograph", torch.zeros(1), torch.tensor([1.0, -size]))])

    assert "too large for FP16" in why(7e4)
    assert "too large for FP16" not in why(6e4)
    assert "--precision fp32" in why(6e4)


@pytest.mark.parametrize(("patterns", "copied"), [((), False), (["stem.1"], False), ((), True)])
def test_release_frees_the_weights_of_the_tower_and_of_its_traced_copy(patterns: list[str], *, copied: bool) -> None:
    tower, spec = copy.deepcopy(cut("clip")[0]), cut("clip")[1]
    program, _ = trace_with_islands(tower, spec, "fp16", BATCH, patterns, copied=copied)
    weights = (*tower.parameters(), *program.state_dict.values())
    held = [StorageWeakRef(weight.untyped_storage()) for weight in weights]
    del weights
    release(tower, program)
    gc.collect()
    assert all(each.expired() for each in held)


def test_tower_is_cast_only_if_nothing_is_kept() -> None:
    tower, spec = copy.deepcopy(cut("clip")[0]), cut("clip")[1]
    trace_with_islands(tower, spec, "fp16", BATCH, ["stem.1"])
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}
    trace_with_islands(tower, spec, "fp16", BATCH, ())
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float16}
