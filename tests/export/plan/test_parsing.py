"""Which TensorRT parses a graph, and who says so before a parser does."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import onnx
import pytest
from onnx import TensorProto, helper

from tests.conftest import TOWERS
from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import FUSED_GRAPH, GRAPH, MANIFEST
from trtower.errors import ConfigError
from trtower.inspection import as_text, inspect_bundle
from trtower_export.console import LoggedProgress
from trtower_export.plan import build
from trtower_export.plan.build import build_into
from trtower_export.plan.choice import PlanChoice
from trtower_export.plan.parsing import OLD, OPERATORS, Parsers, find_parsers


@pytest.mark.parametrize("tower", TOWERS)
def test_every_tensorrt_since_10_parses_the_graph_of_every_family(export: Callable[..., Path], tower: str) -> None:
    bundle = Bundle.open(export(tower, flavour="none"))
    parsers = find_parsers(bundle.path / GRAPH)
    assert (parsers.first, parsers.unknown) == ("10.3", ())
    assert bundle.manifest.first_tensorrt == "10.3"
    fused = find_parsers(bundle.path / FUSED_GRAPH)
    norms = any(node.op_type == "RMSNormalization" for node in onnx.load(bundle.path / FUSED_GRAPH).graph.node)
    assert (fused.first, fused.needs) == (
        ("10.15", "the operator RMSNormalization") if norms else ("10.14", "the operator Attention")
    )


def test_operators_and_types_decide(tmp_path: Path) -> None:
    def parsers_of(*operators: str, kind: int = TensorProto.FLOAT) -> Parsers:
        nodes = [helper.make_node(name, ["x"], ["y"]) for name in operators]
        weight = helper.make_tensor(
            "w", kind, [1], b"\0\0\0\0"[: 1 if kind == TensorProto.FLOAT8E4M3FN else 4], raw=True
        )
        onnx.save(helper.make_model(helper.make_graph(nodes, "graph", [], [], [weight])), tmp_path / "graph.onnx")
        return find_parsers(tmp_path / "graph.onnx")

    assert parsers_of("Add", "Conv") == ("10.3", "what trtower calls", ())
    assert parsers_of("Add", "Swish", "Attention") == ("11.0", "the operator Swish", ())
    assert parsers_of("Add", "Mystery", "Enigma").unknown == ("Enigma", "Mystery")
    assert not OLD & OPERATORS.keys()


@pytest.fixture
def old(spoilt: Path) -> Bundle:
    """A bundle from before two graphs were written, whose manifest does not say what parses its graph."""
    manifest = json.loads((spoilt / MANIFEST).read_text())
    del manifest["first_tensorrt"], manifest["target"]
    manifest["plans"] = []
    (spoilt / MANIFEST).write_text(json.dumps(manifest))
    return Bundle.open(spoilt)


def pretend_tensorrt(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("tensorrt")
    module.__version__, module.Runtime = version, object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)


@pytest.mark.parametrize(("version", "refused"), [("10.3.0", True), ("10.13.3.9", True), ("10.14.1.48", False)])
def test_old_bundle_on_an_old_tensorrt_is_to_be_exported_again(
    old: Bundle, monkeypatch: pytest.MonkeyPatch, version: str, refused: bool
) -> None:
    pretend_tensorrt(version, monkeypatch)
    says = as_text(inspect_bundle(old), why=True)
    again = f"TensorRT {version} cannot build tower.onnx, which needs 10.14 or later: export the bundle again"
    assert (again in says) == refused
    assert ("has no tensorrt plan: trtower build" in says) != refused
    if refused:
        with pytest.raises(ConfigError, match=r"export the bundle again with this trtower, whose graphs need 10.3"):
            build_into(old, PlanChoice(flavour="tensorrt"), LoggedProgress(), None)


def test_tensorrt_without_strong_types_is_refused(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_tensorrt("8.6.2", monkeypatch)
    with pytest.raises(ConfigError, match=r"TensorRT 8.6.2 cannot build tower.onnx, which needs 10.3 or later$"):
        build_into(Bundle.open(spoilt), PlanChoice(flavour="tensorrt"), LoggedProgress(), None)


def test_build_looks_for_known_faults_of_the_tensorrt_it_finds(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_tensorrt("10.3.0", monkeypatch)
    monkeypatch.setattr(build, "capability_of", lambda: "8.7")
    manifest = json.loads((spoilt / MANIFEST).read_text())
    manifest["spec"]["family"] = "dinov3_vit"
    (spoilt / MANIFEST).write_text(json.dumps(manifest))
    bundle = Bundle.open(spoilt)
    with pytest.raises(ConfigError, match=r"TensorRT 10.3.0 has a known fault, dinov3-on-10.3"):
        build_into(bundle, PlanChoice(flavour="tensorrt", compute_capabilities=("8.7",)), LoggedProgress(), None)
