"""The two forms of a graph: the scale of attention is exact in both, and the form for TensorRT really gets fused."""

import json
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper
from transformers import CLIPVisionConfig, CLIPVisionModel

from trtower.bundle.manifest import FUSED_GRAPH, GRAPH
from trtower.spec import BatchProfile, TowerSpec
from trtower_export.families import family_of
from trtower_export.graph.onnx_graph import write_onnx
from trtower_export.graph.operations import trace
from trtower_export.graph.truncate import truncate

pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, HEADS = 2, 2

MEMORY = Path(__file__).parents[3] / "benchmarks" / "plan_memory.py"

BATCH = BatchProfile(min=1, opt=1, max=2)


def write(folder: Path, precision: str, head_size: int, image_size: int = 28) -> TowerSpec:
    """Write a CLIP of two layers and two heads."""
    width = HEADS * head_size
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=image_size,
        patch_size=14,
    )
    family = family_of("clip_vision_model")
    spec = family.spec(config, -1, "patch", None)
    tower = truncate(CLIPVisionModel(config).eval(), family, spec)
    program = trace(tower, spec.input(precision), BATCH)
    write_onnx(program, spec.input(precision), spec.output(precision), folder)
    return spec


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("head_size", [64, 72, 80, 88, 128])
def test_scale_of_attention_is_exact(tmp_path: Path, precision: str, head_size: int) -> None:
    """BF16 would round 1 / sqrt(72) by 1.5e-3, the same for every score of every layer."""
    write(tmp_path, precision, head_size)
    graph = onnx.load(tmp_path / GRAPH).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    factors = [
        constants[node.input[1]]
        for node in graph.node
        if node.op_type == "Mul" and "self_attn" in node.name and node.input[1] in constants
    ]
    values = [float(numpy_helper.to_array(factor).astype("float32")) for factor in factors]
    assert values == pytest.approx([head_size**-0.5] * LAYERS, rel=1e-7)
    narrow = precision != "fp32" and head_size == 64  # 1 / 8
    assert all((factor.data_type != TensorProto.FLOAT) == narrow for factor in factors)
    if precision != "fp32":
        fused = onnx.load(tmp_path / FUSED_GRAPH, load_external_data=False).graph
        scales = [each.f for node in fused.node for each in node.attribute if each.name == "scale"]
        assert scales == pytest.approx([head_size**-0.5] * LAYERS, rel=1e-7)
        assert not any(node.op_type == "Cast" for node in fused.node)


@pytest.mark.parametrize("head_size", [64, 72])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_tensorrt_fuses_what_is_spelled_out(tmp_path: Path, precision: str, head_size: int) -> None:
    """A score matrix would be larger than all that the plan may use: 1370 tokens a head, against ``head_size``."""
    spec = write(tmp_path, precision, head_size, image_size=518)
    command = [sys.executable, str(MEMORY), str(tmp_path / GRAPH), str(BATCH.max)]
    scratch = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)["scratch"]
    scores = BATCH.max * HEADS * spec.num_tokens**2 * 2
    assert 0 < scratch < scores


def test_onnx_runtime_keeps_the_fused_nodes(tmp_path: Path) -> None:
    """Its optimiser may not take them apart: on CUDA, fast attention has no other way in."""
    write(tmp_path, "fp16", 64)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(tmp_path / FUSED_GRAPH, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(tmp_path / "optimised.onnx").graph.node
    layers = [node for node in nodes if node.name.startswith("layers.")]
    assert sum(node.op_type == "Attention" for node in layers) == LAYERS
    assert not {node.op_type for node in layers} & {"Softmax", "Transpose", "Reshape"}
