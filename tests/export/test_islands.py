"""What is kept in FP32 is in FP32 in the graph, and nothing else is."""

from collections.abc import Sequence
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

from tests.conftest import BATCH, MODELS
from tests.export.small_towers import cut, operations, pixels, simulation
from trtower.bundle import GRAPH
from trtower.errors import BuildError, ConfigError
from trtower_export.doctor import named_weights
from trtower_export.engine import Target, build_plan
from trtower_export.onnx_graph import write_onnx
from trtower_export.precision import trace_with_islands
from trtower_export.progress import LoggedStep

HALF_ULP = 2.0**-11
"""FP16 rounds to 11 bits."""


def write(name: str, patterns: Sequence[str], folder: Path) -> tuple[str, ...]:
    tower, spec = cut(name)
    program, kept = trace_with_islands(tower, spec, "fp16", BATCH, patterns, spare=True)
    write_onnx(program, spec.input("fp16"), spec.output("fp16"), folder / GRAPH, islands=bool(kept))
    return kept


def patterns_of(name: str) -> list[list[str]]:
    """Give a linear layer, a norm, attention, a residual, the stem and a whole layer, as this tower names them."""
    parts = [operation.part for operation in operations(name) if operation.layer == 1]
    scores = next(part for part in parts if part.endswith("scores"))
    linear = next(part for part in reversed(parts) if ".fc" in part or "down_proj" in part)
    return [[f"layers.1.{linear}"], [f"layers.*.{parts[0]}"], [f"layers.1.{scores}"], ["layers.1", "stem"]]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("one_thread")
def test_graph_computes_what_was_simulated(name: str, tmp_path: Path) -> None:
    tower, _ = cut(name)
    with torch.no_grad():
        exact = tower(pixels())
    for patterns in patterns_of(name):
        kept = write(name, patterns, tmp_path)
        session = onnxruntime.InferenceSession(tmp_path / GRAPH)
        (found,) = session.run(None, {"pixel_values": pixels().half().numpy()})
        rounded = set(operations(name).names) - set(kept)
        with torch.no_grad():
            expected = simulation(name).run(pixels(), rounded=rounded).half()
        assert found.dtype == "float16"
        error = (torch.from_numpy(found).float() - exact).norm() / exact.norm()
        simulated = (expected.float() - exact).norm() / exact.norm()
        assert 0.4 < error / simulated < 1.3  # ONNX Runtime rounds less often than the simulation


@pytest.mark.usefixtures("one_thread")
def test_weights_in_fp32_are_the_kept_ones_bit_for_bit(tmp_path: Path) -> None:
    tower, _ = cut("clip")
    kept = write("clip", ["layers.1.mlp.fc1", "layers.*.layer_norm2"], tmp_path)
    assert kept == ("layers.0.layer_norm2", "layers.1.layer_norm2", "layers.1.mlp.fc1", *LATER_NORMS)
    graph = onnx.load(tmp_path / GRAPH).graph
    wide = [numpy_helper.to_array(t) for t in graph.initializer if t.data_type == TensorProto.FLOAT and t.dims]
    weights = {n: w for n, w in named_weights(tower).items() if n.rpartition(".")[0] in kept}
    assert sorted(array.tobytes() for array in wide) == sorted(w.numpy().tobytes() for w in weights.values())


LATER_NORMS = ("layers.2.layer_norm2", "layers.3.layer_norm2")


@pytest.mark.usefixtures("one_thread")
def test_attention_stays_fused_where_no_island_reaches(tmp_path: Path) -> None:
    write("clip", ["layers.1.self_attn.scores", "layers.2.self_attn.q_proj"], tmp_path)
    nodes = onnx.load(tmp_path / GRAPH, load_external_data=False).graph.node
    fused = [node.name for node in nodes if node.op_type == "Attention"]
    assert fused == [f"layers.{layer}.self_attn/Attention" for layer in (0, 2, 3)]


@pytest.mark.usefixtures("one_thread")
def test_weight_that_layers_share_stays_half_unless_all_keep_it(tmp_path: Path) -> None:
    def tables(patterns: Sequence[str]) -> set[int]:
        write("dinov3_vit", patterns, tmp_path)
        graph = onnx.load(tmp_path / GRAPH).graph
        return {t.data_type for t in graph.initializer if "rotation" in t.name}

    assert tables(["layers.1.layer.attention.elementwise"]) == {TensorProto.FLOAT16}
    assert tables(["layers.*.layer.attention.elementwise"]) == {TensorProto.FLOAT}


def test_pattern_that_matches_nothing_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'layers.0.mlp.fc9' is no operation of this tower; .*layers\.0\.mlp\.fc1"):
        write("clip", ["layers.0.mlp.fc9"], tmp_path)
    with pytest.raises(ConfigError, match=r"'layers.9' is no operation"):
        write("clip", ["layers.9"], tmp_path)


def build(folder: Path, *capabilities: str) -> Path:
    spec = cut("clip")[1].input("fp16")
    target = Target(flavour="tensorrt-rtx", compute_capabilities=capabilities)
    return build_plan(folder / GRAPH, target, spec, BATCH, folder, LoggedStep(), mixed=True)[1]


@pytest.mark.parametrize("capabilities", [(), ("7.5",), ("8.9", "12.0")])
def test_plan_builds_for_every_target(tmp_path: Path, capabilities: tuple[str, ...]) -> None:
    write("clip", ["layers.1.mlp.fc1", "layers.*.layer_norm1", "layers.2.residual1", "stem"], tmp_path)
    assert build(tmp_path, *capabilities).stat().st_size


def test_attention_in_fp32_is_refused_for_turing_by_its_name(tmp_path: Path) -> None:
    write("clip", ["layers.1.self_attn.scores"], tmp_path)
    with pytest.raises(BuildError, match=r"layers\.1\.self_attn/MatMul.*Turing"):
        build(tmp_path, "7.5")
    assert build(tmp_path, "8.9").stat().st_size
