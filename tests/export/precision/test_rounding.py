"""The simulation of half precision is exact if nothing rounds, and as wrong as PyTorch if everything does."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import MODELS
from tests.export.small_towers import cut, dinov2, exact, operations, pixels, relative_error, simulation
from trtower_export.graph.islands import widened
from trtower_export.graph.operations import Operation
from trtower_export.precision.doctor import simulate
from trtower_export.precision.rounding import Simulation, Values

pytestmark = pytest.mark.usefixtures("one_thread")

HALVES = [torch.float16, torch.bfloat16]

EXACT = 1e-6
"""FP32 rounds in another order: twice the measured 5e-7."""

RATIO = (0.7, 1.5)
"""Its error over PyTorch's own, which rounds at other places. Measured: 0.96 to 1.14."""

ADD_UP = (0.8, 1.2)
"""The root of the sum of the squared single errors, over the error of all together. Measured: 0.88 to 1.05."""

IMAGES = 4


FLIPS = 0.3
"""The difference between two computations that round alike, over the error of rounding. FP32 adds up in another order,
so a number near the middle of two halves sometimes rounds the other way: 0.01 to 0.22 was measured. Leaving out one
rounding makes 0.5."""


def half(numbers: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """Round to ``dtype`` and back to FP32."""
    return numbers.to(dtype).float()


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_with_nothing_rounded_it_is_the_tower_in_fp32(name: str) -> None:
    assert relative_error(simulation(name).run(pixels()), exact(name)) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", MODELS)
def test_with_everything_rounded_it_errs_as_much_as_pytorch(name: str, dtype: torch.dtype) -> None:
    tower, _ = cut(name)
    taken, reference = pixels(IMAGES, dtype), exact(name, IMAGES, dtype)
    own = relative_error(copy.deepcopy(tower).to(dtype)(taken.to(dtype)), reference)
    found = simulation(name).run(taken, rounded=operations(name).names, dtype=dtype)
    assert RATIO[0] < relative_error(found, reference) / own < RATIO[1]


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", MODELS)
def test_errors_of_operations_alone_add_up_in_squares(name: str, dtype: torch.dtype) -> None:
    taken, reference = pixels(IMAGES, dtype), exact(name, IMAGES, dtype)
    kept: Values = {}
    whole = relative_error(simulation(name).run(taken, rounded=operations(name).names, dtype=dtype), reference)
    unrounded = simulation(name).run(taken, keep=kept)
    alone = [relative_error(simulation(name).rerun(kept, each, dtype), unrounded) for each in operations(name)]
    assert all(0 < error < whole for error in alone)
    assert ADD_UP[0] < math.hypot(*alone) / whole < ADD_UP[1]


def alone(name: str, operation: str, dtype: torch.dtype = torch.float16) -> Tensor:
    kept: dict[torch.fx.Node, Tensor] = {}
    simulation(name).run(pixels(), keep=kept)
    (found,) = (each for each in operations(name) if each.name == operation)
    return simulation(name).rerun(kept, found, dtype)


def replacing(name: str, module: str, compute: object) -> Tensor:
    """Run the FP32 tower with ``compute`` in place of one module: its weights and its input in, its result out."""
    tower, _ = cut(name)
    hook = tower.get_submodule(module).register_forward_hook(lambda own, args, _: compute(own, *args))
    try:
        found: Tensor = tower(pixels())
    finally:
        hook.remove()
    return found


def assert_same(name: str, found: Tensor, expected: Tensor) -> None:
    assert (found - expected).norm() < FLIPS * (expected - exact(name)).norm()


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES)
def test_linear_layer_alone_rounds_weights_and_product_and_sum(dtype: torch.dtype) -> None:
    def compute(own: torch.nn.Linear, x: Tensor) -> Tensor:
        product = half(x @ half(own.weight, dtype).T, dtype)
        return half(product + half(own.bias, dtype), dtype)

    module = "layers.1.mlp.fc1"
    found = alone("clip", module, dtype)
    assert_same("clip", found, replacing("clip", module, compute))


@torch.no_grad()
def test_layer_norm_alone_sums_in_half_precision() -> None:
    def compute(own: torch.nn.LayerNorm, x: Tensor) -> Tensor:
        width = x.shape[-1]
        centred = x - half(x.sum(-1, keepdim=True)) / width
        variance = half(centred.square().sum(-1, keepdim=True)) / width
        return half(centred / (variance + own.eps).sqrt() * half(own.weight) + half(own.bias))

    module = "layers.2.layer_norm1"
    found = alone("clip", module)
    assert_same("clip", found, replacing("clip", module, compute))


