"""A tower of any family splits into named operations that cover every computation and can be matched by patterns."""

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import MODELS, NUM_LAYERS
from tests.export.small_towers import IS_OLD, OLD_DINOV2, cut, operations
from trtower.errors import BuildError, ConfigError
from trtower.spec import BatchProfile, TensorSpec
from trtower_export.graph.operations import FUSED, Operations, decompose_attention, opname, trace
from trtower_export.precision.doctor import named_weights

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = BatchProfile(min=1, opt=1, max=2)

BEFORE_LAST = ("siglip", "dinov", "aimv2", "eva", "idefics3", "smolvlm")
NORMED = {name for name in MODELS if name.startswith(BEFORE_LAST)} | {"internvl_vision-normed"}
"""Towers with a final norm before `last_hidden_state`."""

RMS_NORMED = {"aimv2", "aimv2-native", "internvl_vision-rms"}
"""Towers that compute a mean square in FP32, and return to half precision."""

FC = ["mlp.fc1", "mlp.activation_fn", "mlp.fc2"]
GATED = ["gate_proj", "act_fn", "up_proj", "mul", "down_proj"]
CLIP = [
    "layer_norm1",
    *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "scores", "context", "out_proj")),
    "residual1",
    "layer_norm2",
    *FC,
    "residual2",
]


def dinov2(mlp: list[str], *, old: bool = IS_OLD) -> list[str]:
    attention = [f"attention.{part}" for part in ("q_proj", "k_proj", "v_proj", "scores", "context", "o_proj")]
    if old:
        attention = [OLD_DINOV2[part] for part in (*attention[1:3], attention[0], *attention[3:])]
        mlp = ["mlp.weights_in", "mlp.elementwise", "mlp.weights_out"] if len(mlp) > 3 else [*map(renamed, mlp)]
    return ["norm1", *attention, "layer_scale1", "residual1", "norm2", *mlp, "layer_scale2", "residual2"]


def renamed(part: str) -> str:
    return OLD_DINOV2.get(part, part)


def dinov3(mlp: list[str]) -> list[str]:
    parts = dinov2([f"mlp.{part}" for part in mlp], old=False)
    parts.insert(parts.index("attention.scores"), "attention.elementwise")  # the rotation of queries and keys
    return [f"layer.{part}" for part in parts]


def internvl(normed: list[str]) -> list[str]:
    attention = ["q_proj", "k_proj", "v_proj", *normed, "scores", "context", "projection_layer"]
    return [
        "layernorm_before",
        *(f"attention.{part}" for part in attention),
        "mul1",
        "residual1",
        "layernorm_after",
        *FC,
        "mul2",
        "residual2",
    ]


def aimv2() -> list[str]:
    attention = [f"attention.{part}" for part in ("q_proj", "k_proj", "v_proj", "scores", "context", "out_proj")]
    return ["rms_norm1", *attention, "residual1", "rms_norm2", *(f"ffn.{part}" for part in GATED), "residual2"]


PARTS = {
    **dict.fromkeys(("clip", "clip-gelu", "metaclip_2", "siglip", "siglip2"), CLIP),
    **dict.fromkeys(("idefics3_vision", "smolvlm_vision"), CLIP),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), dinov2(FC)),
    "dinov2-swiglu": dinov2([f"mlp.{part}" for part in GATED]),
    "dinov3_vit": dinov3(["up_proj", "act_fn", "down_proj"]),
    "dinov3_vit-gated": dinov3(GATED),
    **dict.fromkeys(("internvl_vision", "internvl_vision-normed", "internvl_vision-unplaced"), internvl([])),
    "internvl_vision-rms": internvl(["q_norm", "k_norm"]),
    **dict.fromkeys(("aimv2", "aimv2-native"), aimv2()),
    "eva_clip": [
        "layer_norm1",
        *(f"self_attn.{part}" for part in ("qkv", "scores", "context", "projection")),
        "residual1",
        "layer_norm2",
        *FC,
        "residual2",
    ],
}
"""The parts of a layer in execution order: transformers' names, and our own for computations without one."""

POINTWISE = {"add", "div", "embedding", "gelu", "mean", "mul", "neg", "pow", "rsqrt", "sigmoid", "silu", "sub"}
ROUNDING = {"conv2d", "layer_norm", "linear", "matmul", "softmax"} | POINTWISE
"""Functions that change numbers in these towers, listed by hand; all others in a graph move them."""


def by_layer(name: str) -> dict[int | None, list[str]]:
    found: dict[int | None, list[str]] = {}
    for operation in operations(name):
        found.setdefault(operation.layer, []).append(operation.part)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_has_the_same_parts_by_name_in_the_order_in_which_they_run(name: str) -> None:
    parts = by_layer(name)
    outside = parts.pop(None)
    assert list(parts) == list(range(NUM_LAYERS))
    for layer in parts.values():
        assert layer == PARTS[name]
    assert any("patch_embed" in part for part in outside)
    assert ("final_norm" in outside) == (name in NORMED)


