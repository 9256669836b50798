"""Every family as a graph: its content, that ONNX Runtime computes transformers' states with it, and that it builds."""

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
import transformers
from onnx import TensorProto, numpy_helper
from PIL import Image
from torch import fx

from tests.conftest import BATCH, DISTINCT, IMAGE_SIZE, make_model
from tests.export.counting import count, flop_of
from tests.export.small_towers import IS_OLD
from trtower.bundle.manifest import FUSED_GRAPH, GRAPH, GRAPH_DATA, TowerCost
from trtower.dtypes import DTYPES
from trtower.errors import BuildError, ConfigError
from trtower.graph.module import ONNX_NAME, TYPES, read_module
from trtower.spec import TensorSpec, TowerSpec
from trtower.tower.image_processor import ImageProcessor
from trtower_export.console import Step
from trtower_export.families import FAMILIES, family_of, idefics3_vision, siglip2
from trtower_export.graph.cost import measure_graph
from trtower_export.graph.onnx_graph import write_onnx
from trtower_export.graph.operations import trace
from trtower_export.graph.truncate import truncate
from trtower_export.plan.choice import PlanChoice
from trtower_export.plan.polygraphy import PLAN, build_plan

pytestmark = pytest.mark.usefixtures("one_thread")

LAYER = 2
"""Of four layers, so that two layers and everything after them are dead."""

RESIZED = 56
"""For families that support it: at a model's own size, a forgotten interpolation would leave no trace in the graph."""

DEAD = 77.0
"""Fills every dead weight. No living weight comes near it: they are drawn with a deviation of at most 1."""

SCALARS = 8
"""Elements of constants in a graph that are not weights: the scale of attention, epsilons, the 1.702 of QuickGELU."""

TOLERANCE = {"fp16": 2e-3, "fp32": 2e-6}
"""RMS deviation from FP32 relative to the RMS of FP32: a few roundings of 2**-11 in FP16 and of 2**-24 in FP32."""

FLOATS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "fp32": TensorProto.FLOAT}

GRAPHS = [
    *((name, "fp16") for name in DISTINCT),
    ("internvl_vision-rms", "bf16"),
    ("aimv2-native", "fp32"),
]
FP32_NORMS = {"internvl_vision-rms", "aimv2", "aimv2-native"}
"""Models whose norms compute the mean of squares in FP32."""

SPLIT_HEADS = {"dinov3_vit", "dinov3_vit-gated", "eva_clip"}
"""Models that compute with queries and keys after the heads were split, such as rotating them."""

