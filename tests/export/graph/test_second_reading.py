"""PyTorch reads every graph that the exporter writes and computes what the cut tower computes.

ONNX Runtime and TensorRT are the first readers. This one shares no line with them, so a graph that both read the same
way says what we mean, and not what one library makes of it. tests/export/heads/test_embeddings.py and
tests/runtime/installation/test_projected.py read the other graphs with a head.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import fx

from tests.conftest import BATCH, DISTINCT, IMAGE_SIZE, make_model
from tests.export.heads.test_embeddings import EXPORTED, POOLED, PROJECTED, make
from trtower.bundle.manifest import GRAPH, GRAPH_DATA
from trtower.graph.module import ONNX_NAME, read_module, why_unknown
from trtower.layer_codes import LayerCode
from trtower.spec import TowerSpec
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.checkpoint.head import describe_tower
from trtower_export.families import family_of
from trtower_export.graph.onnx_graph import HIDDEN_STATE, write_onnx
from trtower_export.graph.operations import trace
from trtower_export.graph.reference import UncutTower
from trtower_export.graph.truncate import TruncatedTower, truncate
from trtower_export.options import ExportOptions

pytestmark = pytest.mark.usefixtures("one_thread")

SAME = 1e-6
"""Relative error of two orders of summing in FP32 (2e-7 to 4e-7 were measured)."""

Cut = tuple[TruncatedTower, TowerSpec]


def cut_family(name: str, code: LayerCode, _: Path) -> Cut:
    model = make_model(name, num_hidden_layers=2)
    family = family_of(model.config.model_type)
    spec = family.spec(model.config, code, "patch", IMAGE_SIZE)
    return truncate(model, family, spec), spec


def cut_embedding(name: str, folder: Path) -> Cut:
    make(name).save_pretrained(folder)
    checkpoint = open_checkpoint(str(folder))
    uncut = UncutTower.load(checkpoint, describe_tower(checkpoint, ExportOptions(head="embedding")))
    return uncut.cut(), uncut.spec


def read_states(module: fx.GraphModule, pixels: torch.Tensor) -> dict[int, torch.Tensor]:
    """Run a graph and return its hidden states by their index."""
    states: dict[int, torch.Tensor] = {}

    class Reading(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if (name := n.meta.get(ONNX_NAME, "")).startswith(HIDDEN_STATE):
                states[int(name.removeprefix(HIDDEN_STATE))] = result
            return result

    Reading(module).run(pixels)
    return states


CASES: dict[str, Callable[[Path], Cut]] = {
    **{name: partial(cut_family, name, [-2, "last_hidden_state"]) for name in DISTINCT},
    "clip, embeddings only": partial(cut_family, "clip", 0),
    **{f"{name} embedded": partial(cut_embedding, name) for name in (*PROJECTED, *POOLED) if name not in EXPORTED},
}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_pytorch_reads_the_cut_tower_and_every_state_in_its_graph(case: str, tmp_path: Path) -> None:
    """A hidden state has its index in its name, by which `trtower check --by-layer` finds it."""
    tower, spec = CASES[case](tmp_path / "model")
    pixels = torch.randn(3, 3, spec.image_size, spec.image_size, generator=torch.Generator().manual_seed(5))
    expected = tower(pixels)
    write_onnx(trace(tower, spec.input("fp32"), BATCH), spec.input("fp32"), spec.output("fp32"), tmp_path)
    model = onnx.load(tmp_path / GRAPH, load_external_data=False)
    assert why_unknown(model) is None
    weights = (tmp_path / GRAPH_DATA).read_bytes()
    found = read_module(model, weights)(pixels)
    assert found.shape == expected.shape
    assert error(found, expected) <= SAME
    states = read_states(read_module(model, weights, fused=False), pixels)
    last = range(spec.depth, spec.depth + 1) if spec.depth not in states else ()  # then it is the output
    assert sorted([*states, *last]) == list(range(spec.depth + 1))
    for index, state in states.items():
        assert error(state, tower.states(pixels)[index]) <= SAME
