"""PyTorch reads every graph that the exporter writes and computes what the cut tower computes.

ONNX Runtime and TensorRT are the first readers. This one shares no line with them, so a graph that both read the same
way says what we mean, and not what one library makes of it.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from tests.conftest import BATCH, DISTINCT, IMAGE_SIZE, make_model
from tests.export.heads import models as projected
from tests.export.heads import test_embeddings as embeddings
from trtower.bundle.manifest import GRAPH, GRAPH_DATA
from trtower.graph.module import read_module, why_unknown
from trtower.layer_codes import LayerCode
from trtower.spec import TowerSpec
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.checkpoint.head import describe_tower
from trtower_export.families import family_of
from trtower_export.graph.onnx_graph import write_onnx
from trtower_export.graph.operations import trace
from trtower_export.graph.reference import UncutTower
from trtower_export.graph.truncate import TruncatedTower, truncate
from trtower_export.options import ExportOptions

pytestmark = pytest.mark.usefixtures("one_thread")

SAME = 1e-6
"""Relative error of two orders of summing in FP32 (2e-7 to 4e-7 were measured)."""

CODES: tuple[LayerCode, ...] = (0, "last_hidden_state", [-2, 1])

Cut = tuple[TruncatedTower, TowerSpec]


def cut_family(name: str, code: LayerCode, _: Path) -> Cut:
    model = make_model(name)
    family = family_of(model.config.model_type)
    spec = family.spec(model.config, code, "patch", IMAGE_SIZE)
    return truncate(model, family, spec), spec


def cut_with_head(model: Any, folder: Path, head: str) -> Cut:
    model.save_pretrained(folder)
    checkpoint = open_checkpoint(str(folder))
    uncut = UncutTower.load(checkpoint, describe_tower(checkpoint, ExportOptions(head=head)))
    return uncut.cut(), uncut.spec


def cut_projected(name: str, folder: Path) -> Cut:
    return cut_with_head(projected.make(name), folder, "projector")


def cut_embedding(name: str, folder: Path) -> Cut:
    return cut_with_head(embeddings.make(name), folder, "embedding")


CASES: dict[str, Callable[[Path], Cut]] = {
    **{name: partial(cut_family, name, 2) for name in DISTINCT},
    **{f"clip, {code}": partial(cut_family, "clip", code) for code in CODES},
    **{f"{name} with its projector": partial(cut_projected, name) for name in projected.KINDS},
    **{f"{name} embedded": partial(cut_embedding, name) for name in (*embeddings.PROJECTED, *embeddings.POOLED)},
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_pytorch_reads_the_cut_tower_in_its_graph(case: str, tmp_path: Path) -> None:
    tower, spec = CASES[case](tmp_path / "model")
    pixels = torch.randn(3, 3, spec.image_size, spec.image_size, generator=torch.Generator().manual_seed(5))
    expected = tower(pixels)
    write_onnx(trace(tower, spec.input("fp32"), BATCH), spec.input("fp32"), spec.output("fp32"), tmp_path)
    model = onnx.load(tmp_path / GRAPH, load_external_data=False)
    assert why_unknown(model) is None
    found = read_module(model, (tmp_path / GRAPH_DATA).read_bytes())(pixels)
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) <= SAME