@torch.no_grad()
def test_rms_norm_alone_has_its_mean_square_in_fp32_as_the_model_says() -> None:
    def compute(own: Any, x: Tensor) -> Tensor:
        normed = x * (x.square().mean(-1, keepdim=True) + own.variance_epsilon).rsqrt()
        return half(half(own.weight) * half(normed))

    module = "layers.2.rms_norm1"
    found = alone("aimv2", module)
    assert_same("aimv2", found, replacing("aimv2", module, compute))


SAME_ALONE = [
    ("dinov2", "stem.patch_embeddings.projection"),  # the pixels are already in half precision
    ("dinov2", "layers.1.layer_scale1"),
    ("dinov2", "layers.1.residual2"),
    ("dinov2", dinov2("layers.1.mlp.activation_fn")),
    ("dinov2", "stem.add"),
    ("internvl_vision", "layers.1.mul1"),
    ("aimv2", "layers.2.ffn.mul"),
    ("clip", "stem.0.position_embedding"),
]


@torch.no_grad()
@pytest.mark.parametrize(("name", "operation"), SAME_ALONE)
def test_rerun_is_a_run_that_rounds_one_operation(name: str, operation: str) -> None:
    assert torch.equal(alone(name, operation), simulation(name).run(pixels(), rounded={operation}))


@torch.no_grad()
@pytest.mark.parametrize(
    ("operation", "factor"),
    [
        ("layers.1.mlp.fc1", "layers.1.norm2"),
        ("layers.1.mlp.fc2", dinov2("layers.1.mlp.activation_fn")),
        (dinov2("layers.1.attention.o_proj"), dinov2("layers.1.attention.context")),
    ],
)
def test_rerun_of_a_product_leaves_its_factors_exact_that_a_run_rounds(operation: str, factor: str) -> None:
    """The rounding of a factor counts as the factor's own error, and must not count twice."""
    simulated = simulation("dinov2")
    run = simulated.run(pixels(), rounded={operation})
    found = alone("dinov2", operation)
    assert not torch.equal(found, run)
    rounding = replacing("dinov2", operation, lambda own, x: linear(own, half(x)))
    assert_same("dinov2", run, rounding)
    assert factor in operations("dinov2").names


def linear(own: torch.nn.Linear, x: Tensor) -> Tensor:
    return half(half(x @ half(own.weight).T) + half(own.bias))


@torch.no_grad()
def test_rerun_does_not_change_the_values_passed_to_it() -> None:
    kept: dict[torch.fx.Node, Tensor] = {}
    simulation("clip").run(pixels(), keep=kept)
    before = dict(kept)
    copies = {node: value.clone() for node, value in kept.items() if isinstance(value, Tensor)}
    for operation in operations("clip")[:20]:
        simulation("clip").rerun(kept, operation, torch.float16)
    assert all(kept[node] is value for node, value in before.items())
    assert kept.keys() == before.keys()
    assert all(torch.equal(kept[node], value) for node, value in copies.items())


@torch.no_grad()
def test_scores_are_computed_again_and_not_kept() -> None:
    """They are the only values whose size grows with the square of the tokens."""
    kept: dict[torch.fx.Node, Tensor] = {}
    simulation("clip").run(pixels(), keep=kept)
    assert not [node for node in kept if node.meta.get("part") == "scores"]
    assert [node for node in operations("clip").nodes if node.meta.get("part") == "scores"]


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "dinov3_vit", "internvl_vision"])
def test_attention_in_one_piece_differs_from_the_spelled_out_by_the_rounding_of_fp32(name: str) -> None:
    simulated, looked = simulation(name), []
    in_one_piece = simulated.run(pixels())
    spelled_out = simulated.run(pixels(), observe=lambda operation, *_, **__: looked.append(operation.part))
    assert any(part.endswith("scores") for part in looked)
    assert not torch.equal(in_one_piece, spelled_out)
    assert torch.allclose(in_one_piece, spelled_out, rtol=1e-4, atol=1e-5)


def heat(module: str, number: float = 1e5) -> Simulation:
    """Simulate a CLIP in which a module makes one number of every token so large; FP32 carries it to the output."""
    tower, spec = cut("clip")
    hot = copy.deepcopy(tower)
    hot.get_submodule(module).bias[3] = number
    return simulate(hot, spec)


@torch.no_grad()
@pytest.mark.parametrize(
    ("module", "operation"),
    [
        ("layers.1.mlp.fc1", "layers.1.mlp.fc1"),
        ("layers.1.mlp.fc1", "layers.1.mlp.activation_fn"),
        ("layers.1.mlp.fc2", "layers.1.residual2"),
        ("layers.1.mlp.fc2", "layers.2.residual1"),
        ("layers.1.mlp.fc2", "layers.2.layer_norm1"),
        ("layers.1.self_attn.v_proj", "layers.1.self_attn.context"),
    ],
)
def test_overflow_in_one_operation_alone_is_seen_at_the_output(module: str, operation: str) -> None:
    simulated = heat(module)
    kept: Values = {}
    exact_output = simulated.run(pixels(), keep=kept)
    (found,) = (each for each in simulated.operations if each.name == operation)
    fp16, bf16 = (simulated.rerun(kept, found, dtype) for dtype in HALVES)
    assert exact_output.isfinite().all()
    assert bf16.isfinite().all()
    assert not fp16.isfinite().all()


