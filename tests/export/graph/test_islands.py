"""Kept operations are in FP32 in the graph, and nothing else is."""

from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto

from tests.conftest import BATCH
from tests.export.small_towers import cut
from trtower.bundle.manifest import GRAPH
from trtower.errors import BuildError, ConfigError
from trtower_export.console import Step
from trtower_export.graph.onnx_graph import write_onnx
from trtower_export.plan.choice import PlanChoice
from trtower_export.plan.polygraphy import PLAN, build_plan
from trtower_export.precision.program import trace_with_islands


def write(name: str, patterns: Sequence[str], folder: Path) -> tuple[str, ...]:
    tower, spec = cut(name)
    program, kept = trace_with_islands(tower, spec, "fp16", BATCH, patterns, copied=True)
    write_onnx(program, spec.input("fp16"), spec.output("fp16"), folder, islands=bool(kept))
    return kept


@pytest.mark.usefixtures("one_thread")
def test_weight_that_layers_share_stays_half_unless_all_keep_it(tmp_path: Path) -> None:
    def tables(patterns: Sequence[str]) -> set[int]:
        write("dinov3_vit", patterns, tmp_path)
        graph = onnx.load(tmp_path / GRAPH).graph
        return {t.data_type for t in graph.initializer if "rotation" in t.name}

    assert tables(["layers.1.layer.attention.elementwise"]) == {TensorProto.FLOAT16}
    assert tables(["layers.*.layer.attention.elementwise"]) == {TensorProto.FLOAT}


def test_pattern_that_matches_nothing_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'layers.0.mlp.fc9' is not an operation of this .*layers\.0\.mlp\.fc1"):
        write("clip", ["layers.0.mlp.fc9"], tmp_path)
    with pytest.raises(ConfigError, match=r"'layers.9' is not an operation"):
        write("clip", ["layers.9"], tmp_path)


def build(folder: Path, *capabilities: str) -> Path:
    spec = cut("clip")[1].input("fp16")
    target = PlanChoice(flavour="tensorrt-rtx", compute_capabilities=capabilities)
    build_plan(folder / GRAPH, target, spec, [BATCH], folder, Step(), mixed=True)
    return folder / PLAN


@pytest.mark.parametrize("capabilities", [(), ("7.5",), ("8.9", "12.0")])
def test_plan_builds_for_every_target(tmp_path: Path, capabilities: tuple[str, ...]) -> None:
    write("clip", ["layers.1.mlp.fc1", "layers.*.layer_norm1", "layers.2.residual1", "stem"], tmp_path)
    assert build(tmp_path, *capabilities).stat().st_size


def test_attention_in_fp32_is_refused_for_turing_and_the_operation_named(tmp_path: Path) -> None:
    write("clip", ["layers.1.self_attn.scores"], tmp_path)
    with pytest.raises(BuildError, match=r"layers\.1\.self_attn/MatMul.*Turing"):
        build(tmp_path, "7.5")
    assert build(tmp_path, "8.9").stat().st_size