@pytest.mark.parametrize("name", MODELS)
def test_a_name_is_unique_and_made_of_its_layer_and_its_part(name: str) -> None:
    found = operations(name)
    assert len(set(found.names)) == len(found) == len(found.names)
    for operation in found:
        assert operation.name == (
            operation.part if operation.layer is None else f"layers.{operation.layer}.{operation.part}"
        )


@pytest.mark.parametrize("name", MODELS)
def test_names_of_modules_are_those_of_the_model(name: str) -> None:
    tower, _ = cut(name)
    modules = {path for path, _ in tower.named_modules()}
    own = {"scores", "context", "residual1", "residual2", "elementwise", "mul", "mul1", "mul2", "add"}
    for operation in operations(name):
        last = operation.name.rpartition(".")[2]
        assert (operation.name in modules) != (last in own)
        assert last not in own or operation.name.rpartition(".")[0] in modules


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_of_the_tower_is_listed_by_an_operation(name: str) -> None:
    tower, _ = cut(name)
    found = operations(name)
    for module, operation in ((dict(tower.named_modules()).get(o.name), o) for o in found):
        if module is not None:  # it reads every weight that it owns
            own = {f"{operation.name}.{weight}" for weight, _ in module.named_parameters()}
            assert own <= set(operation.weights)
    weights = named_weights(tower)
    read = {id(weights[weight]) for operation in found for weight in operation.weights}
    floats = {weight: tensor for weight, tensor in weights.items() if tensor.is_floating_point()}
    assert [weight for weight, tensor in floats.items() if id(tensor) not in read] == []
    for operation in found:
        assert all(operation in found.reading(weight) for weight in operation.weights)


@pytest.mark.parametrize("name", MODELS)
def test_every_computing_node_belongs_to_exactly_one_operation(name: str) -> None:
    found = operations(name)
    owned = [node for operation in found for node in operation.nodes]
    assert len(owned) == len(set(owned)) == len(found.of)
    computing = {node for node in found.nodes if node.op == "call_function" and opname(node) in ROUNDING}
    back = {  # casts back from FP32 in model code, as in an RMSNorm
        node
        for node in found.nodes
        if opname(node) == "to"
        and node.meta["val"].dtype == torch.float16
        and node.all_input_nodes[0].meta["val"].dtype == torch.float32
    }
    assert set(owned) == computing | back
    assert bool(back) == (name in RMS_NORMED)
    assert all(found.of[node] is operation for operation in found for node in operation.nodes)


@pytest.mark.parametrize("name", MODELS)
def test_an_operation_knows_whether_it_multiplies_matrices(name: str) -> None:
    for operation in operations(name):
        last = operation.name.rpartition(".")[2]
        product = last.endswith(("_proj", "scores", "context", "qkv", "fc1", "fc2", "projection", "projection_layer"))
        product |= last in ("query", "key", "value", "dense", "weights_in", "weights_out")  # of transformers 4.57
        assert operation.multiplies == (product or "patch_embed" in last)


def test_attention_is_one_operation_until_it_is_spelled_out() -> None:
    tower, spec = cut("clip")
    program = trace(copy.deepcopy(tower), spec.input("fp16"), BATCH)
    fused = Operations(program)
    assert [name for name in fused.names if name.endswith(".attention")] == [
        f"layers.{layer}.self_attn.attention" for layer in range(NUM_LAYERS)
    ]
    assert not [name for name in fused.names if name.endswith(("scores", "context"))]
    Operations(program, spelled_out=True)  # looks at a copy
    assert sum(opname(node) == FUSED for node in program.graph_module.graph.nodes) == NUM_LAYERS


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "dinov3_vit", "eva_clip"])
def test_attention_that_is_spelled_out_computes_the_same(name: str) -> None:
    tower, spec = cut(name)
    program = trace(copy.deepcopy(tower), spec.input("fp32"), BATCH)
    pixel_values = torch.randn(2, 3, spec.image_size, spec.image_size, generator=torch.Generator().manual_seed(0))
    graph = program.graph_module.graph
    (first, *_) = [node.name for node in graph.nodes if opname(node) == FUSED]
    decompose_attention(graph, {first})
    assert sum(opname(node) == FUSED for node in graph.nodes) == NUM_LAYERS - 1
    decompose_attention(graph)
    assert not any(opname(node) == FUSED for node in graph.nodes)
    program.graph_module.recompile()
    found: Tensor = program.module()(pixel_values)
    torch.testing.assert_close(found, tower(pixel_values), rtol=1e-5, atol=1e-5)  # FP32's own roundings