def overflows(simulated: Simulation, kept: set[str]) -> bool:
    found = simulated.run(pixels(), rounded=set(simulated.operations.names) - kept)
    return not bool(found.isfinite().all())


@torch.no_grad()
def test_kept_operation_passes_what_fp16_cannot_hold_to_elementwise_operations() -> None:
    """An activation computes in FP32 on an FP32 input and rounds its own result, which must fit."""
    tower, spec = cut("clip")
    cold = copy.deepcopy(tower)
    cold.layers[1].mlp.fc1.bias[3] = -1e5  # where QuickGELU is 0
    simulated = simulate(cold, spec)
    assert overflows(simulated, set())
    assert overflows(simulated, {"layers.1.mlp.activation_fn"})
    assert not overflows(simulated, {"layers.1.mlp.fc1"})


@torch.no_grad()
def test_matrix_product_rounds_a_factor_from_a_kept_operation() -> None:
    simulated = heat("layers.1.mlp.fc1")  # the activation keeps 1e5, and fc2 reads it
    assert overflows(simulated, {"layers.1.mlp.fc1", "layers.1.mlp.activation_fn"})
    rounded = set(simulated.operations.names) - {"layers.1.mlp.fc1", "layers.1.mlp.activation_fn"}
    assert simulated.run(pixels(), rounded=rounded - after("layers.1.mlp.fc2")).isfinite().all()


def after(name: str) -> set[str]:
    names = operations("clip").names
    return set(names[names.index(name) :])


@torch.no_grad()
def test_kept_operation_is_not_rounded_and_its_reader_rounds_once() -> None:
    """If one residual rounds among kept operations, only its own sum is rounded."""
    name = "layers.2.residual1"
    kept: dict[torch.fx.Node, Tensor] = {}
    # With an observer, attention runs spelled out, as below.
    simulation("clip").run(pixels(), observe=lambda *_, **__: None, keep=kept)
    (operation,) = (each for each in operations("clip") if each.name == name)
    (node,) = operation.nodes
    seen: list[Tensor] = []

    def observe(operation: Operation, numbers: Tensor, *, result: bool) -> None:
        if operation.name == name:
            seen.append(numbers)

    values: dict[torch.fx.Node, Tensor] = {}
    simulation("clip").run(pixels(), rounded={name}, observe=observe, keep=values)
    assert torch.equal(values[node], half(kept[node]))
    assert not torch.equal(values[node], kept[node])
    assert torch.equal(seen[-1], kept[node])  # the observer gets the value before rounding
    assert all(torch.equal(values[argument], kept[argument]) for argument in node.all_input_nodes)


@torch.no_grad()
def test_norm_that_reads_fp32_sums_in_fp32() -> None:
    """By itself in half precision its squares overflow; after a kept sum it computes in FP32, as islands do."""
    simulated, norm = heat("layers.1.mlp.fc2", 1e3), "layers.2.layer_norm1"  # 1e6 does not fit FP16
    kept: Values = {}
    reference = simulated.run(pixels(), keep=kept)
    (operation,) = (each for each in simulated.operations if each.name == norm)
    alone = relative_error(simulated.rerun(kept, operation, torch.float16), reference)
    behind = relative_error(simulated.run(pixels(), rounded={norm}), reference)
    assert behind < alone / 100


def test_fp32_reaches_its_readers_and_ends_at_products_and_at_the_results_of_readers() -> None:
    found = operations("clip")
    kept = {"layers.1.residual1"}
    wide = {found.of[node].name for node in widened(found, kept) if node in found.of}
    assert wide == {"layers.1.residual1", "layers.1.layer_norm2", "layers.1.residual2"}
    assert {found.of[node].name for node in widened(found, {"layers.1.mlp.fc1"}) if node in found.of} == {
        "layers.1.mlp.fc1",
        "layers.1.mlp.activation_fn",
    }
    assert {found.of[node].name for node in widened(found, {"layers.1.layer_norm1"}) if node in found.of} == {
        "layers.1.layer_norm1"
    }
    assert widened(found, ()) == frozenset()


def test_weights_are_fp32_if_all_their_readers_are_kept() -> None:
    found = operations("dinov3_vit")
    tables = {node for node in found.nodes if "rotation" in node.name and node.users}
    names = [name for name in found.names if name.endswith("attention.elementwise")]
    assert len(tables) == 2
    assert len(names) == len(found.reading(found.weights[next(iter(tables)).name])) > 1
    assert tables.isdisjoint(widened(found, names[1:]))
    assert tables <= widened(found, names)
