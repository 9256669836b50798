import copy
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import uses_external_data
from onnxscript import rewriter

from tests.conftest import BATCH, NUM_LAYERS, make_model
from tests.export.small_towers import cut
from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import FUSED_GRAPH, GRAPH
from trtower.errors import BuildError
from trtower.layer_codes import LAST
from trtower.spec import BatchProfile, TensorSpec
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.graph import onnx_graph
from trtower_export.graph.onnx_graph import HIDDEN_STATE, read_onnx, write_onnx
from trtower_export.graph.operations import trace
from trtower_export.graph.truncate import truncate
from trtower_export.pipeline import ExportOptions, export_tower

KINDS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "fp32": TensorProto.FLOAT}
FAMILIES = ("clip", "dinov2")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", KINDS)
def test_precision_lives_in_the_graph(export: Callable[..., Path], family: str, precision: str) -> None:
    graph = onnx.load(export(family, precision=precision, flavour="none") / GRAPH).graph
    floats = {tensor.data_type for tensor in graph.initializer if tensor.data_type in KINDS.values()}
    assert floats == {KINDS[precision]}
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.elem_type == KINDS[precision]
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_has_one_attention_node_per_layer_in_a_graph_of_its_own(
    export: Callable[..., Path], family: str
) -> None:
    bundle = export(family, flavour="none")
    for file, count in ((GRAPH, 0), (FUSED_GRAPH, NUM_LAYERS - 1)):
        graph = onnx.load(bundle / file, load_external_data=False).graph
        assert sum(node.op_type == "Attention" for node in graph.node) == count


def test_no_weight_of_a_dead_layer_is_in_the_file(checkpoints: dict[str, Path], export: Callable[..., Path]) -> None:
    model = onnx.load(export("clip", precision="fp32", flavour="none") / GRAPH)
    shipped = {numpy_helper.to_array(t).tobytes() for t in model.graph.initializer}
    shipped |= {np.ascontiguousarray(numpy_helper.to_array(t).T).tobytes() for t in model.graph.initializer}
    states = open_checkpoint(str(checkpoints["clip"])).load_model().state_dict()

    def found(layer: int) -> int:
        weights = [v for k, v in states.items() if f"layers.{layer}." in k and v.ndim == 2]
        assert len(weights) == 6
        return sum(weight.numpy().tobytes() in shipped for weight in weights)

    assert [found(layer) for layer in range(NUM_LAYERS)] == [6, 6, 6, 0]


def test_graph_holds_nothing_about_the_machine_that_wrote_it(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.fx.config, "do_not_emit_stack_traces", False)  # as outside the tests
    bundle = export_tower(str(checkpoints["clip"]), tmp_path / "b", ExportOptions(flavour="none", check=False))
    content = (bundle.path / GRAPH).read_bytes()
    for word in (b"site-packages", b"trtower", b"transformers", b".py", b"/usr", b"/home", b"/tmp"):
        assert word not in content
    for folder in (Path(transformers.__file__).parent, Path(__file__).parents[3], Path(sys.prefix)):
        assert bytes(folder) not in content


def test_tower_that_breaks_its_contract_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(checkpoints["clip"]))
    spec = checkpoint.spec(-2, "patch")
    tower = truncate(checkpoint.load_model(), checkpoint.family, spec)
    wrong = TensorSpec(name="hidden_states", dtype="float16", shape=("batch", spec.num_tokens + 1, spec.hidden_size))
    with pytest.raises(BuildError, match="is expected"):
        write_onnx(
            trace(tower, spec.input("fp16"), BatchProfile(min=1, opt=1, max=2)),
            spec.input("fp16"),
            wrong,
            tmp_path,
        )


def test_nodes_and_hidden_states_have_names(export: Callable[..., Path]) -> None:
    graph = onnx.load(export("clip", flavour="none") / GRAPH, load_external_data=False).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert {"layers.2.mlp.fc1/MatMul", "layers.0.self_attn/Softmax", "stem.0.patch_embedding/Conv"} <= set(names)
    makers = {output: node.name for node in graph.node for output in node.output}
    states = {name: maker for name, maker in makers.items() if name.startswith("hidden_state.")}
    assert states == {
        "hidden_state.0": "stem.1/LayerNormalization",
        "hidden_state.1": "layers.0/Add_2",
        "hidden_state.2": "layers.1/Add_2",
    }
    assert makers["hidden_states"] == "layers.2/Add_2"