PLANS = [*((family.name, "fp16") for family in FAMILIES if family.name in DISTINCT), *GRAPHS[-2:]]

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Written:
    folder: Path
    spec: TowerSpec
    pixels: torch.Tensor
    states: tuple[torch.Tensor, ...]
    weights: Array
    """Every element of the cut tower's weights and constants, in the graph's precision, sorted."""
    cost: TowerCost
    """As counted in PyTorch."""


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Written]:
    @cache
    def get(name: str, precision: str) -> Written:
        model = make_model(name)
        fresh = deepcopy(model)  # an export traces a model that has not run: in transformers 4.57 that costs names
        family = family_of(model.config.model_type)
        spec = family.spec(model.config, LAYER, "patch", IMAGE_SIZE if name == "aimv2" else RESIZED)
        pixels = torch.randn(3, 3, spec.image_size, spec.image_size)
        parameters = list(model.parameters())
        states = family.read_states(model, pixels)
        gradients = torch.autograd.grad(states[LAYER].sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(fresh.parameters(), gradients, strict=True):
            if gradient is None:
                parameter.data.fill_(DEAD)
        tower = truncate(fresh, family, spec)
        cost = count(tower, spec)
        folder = tmp_path_factory.mktemp(f"{name}-{precision}")
        program = trace(tower, spec.input(precision), BATCH)
        write_onnx(program, spec.input(precision), spec.output(precision), folder)
        floats = [tensor for tensor in (*tower.parameters(), *tower.buffers()) if tensor.is_floating_point()]
        weights = np.sort(torch.cat([tensor.detach().float().flatten() for tensor in floats]).numpy())
        return Written(folder, spec, pixels, tuple(state.detach() for state in states), weights, cost)

    return get


@pytest.mark.parametrize(("name", "precision"), GRAPHS)
def test_graph_holds_the_cut_tower_and_no_dead_weight(
    write: Callable[[str, str], Written], name: str, precision: str
) -> None:
    written = write(name, precision)
    graph = onnx.load(written.folder / GRAPH).graph
    floats = [tensor for tensor in graph.initializer if tensor.data_type != TensorProto.INT64]
    weights = [tensor for tensor in floats if prod(tensor.dims) > 1]
    assert {tensor.data_type for tensor in weights} == {FLOATS[precision]}
    elements = np.concatenate([numpy_helper.to_array(tensor).astype(np.float32).ravel() for tensor in weights])
    assert DEAD not in elements
    assert np.array_equal(np.sort(elements), written.weights)
    assert len(floats) - len(weights) <= SCALARS


@pytest.mark.parametrize(("name", "precision"), GRAPHS)
def test_graph_costs_exactly_what_the_modules_do(
    write: Callable[[str, str], Written], name: str, precision: str
) -> None:
    written = write(name, precision)
    assert measure_graph(written.folder / GRAPH, written.cost.flop) == written.cost
    files = [GRAPH] if precision == "fp32" else [GRAPH, FUSED_GRAPH]
    assert {flop_of(written.folder / file) for file in files} == {written.cost.flop}


@pytest.mark.parametrize(("name", "precision"), GRAPHS)
def test_graph_computes_in_its_precision_and_interpolates_nothing(
    write: Callable[[str, str], Written], name: str, precision: str
) -> None:
    graph = onnx.load(write(name, precision).folder / GRAPH, load_external_data=False).graph
    casts = [node for node in graph.node if node.op_type == "Cast"]
    made = {output for node in casts for output in node.output}
    wide = [value.name for value in graph.value_info if value.type.tensor_type.elem_type == TensorProto.FLOAT]
    kinds = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    if name in FP32_NORMS and precision != "fp32":  # the model's own code has them so
        assert made & set(wide)
        kinds -= {TensorProto.FLOAT}
    else:
        assert not casts
    assert kinds <= {FLOATS[precision], TensorProto.INT64}
    operators = [node.op_type for node in graph.node]
    assert not {"Attention", "RMSNormalization", "Resize", "Upsample", "Sin", "Cos"} & set(operators)
    assert operators.count("Softmax") == LAYER


@pytest.mark.parametrize(("name", "precision"), [graph for graph in GRAPHS if graph[1] != "fp32"])
def test_attention_graph_has_one_node_per_layer_over_the_same_weights(
    write: Callable[[str, str], Written], name: str, precision: str
) -> None:
    folder = write(name, precision).folder
    onnx.checker.check_model(folder / FUSED_GRAPH, full_check=True)
    spelled_out, fused = (onnx.load(folder / file, load_external_data=False) for file in (GRAPH, FUSED_GRAPH))
    assert [each.version for each in fused.opset_import] == [23]
    assert [each.version for each in spelled_out.opset_import] == [20]
    nodes = [node for node in fused.graph.node if node.op_type == "Attention"]
    assert [re.match(r"layers\.(\d+)\..+/Attention$", node.name)[1] for node in nodes] == [str(k) for k in range(LAYER)]
    assert not any(node.op_type == "Softmax" for node in fused.graph.node)
    weights = {tensor.name: tensor for tensor in spelled_out.graph.initializer}
    large = [
        tensor for tensor in fused.graph.initializer if prod(tensor.dims) > 1 and tensor.data_type != TensorProto.INT64
    ]
    assert all(tensor == weights[tensor.name] for tensor in large)
    assert {entry.value for tensor in large for entry in tensor.external_data if entry.key == "location"} == {
        GRAPH_DATA
    }
    assert (fused.graph.input, fused.graph.output) == (spelled_out.graph.input, spelled_out.graph.output)
    is_flat = all(any(each.name == "q_num_heads" for each in node.attribute) for node in nodes)
    assert is_flat == (name not in SPLIT_HEADS)
    layers = [node.op_type for node in fused.graph.node if node.name.startswith("layers.")]
    assert not is_flat or not {"Reshape", "Transpose"} & set(layers)


@pytest.mark.parametrize("file", [GRAPH, FUSED_GRAPH])
@pytest.mark.parametrize(("name", "precision"), [graph for graph in GRAPHS if graph[1] != "bf16"])
def test_onnx_runtime_computes_transformers_states_in_any_batch(
    write: Callable[[str, str], Written], name: str, precision: str, file: str
) -> None:
    """ONNX Runtime has no CPU kernels for BF16."""
    written = write(name, precision)
    if (precision, file) == ("fp32", FUSED_GRAPH):
        assert not (written.folder / file).exists()
        return
    session = onnxruntime.InferenceSession(written.folder / file, providers=["CPUExecutionProvider"])
    tensor = written.spec.input(precision)
    for batch in (1, 2, 3):
        pixels = written.pixels[:batch].numpy().astype(tensor.dtype)
        (features,) = session.run(None, {tensor.name: pixels})
        errors = [
            ((torch.from_numpy(features).float() - state[:batch]).norm() / state[:batch].norm()).item()
            for state in written.states
        ]
        assert errors[LAYER] < TOLERANCE[precision]
        assert min(errors[:LAYER] + errors[LAYER + 1 :]) > 100 * TOLERANCE[precision]


@pytest.mark.parametrize("file", [GRAPH, FUSED_GRAPH])
@pytest.mark.parametrize(("name", "precision"), [graph for graph in GRAPHS if graph[1] != "fp32"])
def test_pytorch_computes_every_value_in_the_type_that_the_graph_says(
    write: Callable[[str, str], Written], name: str, precision: str, file: str
) -> None:
    """For FP32, tests/export/graph/test_second_reading.py compares the features."""
    written = write(name, precision)
    model = onnx.load(written.folder / file, load_external_data=False)
    weights = (written.folder / GRAPH_DATA).read_bytes()
    module = read_module(model, weights, fused=False)
    found: dict[str, torch.dtype] = {}

    class Typing(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if ONNX_NAME in n.meta:
                found[n.meta[ONNX_NAME]] = result.dtype
            return result

    with torch.no_grad():
        features = Typing(module).run(written.pixels.to(DTYPES[written.spec.output(precision).dtype]))
    values = (*model.graph.value_info, *model.graph.output)
    expected = {value.name: TYPES[value.type.tensor_type.elem_type] for value in values}
    computed = [node for node in model.graph.node if node.op_type not in ("Shape", "Concat")]  # Concat of sizes, too
    assert len(found) >= len(computed)
    assert found == {name: expected[name] for name in found}
    fused = read_module(model, weights)(written.pixels.to(features.dtype))
    for each in (features, fused):
        error = (each.float() - written.states[LAYER]).norm() / written.states[LAYER].norm()
        assert error < TOLERANCE["fp16"] * (1 if precision == "fp16" else 8)  # BF16 has three bits fewer


@pytest.mark.parametrize(("name", "precision"), PLANS)
def test_graph_builds_a_portable_plan(
    write: Callable[[str, str], Written], tmp_path: Path, name: str, precision: str
) -> None:
    written = write(name, precision)
    tensor = written.spec.input(precision)
    build_plan(written.folder / GRAPH, PlanChoice(flavour="tensorrt-rtx"), tensor, [BATCH], tmp_path, Step())
    assert (tmp_path / PLAN).stat().st_size > written.weights.size * torch.finfo(getattr(torch, tensor.dtype)).bits // 8


class Uncast(torch.nn.Module):
    """Its constant is neither a parameter nor a buffer, so it stays in float32 when the tower is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.rand(4)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return (pixel_values.float() * self.scale).to(pixel_values.dtype)


def test_tower_that_is_not_cast_as_a_whole_is_refused(tmp_path: Path) -> None:
    shape = ("batch", 3, 4, 4)
    input_, output = (TensorSpec(name=name, dtype="float16", shape=shape) for name in ("pixel_values", "hidden_states"))
    program = trace(Uncast(), input_, BATCH)
    with pytest.raises(BuildError, match="not float16: the tower was not cast as a whole"):
        write_onnx(program, input_, output, tmp_path)


@pytest.mark.parametrize(
    ("name", "image_size", "message"),
    [
        (
            "aimv2",
            56,
            r"image_size=56: transformers cannot interpolate .* accepts only 42 pixels; a tower with is_native accepts",
        ),
        ("siglip2", 50, r"image_size=50 is not a multiple of the patch size 14; 42 is"),
        ("siglip2", 10, r"image_size=10 is smaller than one patch of 14 pixels"),
    ],
)
def test_size_that_a_tower_cannot_accept_is_refused(name: str, image_size: int, message: str) -> None:
    config = make_model(name).config
    with pytest.raises(ConfigError, match=message):
        family_of(config.model_type).spec(config, -2, "patch", image_size)


def test_tower_without_a_square_size_asks_for_one() -> None:
    config = transformers.InternVLVisionConfig(image_size=[28, 42], patch_size=[14, 14])
    family = family_of(config.model_type)
    with pytest.raises(ConfigError, match=r"image_size=.*28, 42.* is not a square; choose one with --image-size"):
        family.spec(config, -2, "patch")
    assert family.spec(config, -2, "patch", image_size=28).num_patches == 4
    config = transformers.InternVLVisionConfig(image_size=[28, 28], patch_size=[14, 7])
    with pytest.raises(ConfigError, match=r"patch_size=.*14, 7.* is not a square"):
        family.spec(config, -2, "patch")


def test_naflex_tower_has_the_size_of_its_grid_and_needs_a_square_one() -> None:
    config = transformers.Siglip2VisionConfig()
    assert siglip2.FAMILY.spec(config, -2, "patch").image_size == 256
    assert siglip2.FAMILY.obstacle(config) is None
    config.num_patches = 250
    assert siglip2.FAMILY.obstacle(config) == (
        "num_patches=250 is not a square grid, which resizing the positions needs; 225 is."
    )


@pytest.mark.skipif(IS_OLD, reason="transformers 4.57 rounds most of them to the position before (its issue 41190)")
@pytest.mark.parametrize(("image_size", "patch_size"), [(364, 14), (384, 14), (512, 16)])
def test_patches_of_published_idefics3_and_smolvlm_have_each_its_own_position(image_size: int, patch_size: int) -> None:
    shape: dict[str, Any] = {"hidden_size": 1, "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": 1}
    config = transformers.Idefics3VisionConfig(**shape, image_size=image_size, patch_size=patch_size)
    embeddings = transformers.Idefics3VisionTransformer(config).embeddings
    ids = idefics3_vision.assigned_positions(embeddings, image_size)
    assert torch.equal(ids, torch.arange((image_size // patch_size) ** 2))


def photograph(side: int) -> Image.Image:
    noise = np.random.default_rng(side).integers(0, 256, (side // 10, side // 10, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


def theirs(name: str) -> type:
    """Find the processor that works in Pillow, which is a separate class in transformers 5."""
    processor: type = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    return processor


@pytest.mark.parametrize(
    ("name", "processor", "options"),
    [
        ("clip", "CLIPImageProcessor", {}),
        ("metaclip_2", "CLIPImageProcessor", {}),
        ("aimv2", "CLIPImageProcessor", {}),
        ("siglip", "SiglipImageProcessor", {}),
        ("eva_clip", "BlipImageProcessor", {"size": {"height": 224, "width": 224}}),
    ],
)
def test_images_are_prepared_as_by_transformers_processor(
    name: str, processor: str, options: dict[str, object]
) -> None:
    (family,) = (family for family in FAMILIES if family.name == name)
    image = photograph(300)
    expected = theirs(processor)(**options)(image, return_tensors="np")["pixel_values"]
    pixels = ImageProcessor(family.preprocessor)(image, return_tensors="np")["pixel_values"]
    assert np.array_equal(pixels, expected)


def test_naflex_patches_are_those_of_transformers_processor() -> None:
    image = photograph(300)
    expected = theirs("Siglip2ImageProcessor")()(image, return_tensors="pt")
    pixels = ImageProcessor(siglip2.FAMILY.preprocessor)(image, return_tensors="pt")["pixel_values"]
    assert expected["spatial_shapes"].tolist() == [[16, 16]]
    assert torch.equal(siglip2.patchify(pixels, 16), expected["pixel_values"])
