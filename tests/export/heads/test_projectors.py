"""The projectors of transformers: cut towers with a head, and bundles, compute what the models' own code does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.export.heads.models import GEMMA, IMAGE_SIZE, IS_OLD, KINDS, NUM_PATCHES, TEXT_WIDTH, features, make, pixels
from trtower import VisionTower
from trtower.bundle.bundle import Bundle
from trtower.parity.verify import verify
from trtower.spec import BatchProfile
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.checkpoint.head import describe_tower
from trtower_export.graph.reference import UncutTower
from trtower_export.pipeline import ExportOptions, export_tower
from trtower_export.precision.doctor import simulate
from trtower_export.precision.quantisation import linear_layers

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH = (BatchProfile(min=1, opt=2, max=4),)
THROUGH_THE_GRAPH = 1e-5
"""Largest error of ONNX Runtime's FP32, relative to the largest feature."""

DIFFERENT_GRAPHS = ("gemma3", "aya_vision")
"""Kinds whose heads together have the operators of all."""


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name in KINDS:
        make(name).save_pretrained(root / name)
    return {name: root / name for name in KINDS}


def export(source: Path, out: Path | None, **options: Any) -> Bundle:
    defaults: dict[str, Any] = {
        "head": "projector",
        "precision": "fp32",
        "flavour": "none",
        "check": False,
        "profiles": BATCH,
    }
    return export_tower(str(source), out, ExportOptions(**defaults | options))


@pytest.fixture(scope="session")
def llava(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return export(models["llava"], tmp_path_factory.mktemp("bundles") / "llava")


def load(source: Path, **options: Any) -> UncutTower:
    checkpoint = open_checkpoint(str(source), random_weights=options.get("random_weights", False))
    return UncutTower.load(checkpoint, describe_tower(checkpoint, ExportOptions(head="projector", **options)))


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_cut_tower_and_reference_equal_the_model_bit_for_bit(name: str, models: dict[str, Path]) -> None:
    expected = features(make(name), name, pixels())
    uncut = load(models[name])
    assert torch.equal(uncut.cut()(pixels()), expected)
    assert torch.equal(uncut.read(uncut.states("drawn", pixels())), expected)


def test_bundle_returns_the_features_of_the_model(llava: Bundle) -> None:
    """For every other class, tests/runtime/installation/test_projected.py compares the engine with the model."""
    name, bundle = "llava", llava
    expected = features(make(name), name, pixels())
    tower = VisionTower.load(bundle.path, "onnxruntime-cpu")
    found = tower(pixels())
    assert isinstance(found, torch.Tensor)
    assert found.shape == (3, KINDS[name].tokens, TEXT_WIDTH)
    assert float((found - expected).abs().max() / expected.abs().max()) < THROUGH_THE_GRAPH
    assert (tower.hidden_size, tower.num_tokens, tower.num_patches) == (TEXT_WIDTH, KINDS[name].tokens, NUM_PATCHES)
    assert tower.dummy_feature.shape == (1, TEXT_WIDTH)
    assert bundle.manifest.output.name == "image_features"


@pytest.mark.parametrize("name", DIFFERENT_GRAPHS)
def test_half_precision_builds_a_plan_and_passes_check_and_verify(
    name: str, models: dict[str, Path], tmp_path: Path
) -> None:
    bundle = export(models[name], tmp_path / "b", precision="fp16", flavour="tensorrt-rtx", check=True)
    assert bundle.manifest.certificate
    assert bundle.manifest.certificate.passed
    assert bundle.manifest.plans
    assert verify(bundle, backend="onnxruntime-cpu").passed


def test_paligemma_divides_where_the_installed_transformers_does(models: dict[str, Path]) -> None:
    head = load(models["paligemma"]).spec.head
    assert head
    assert head.divisor == pytest.approx(GEMMA["hidden_size"] ** 0.5 if IS_OLD else 1.0)


def test_bytes_go_in_and_projected_features_come_out(models: dict[str, Path], llava: Bundle, tmp_path: Path) -> None:
    floats = VisionTower.load(llava.path, "onnxruntime-cpu")
    taken = export(models["llava"], tmp_path / "bytes", pixels="uint8", layout="nhwc")
    picture = torch.randint(256, (40, 90, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = VisionTower.load(taken.path, "onnxruntime-cpu").encode([picture])
    assert found.shape == (1, NUM_PATCHES, TEXT_WIDTH)
    torch.testing.assert_close(found, floats.encode([picture]), atol=1e-4, rtol=1e-4)


def test_operations_of_the_head_have_names_and_stay_out_of_8_bits(models: dict[str, Path]) -> None:
    uncut = load(models["llava"])
    cut = uncut.cut()
    names = simulate(cut, uncut.spec).operations.names
    assert [name for name in names if name.startswith("head.")] == [
        "head.projector.linear_1",
        "head.projector.act",
        "head.projector.linear_2",
    ]
    assert len(linear_layers(cut)) == 3 * 6  # q, k, v, out, fc1 and fc2 of three layers


def test_costs_count_the_projector_in_the_full_tower_and_in_the_cut(
    models: dict[str, Path], llava: Bundle, tmp_path: Path
) -> None:
    plain, projected = export(models["llava"], tmp_path / "plain", head="none").manifest, llava.manifest
    projector = make("llava").model.multi_modal_projector
    parameters = sum(parameter.numel() for parameter in projector.parameters())
    flop = 2 * NUM_PATCHES * (projector.linear_1.weight.numel() + projector.linear_2.weight.numel())
    for part in ("full", "cut"):
        before, after = getattr(plain, part), getattr(projected, part)
        assert (after.parameters - before.parameters, after.flop - before.flop) == (parameters, flop)
    assert projected.source.weights_sha256 == plain.source.weights_sha256
    assert set(projected.source.head_sha256) == set(projected.source.weights_sha256)
    assert not plain.source.head_sha256


@torch.no_grad()
def test_rehearsal_of_a_local_model_draws_the_same_projector_each_time(models: dict[str, Path]) -> None:
    """Gemma 3's matrix starts as zeros, with which nothing could be compared."""
    first, second = (load(models["gemma3"], random_weights=True) for _ in range(2))
    assert first.head_sha256() == second.head_sha256() != load(models["gemma3"]).head_sha256()
    assert first.cut()(pixels()).std() > 0


def test_default_name_says_what_the_bundle_ends_with(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert export(models["llava"], None, pixels="uint8").path == Path("engines/llava-projector-uint8")


def test_features_keep_the_form_of_their_images(llava: Bundle) -> None:
    tower = VisionTower.load(llava.path, "onnxruntime-cpu")
    images, out = pixels(), torch.empty(3, NUM_PATCHES, TEXT_WIDTH)
    features = tower(images, out)
    assert features.data_ptr() == out.data_ptr()
    assert torch.equal(torch.cat(tower([images[:2], images[2]])), out)
    tiles = images[:2].reshape(1, 2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert torch.equal(tower(tiles), out[None, :2])