class Attending(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, pixel_values: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            pixel_values, pixel_values, pixel_values, **self.options
        )


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}])
def test_attention_is_scaled_by_its_scale_or_by_the_root_of_its_width(options: dict[str, float]) -> None:
    tensor = TensorSpec(name="pixel_values", dtype="float32", shape=("batch", 3, 14, 14))
    program = trace(Attending(**options), tensor, BATCH)
    decompose_attention(program.graph_module.graph)
    program.graph_module.recompile()
    pixel_values = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(program.module()(pixel_values), Attending(**options)(pixel_values))


def test_attention_with_a_mask_is_refused() -> None:
    class Masked(torch.nn.Module):
        def forward(self, pixel_values: Tensor) -> Tensor:
            mask = pixel_values.new_zeros(14, 14)
            return torch.nn.functional.scaled_dot_product_attention(pixel_values, pixel_values, pixel_values, mask)

    tensor = TensorSpec(name="pixel_values", dtype="float16", shape=("batch", 3, 14, 14))
    with pytest.raises(BuildError, match="has a mask or a dropout"):
        Operations(trace(Masked(), tensor, BATCH), spelled_out=True)


@pytest.mark.parametrize("name", ["clip", "dinov2", "dinov3_vit"])
def test_reading_several_layers_neither_adds_nor_renames_operations(name: str) -> None:
    """Concatenating states only moves them, so no operation is added or renamed."""
    tower, spec = cut(name)
    several = type(spec)(**{**vars(spec), "layers": (2, 0, *spec.layers)})
    tower = copy.copy(tower)
    tower._read = several.layers
    found = Operations(trace(copy.deepcopy(tower), several.input("fp16"), BATCH), spelled_out=True)
    assert found.names == operations(name).names


def test_pattern_may_be_a_name() -> None:
    assert operations("clip").match(["layers.2.mlp.fc1"]) == ("layers.2.mlp.fc1",)


def test_pattern_of_a_module_matches_everything_inside_it() -> None:
    found = operations("clip")
    assert found.match(["layers.3.mlp"]) == tuple(f"layers.3.{part}" for part in FC)
    assert found.match(["layers.3"]) == tuple(f"layers.3.{part}" for part in CLIP)
    assert found.match(["stem"]) == tuple(name for name in found.names if name.startswith("stem."))
    assert found.match(["layers", "stem"]) == tuple(found.names)


def test_star_matches_anything_within_one_part_of_a_name() -> None:
    found = operations("clip")
    assert found.match(["layers.*.layer_norm1"]) == tuple(f"layers.{n}.layer_norm1" for n in range(NUM_LAYERS))
    assert found.match(["layers.1.self_attn.?_proj"]) == tuple(f"layers.1.self_attn.{p}_proj" for p in "qkv")
    assert found.match(["layers.1.layer_norm*"]) == ("layers.1.layer_norm1", "layers.1.layer_norm2")
    assert found.match(["*"]) == tuple(found.names)
    with pytest.raises(ConfigError):  # a star does not match a dot
        found.match(["layers.*fc1"])


def test_matches_of_several_patterns_are_in_execution_order() -> None:
    found = operations("clip").match(["layers.3.residual2", "layers.*.mlp.fc2", " layers.0 ", "layers.0.mlp.fc2"])
    assert found == (
        *(f"layers.0.{part}" for part in CLIP),
        "layers.1.mlp.fc2",
        "layers.2.mlp.fc2",
        "layers.3.mlp.fc2",
        "layers.3.residual2",
    )
    assert operations("clip").match([]) == ()


def test_layer_1_does_not_match_layer_11() -> None:
    tower, _ = cut("clip")
    deep = copy.copy(tower)
    deep._modules = dict(tower._modules)
    deep.layers = torch.nn.ModuleList(tower.layers[index % NUM_LAYERS] for index in range(12))
    program = trace(copy.deepcopy(deep), cut("clip")[1].input("fp16"), BATCH)
    found = Operations(program, spelled_out=True)
    assert "layers.11.mlp.fc1" in found.names
    assert found.match(["layers.1.mlp.fc1"]) == ("layers.1.mlp.fc1",)
    assert found.match(["layers.1"]) == tuple(f"layers.1.{part}" for part in CLIP)


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("layers.0.mlp.fc9", ("layers.0.mlp.fc1", "layers.0.mlp.fc2")),
        ("layers.*.mlp.fc9", ("layers.*.mlp.fc1", "layers.*.mlp.fc2")),
        ("layers.9.nothing", ("layers.",)),
        ("layers.4", ("layers.",)),
        ("fc1", ("fc1",)),
        ("", ("nearest",)),
    ],
)
def test_error_on_a_pattern_that_matches_nothing_lists_the_nearest_names(
    pattern: str, nearest: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(pattern))) as caught:
        operations("clip").match(["layers.0.mlp.fc1", pattern])
    for name in nearest:
        assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_each_nearest_name_is_listed_once() -> None:
    """Outside the layers, a name and its general form are the same."""
    with pytest.raises(ConfigError) as caught:
        operations("dinov3_vit").match(["final"])
    assert str(caught.value).count("final_norm") == 1
