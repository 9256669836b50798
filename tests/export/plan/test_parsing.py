"""Which TensorRT parses a graph, and who says so before a parser does."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from tests.conftest import TOWERS, make_model
from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import FUSED_GRAPH, GRAPH, MANIFEST, Manifest
from trtower.errors import BuildError, BundleError, ConfigError
from trtower.inspection import as_text, inspect_bundle
from trtower_export.console import LoggedProgress
from trtower_export.options import ExportOptions
from trtower_export.pipeline import export_tower
from trtower_export.plan import build, choice, parsing
from trtower_export.plan.build import add_plan
from trtower_export.plan.parsing import OLD, OPERATORS, Learnt, Parsers, check_parsers, find_parsers
from trtower_export.targets import find_target


@pytest.mark.parametrize("tower", TOWERS)
def test_every_tensorrt_since_10_3_parses_the_graph(export: Callable[..., Path], tower: str) -> None:
    check_parsed(Bundle.open(export(tower, flavour="none")), ("10.14", "the operator Attention"))


@pytest.mark.parametrize("tower", ["aimv2", "internvl_vision-rms"])
def test_every_tensorrt_since_10_3_parses_rms_norms(tmp_path: Path, tower: str) -> None:
    make_model(tower).save_pretrained(tmp_path / "checkpoint")
    options = ExportOptions(flavour="none", check=False)
    bundle = export_tower(str(tmp_path / "checkpoint"), tmp_path / "bundle", options)
    check_parsed(bundle, ("10.15", "the operator RMSNormalization"))
    manifest = json.loads((bundle.path / MANIFEST).read_text())
    del manifest["first_tensorrt"]  # as before two graphs were written
    assert Manifest.from_json(json.dumps(manifest)).first_tensorrt == "10.15"


def check_parsed(bundle: Bundle, fused: tuple[str, str]) -> None:
    parsers = find_parsers(bundle.path / GRAPH)
    assert (parsers.first, parsers.unknown) == ("10.3", ())
    assert bundle.manifest.first_tensorrt == "10.3"
    assert find_parsers(bundle.path / FUSED_GRAPH)[:2] == fused


@pytest.mark.parametrize("version", ["", "latest", "10", "1" * 5000 + ".0"])
def test_version_in_a_manifest_is_a_version(clip_bundle: Path, version: str) -> None:
    manifest = json.loads((clip_bundle / MANIFEST).read_text()) | {"first_tensorrt": version}
    with pytest.raises(BundleError, match=r"first_tensorrt is .*; expected a version such as 10.3"):
        Manifest.from_json(json.dumps(manifest))


def test_graph_that_the_target_cannot_parse_is_refused() -> None:
    needy = Parsers("10.14", "the operator Attention", ())
    with pytest.raises(
        ConfigError, match=r"triton-25.06 has TensorRT 10.11.0, and the graph needs 10.14 or later, for "
    ):
        check_parsers(needy, find_target("triton-25.06"), LoggedProgress())
    for name in ("triton-25.12", "a100"):
        check_parsers(needy, find_target(name), LoggedProgress())


SIZES = {TensorProto.FLOAT: 4, TensorProto.BFLOAT16: 2, TensorProto.FLOAT8E4M3FN: 1}


def test_operators_and_types_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def parsers_of(*operators: str, kind: int = TensorProto.FLOAT) -> Parsers:
        nodes = [helper.make_node(name, ["x"], ["y"]) for name in operators]
        weight = helper.make_tensor("w", kind, [1], bytes(SIZES[kind]), raw=True)
        onnx.save(helper.make_model(helper.make_graph(nodes, "graph", [], [], [weight])), tmp_path / "graph.onnx")
        return find_parsers(tmp_path / "graph.onnx")

    assert parsers_of("Add", "Conv") == ("10.3", "what trtower calls", ())
    assert parsers_of("RMSNormalization") == ("10.15", "the operator RMSNormalization", ())
    monkeypatch.setattr(parsing, "OLDEST", Learnt("8.6", ""))  # then types count, and operators of before 10.3
    assert parsers_of("Gelu") == ("10.0", "the operator Gelu", ())
    for name, kind in (("BFLOAT16", TensorProto.BFLOAT16), ("FLOAT8E4M3FN", TensorProto.FLOAT8E4M3FN)):
        assert parsers_of("Add", kind=kind) == ("10.0", f"the type {name}", ())
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


def pretend_orin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend, to all that builds plans, that this machine is a Jetson Orin."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(choice, "capability_of", lambda *_: "8.7")


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
        pretend_orin(monkeypatch)
        with pytest.raises(ConfigError, match=r"export the bundle again with this trtower, whose graphs need 10.3"):
            add_plan(old, "tensorrt", (), LoggedProgress())


def test_tensorrt_without_strong_types_is_refused(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_tensorrt("8.6.2", monkeypatch)
    pretend_orin(monkeypatch)
    with pytest.raises(ConfigError, match=r"TensorRT 8.6.2 cannot build tower.onnx, which needs 10.3 or later$"):
        add_plan(Bundle.open(spoilt), "tensorrt", (), LoggedProgress())


def test_build_looks_for_known_faults_of_the_tensorrt_it_finds(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_tensorrt("10.3.0", monkeypatch)
    pretend_orin(monkeypatch)
    manifest = json.loads((spoilt / MANIFEST).read_text())
    manifest["spec"]["family"] = "dinov3_vit"
    (spoilt / MANIFEST).write_text(json.dumps(manifest))
    bundle = Bundle.open(spoilt)
    with pytest.raises(ConfigError, match=r"TensorRT 10.3.0 has a known fault, dinov3-on-10.3"):
        add_plan(bundle, "tensorrt", (), LoggedProgress())
    monkeypatch.setattr(build, "build_plan", lambda *_, **__: (_ for _ in ()).throw(BuildError("reached")))
    with pytest.raises(BuildError, match="reached"):
        add_plan(bundle, "tensorrt", (), LoggedProgress(), accept_known_faults=("dinov3-on-10.3",))


def test_export_looks_for_them_before_it_loads_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_tensorrt("10.3.0", monkeypatch)
    pretend_orin(monkeypatch)
    make_model("dinov3_vit").save_pretrained(tmp_path / "dinov3")
    options = ExportOptions(flavour="tensorrt", check=False)
    with pytest.raises(ConfigError, match=r"TensorRT 10.3.0 has a known fault, dinov3-on-10.3"):
        export_tower(str(tmp_path / "dinov3"), tmp_path / "bundle", options)
    assert [path.name for path in tmp_path.iterdir()] == ["dinov3"]