@pytest.mark.parametrize("precision", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_node_is_named_by_module_and_operator(export: Callable[..., Path], family: str, precision: str) -> None:
    graph = onnx.load(export(family, precision=precision, flavour="none") / GRAPH, load_external_data=False).graph
    for node in graph.node:
        assert re.fullmatch(rf"((stem|layers|final_norm)[\w.]*)?/{node.op_type}(_\d+)?", node.name)
    for layer in range(NUM_LAYERS - 1):
        assert f"layers.{layer}.mlp.fc1/MatMul" in {node.name for node in graph.node}
    assert not any(node.name.startswith(f"layers.{NUM_LAYERS - 1}") for node in graph.node)


@pytest.mark.parametrize(
    ("select_layer", "named", "output"),
    [(-2, 3, "layers.2/"), (-4, 1, "layers.0/"), ((-2, 0), 4, "/Concat"), (LAST, 5, "final_norm/")],
)
def test_hidden_state_is_named_by_its_index_unless_it_is_the_output(
    export: Callable[..., Path], select_layer: int | str | tuple[int, ...], named: int, output: str
) -> None:
    bundle = export("dinov2", select_layer=select_layer, flavour="none")
    graph = onnx.load(bundle / GRAPH, load_external_data=False).graph
    makers = {name: node.name for node in graph.node for name in node.output}
    states = [name for name in makers if name.startswith(HIDDEN_STATE)]
    assert states == [f"hidden_state.{index}" for index in range(named)]
    assert [makers[name].partition("/")[0] for name in states] == ["stem", *(f"layers.{k}" for k in range(named - 1))]
    assert makers["hidden_states"].startswith(output)
    for index in range(len({name for name in makers.values() if re.search(r"layers\.\d+\.norm1/", name)})):
        (norm,) = (node for node in graph.node if node.name == f"layers.{index}.norm1/LayerNormalization")
        assert norm.input[0] == f"hidden_state.{index}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip", "dinov3_vit"])  # DINOv3 rotates halves of its queries and keys
def test_disabled_rule_would_change_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = rewriter._DEFAULT_REWRITE_RULES

    def write(path: Path) -> bytes:
        tower, spec = cut(name)
        program = trace(copy.deepcopy(tower), spec.input("fp16"), BATCH)
        write_onnx(program, spec.input("fp16"), spec.output("fp16"), path.parent)
        return path.read_bytes()

    without = write(tmp_path / GRAPH)
    assert rewriter._DEFAULT_REWRITE_RULES is rules
    with onnx_graph._without_slices_split():
        assert len(rewriter._DEFAULT_REWRITE_RULES) == len(rules) - 1
    monkeypatch.setattr(onnx_graph, "_without_slices_split", nullcontext)
    assert write(tmp_path / GRAPH) == without


def test_graph_is_read_from_hard_links_as_onnx_reads_it(clip_bundle: Path, tmp_path: Path) -> None:
    expected = onnx.load_model(clip_bundle / GRAPH)
    linked = tmp_path / "linked"
    shutil.copytree(clip_bundle, linked, copy_function=os.link)
    actual = read_onnx(Bundle.open(linked))
    assert {each.name: each.raw_data for each in actual.graph.initializer} == {
        each.name: each.raw_data for each in expected.graph.initializer
    }
    assert actual == expected
    onnx.checker.check_model(actual)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_positions_are_looked_up_at_export(name: str, tmp_path: Path) -> None:
    """Loading reads the file before its hash is known. The exporter itself looks up the rows of small tables only."""
    make_model(name, image_size=128, patch_size=4).save_pretrained(tmp_path / "large")
    bundle = export_tower(str(tmp_path / "large"), tmp_path / "b", ExportOptions(precision="bf16", flavour="none"))
    graph = onnx.load(bundle.path / GRAPH, load_external_data=False).graph
    table = next(tensor for tensor in graph.initializer if "position_embedding" in tensor.name)
    assert 32 * 32 in table.dims or 32 * 32 + 1 in table.dims
    outside = [tensor for tensor in graph.initializer if uses_external_data(tensor)]
    assert {tensor.data_type for tensor in outside} == {TensorProto.BFLOAT16}
    assert bundle.manifest.certificate
    assert bundle.manifest.certificate.passed
