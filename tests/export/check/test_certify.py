"""The check passes sound bundles and fails broken ones: one that could not fail would prove nothing."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from trtower.bundle.bundle import Bundle
from trtower.bundle.certificate import Certificate, Figures
from trtower.bundle.manifest import FUSED_GRAPH, GRAPH, GRAPH_DATA, MANIFEST
from trtower.bundle.staging import describe
from trtower.errors import CheckpointError, ConfigError
from trtower.fingerprint import hash_later
from trtower.parity.bounds import judge
from trtower.parity.metrics import MetricSums
from trtower.spec import BatchProfile
from trtower_export.check.certify import certify, check_bundle
from trtower_export.check.photographs import load_photographs
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.console import LoggedProgress
from trtower_export.pipeline import ExportOptions, export_tower

FINE: dict[str, Any] = {
    "token_cosine_mean": 1.0,
    "token_cosine_min": 1.0,
    "token_error_p999": 2e-3,
    "relative_error": 2e-3,
    "max_abs_error": 0.0,
    "non_finite": 0,
}


def run_check(bundle: Path, checkpoint: Path, **options: Any) -> Certificate:
    photographs = load_photographs(None, limit=2)
    settings: dict[str, Any] = {"quick": True, **options}
    opened = Bundle.open(bundle)
    return certify(opened, open_checkpoint(str(checkpoint)), photographs, progress=LoggedProgress(), **settings)


@pytest.mark.parametrize("family", ["clip", "dinov2"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_sound_bundle_passes(
    export: Callable[..., Path], checkpoints: dict[str, Path], family: str, precision: str
) -> None:
    certificate = run_check(export(family, precision=precision, flavour="none"), checkpoints[family])
    assert certificate.passed, certificate.bounds
    assert certificate.ran == "graph"
    assert certificate.executed == (GRAPH, GRAPH_DATA)
    assert certificate.gpu is None
    graphs = {GRAPH} if precision == "fp32" else {GRAPH, FUSED_GRAPH}  # which of them is emulated depends
    assert set(certificate.files) == {*graphs, GRAPH_DATA, "config.json", "preprocessor_config.json"}
    assert [image.name for image in certificate.images] == ["astronaut.png", "chelsea.png"]


def test_photographs_of_the_same_name_keep_their_own_figures(
    export: Callable[..., Path], checkpoints: dict[str, Path]
) -> None:
    bundle, checkpoint = Bundle.open(export("clip", flavour="none")), open_checkpoint(str(checkpoints["clip"]))
    photographs = load_photographs(None, limit=2)
    first, second = photographs.images
    alike = replace(photographs, images=(first, replace(second, name=first.name)))
    named, unnamed = (
        certify(bundle, checkpoint, each, quick=True, progress=LoggedProgress()) for each in (photographs, alike)
    )
    assert [image.torch for image in unnamed.images] == [image.torch for image in named.images]
    assert (unnamed.bundle, unnamed.torch) == (named.bundle, named.torch)


def test_cut_tower_in_fp32_is_exact(export: Callable[..., Path], checkpoints: dict[str, Path]) -> None:
    certificate = run_check(export("clip", precision="fp32", flavour="none"), checkpoints["clip"])
    assert certificate.torch.relative_error == 0.0
    assert certificate.bundle.relative_error < 1e-5


def test_plan_that_was_not_run_is_named(clip_bundle: Path, checkpoints: dict[str, Path]) -> None:
    certificate = run_check(clip_bundle, checkpoints["clip"])
    assert certificate.ran == "graph"
    assert certificate.not_run == (Bundle.open(clip_bundle).manifest.plans[0].file,)


def test_tower_cut_one_layer_off_fails(export: Callable[..., Path], checkpoints: dict[str, Path]) -> None:
    bundle = Bundle.open(export("clip", flavour="none", select_layer=-1))
    honest = certify(
        bundle,
        open_checkpoint(str(checkpoints["clip"])),
        load_photographs(None, limit=1),
        quick=True,
        progress=LoggedProgress(),
    )
    assert honest.passed
    # The same graph, declared as the layer before: what a wrong index would ship.
    cut = replace(bundle.manifest.cut, layers=3)  # keeps the manifest consistent
    lying = Bundle(bundle.path, replace(bundle.manifest, spec=replace(bundle.manifest.spec, layers=(3,)), cut=cut))
    checkpoint = open_checkpoint(str(checkpoints["clip"]))
    weights = hash_later(checkpoint.load_model(), lying.manifest.spec).result()
    lying.manifest = replace(lying.manifest, source=replace(lying.manifest.source, weights_sha256=weights))
    certificate = certify(lying, checkpoint, load_photographs(None, limit=1), quick=True, progress=LoggedProgress())
    assert not certificate.passed
    assert certificate.bundle.token_cosine_min < 0.95


def test_overflow_in_half_precision_fails(
    export: Callable[..., Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoints["clip"], tmp_path / "hot"))
    model = open_checkpoint(str(folder)).load_model()
    layers = getattr(model, "vision_model", model).encoder.layers
    with torch.no_grad():  # fc1 x 3e5 and fc2 / 3e5: nearly the same function in FP32, infinite in FP16
        layers[1].mlp.fc1.weight.mul_(3e5)
        layers[1].mlp.fc2.weight.div_(3e5)
    model.save_pretrained(folder)
    bundle = export_tower(str(folder), tmp_path / "b", ExportOptions(flavour="none", check=False)).path
    certificate = run_check(bundle, folder)
    assert not certificate.passed
    assert certificate.bundle.non_finite > 0
    assert certificate.bundle.relative_error is None


def test_damaged_weight_fails(spoilt: Path, checkpoints: dict[str, Path]) -> None:
    """One row of one matrix is changed and the hashes updated, so only arithmetic can find it."""
    model = onnx.load(spoilt / GRAPH)
    tensor = next(t for t in model.graph.initializer if list(t.dims) == [64, 128])
    values = numpy_helper.to_array(tensor).copy()
    values[3] *= -1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    rewrite(spoilt, model)
    assert not run_check(spoilt, checkpoints["clip"]).passed


def test_checkpoint_with_other_weights_is_refused(spoilt: Path, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    other = open_checkpoint(str(checkpoints["clip"])).load_model()
    next(iter(other.parameters())).view(-1)[0] += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="are not the ones that tiny-clip was exported from"):
        run_check(spoilt, tmp_path / "other")


def test_certificate_is_written_into_the_manifest(spoilt: Path, checkpoints: dict[str, Path]) -> None:
    opened, checkpoint = Bundle.open(spoilt), open_checkpoint(str(checkpoints["clip"]))
    checked = check_bundle(opened, checkpoint, load_photographs(None, limit=1), LoggedProgress(), quick=True)
    certificate = Bundle.open(spoilt).manifest.certificate
    assert certificate == checked.manifest.certificate
    assert certificate.files[GRAPH] == opened.manifest.files[GRAPH].sha256


def test_minimum_batch_of_the_profile_is_respected(export: Callable[..., Path], checkpoints: dict[str, Path]) -> None:
    bundle = export("clip", precision="fp32", flavour="none", profiles=(BatchProfile(min=3, opt=3, max=4),))
    assert run_check(bundle, checkpoints["clip"]).passed


def test_emulation_rounds_after_every_operation(export: Callable[..., Path], checkpoints: dict[str, Path]) -> None:
    certificate = run_check(
        export("clip", precision="bf16", flavour="none"), checkpoints["clip"], backend="emulated-bf16"
    )
    assert "emulated" in certificate.backend
    # FP32 arithmetic on rounded weights makes only about half of PyTorch's own BF16 error.
    assert 0.8 < certificate.bundle.relative_error / certificate.torch.relative_error < 1.25
    with pytest.raises(ConfigError, match="is for bf16"):
        run_check(export("clip", flavour="none"), checkpoints["clip"], backend="emulated-bf16")


def test_figures_match_their_definitions() -> None:
    reference = torch.tensor([[[3.0, 4.0], [0.0, 5.0]]])
    features = torch.tensor([[[3.0, 4.0], [5.0, 0.0]]])
    figures = MetricSums.of(features, reference).figures()
    assert figures.token_cosine_min == pytest.approx(0.0)
    assert figures.token_cosine_mean == pytest.approx(0.5)
    assert figures.relative_error == pytest.approx(1.0)
    assert figures.max_abs_error == 5.0
    assert figures.non_finite == 0


def test_figures_over_all_images_are_not_the_mean_of_ratios() -> None:
    small, large = torch.full((1, 1, 2), 1.0), torch.full((1, 1, 2), 100.0)
    total = MetricSums.of(small * 2, small)
    total.add(MetricSums.of(large, large))
    assert total.figures().relative_error == pytest.approx(1 / np.sqrt(1 + 1e4), rel=1e-6)


@pytest.mark.parametrize("order", [1, -1])
def test_nan_in_any_image_is_not_lost(order: int) -> None:
    fine = torch.ones(1, 2, 2)
    parts = [MetricSums.of(fine, fine), MetricSums.of(fine * float("nan"), fine)][::order]
    parts[0].add(parts[1])
    figures = parts[0].figures()
    assert figures.non_finite == 4
    assert figures.max_abs_error is figures.relative_error is figures.token_cosine_min is None
    assert not any(bound.holds for bound in judge("fp16", {"photograph": ([figures], figures)}))


def test_bundle_passes_if_pytorch_itself_is_worse() -> None:
    fine = Figures(**FINE)
    exact = replace(fine, relative_error=0.0)
    overflown = replace(fine, relative_error=None, token_cosine_min=None, non_finite=7)
    for bundle, own in ((fine, overflown), (exact, fine), (exact, exact)):
        assert all(bound.holds for bound in judge("fp16", {"photograph": ([bundle], own)}))
    assert not all(bound.holds for bound in judge("fp16", {"photograph": ([overflown], overflown)}))


def test_each_bound_can_fail() -> None:
    own = Figures(**FINE)
    assert all(bound.holds for bound in judge("fp16", {"photograph": ([own], own)}))
    for change, figure in (
        ({"token_cosine_min": 0.998}, "token_cosine_min"),
        ({"token_error_p999": 4e-2}, "token_error_p999"),
        ({"relative_error": 1.1e-2}, "relative_error"),
        ({"relative_error": 7e-3}, "relative_error_over_torch"),
        ({"non_finite": 1}, "non_finite"),
    ):
        missed = {
            bound.figure
            for bound in judge("fp16", {"photograph": ([own, replace(own, **change)], own)})
            if not bound.holds
        }
        assert figure in missed


def rewrite(folder: Path, model: onnx.ModelProto) -> None:
    """Write another graph into a bundle, and update the hashes."""
    (folder / GRAPH_DATA).unlink()
    onnx.save_model(model, folder / GRAPH, save_as_external_data=True, location=GRAPH_DATA, size_threshold=1024)
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in (GRAPH, GRAPH_DATA):
        entry = describe(folder / name)
        manifest["files"][name] = {"sha256": entry.sha256, "size": entry.size}
    (folder / MANIFEST).write_text(json.dumps(manifest))
