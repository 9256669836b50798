"""Bundles with a head: what a tower says of itself, and where model code would treat its features wrongly."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.export.heads.models import IMAGE_SIZE, NUM_PATCHES, TEXT_WIDTH, make, pixels
from trtower import CLIPVisionTower, CLIPVisionTowerS2, VisionTower
from trtower.bundle.bundle import Bundle
from trtower.bundle.suggest import export_command, export_command_of
from trtower.errors import ConfigError
from trtower.head import HeadSpec
from trtower.inspection import as_text, inspect_bundle
from trtower.parity.golden import Golden
from trtower.spec import BatchProfile, TowerSpec
from trtower_export.check.report.report import Report
from trtower_export.pipeline import ExportOptions, export_tower

pytestmark = pytest.mark.usefixtures("one_thread")

PROJECTOR = HeadSpec(kind="projector", name="mlp2x_gelu", width=48, tokens=16, attribute="mm_projector")
EMBEDDING = HeadSpec(kind="embedding", name="CLS token", width=32, pool="cls")


def spec(**changes: Any) -> TowerSpec:
    shape = {"image_size": 56, "patch_size": 14, "num_layers": 4, "num_prefix_tokens": 1, "width": 32, "layers": (3,)}
    return TowerSpec(**{"family": "clip", **shape, **changes})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("projected")
    make("llava").save_pretrained(root / "llava")
    profiles = (BatchProfile(min=1, opt=2, max=2),)
    options = ExportOptions(head="projector", precision="fp32", flavour="none", check=False, profiles=profiles)
    return export_tower(str(root / "llava"), root / "bundle", options).path


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("embedding")
    make("llava_onevision").model.vision_tower.save_pretrained(root / "siglip")
    options = ExportOptions(head="embedding", normalize=True, flavour="none", check=False, keep_fp32=("head.pool",))
    return export_tower(str(root / "siglip"), root / "bundle", options).path


def test_output_is_that_of_the_head() -> None:
    assert spec().output("fp16").shape == ("batch", 17, 32)
    projected = spec(head=PROJECTOR).output("fp16")
    assert (projected.name, projected.shape, projected.vectors) == ("image_features", ("batch", 16, 48), (16, 48))
    whole = spec(layers=(5,), select_feature="cls_patch", head=EMBEDDING)
    embedded = whole.output("fp16")
    assert (embedded.name, embedded.shape, embedded.vectors) == ("image_embeds", ("batch", 32), (1, 32))
    assert whole.reads("vision_model.post_layernorm.weight")
    assert whole.reads("vision_model.head.probe")
    assert not whole.reads("embeddings.mask_token")
    assert not spec().reads("vision_model.head.probe")


@pytest.mark.parametrize(("changes", "message"), [
    ({"kind": "head"}, "unknown head 'head'"),
    ({"tokens": None}, "a head of kind projector cannot have width=48 and tokens=None"),
    ({"tokens": 0}, "a head of kind projector cannot have width=48 and tokens=0"),
    ({"kind": "embedding"}, "a head of kind embedding cannot have width=48 and tokens=16"),
    ({"width": 0}, "a head of kind projector cannot have width=0 and tokens=16"),
    ({"normalised": True}, "a projector is neither normalised nor pooled"),
    ({"pool": "cls"}, "a projector is neither normalised nor pooled"),
    ({"divisor": 0.0}, "divisor=0.0; expected a number above 0"),
])  # fmt: skip
def test_heads_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(PROJECTOR, **changes)


def test_embedding_of_another_layer_cannot_be() -> None:
    with pytest.raises(ConfigError, match="an embedding is made of every token of `last_hidden_state`"):
        spec(head=EMBEDDING)


@pytest.mark.parametrize(("tokens", "grid"), [(16, (0, 4)), (17, (1, 4)), (4, (0, 2)), (15, None)])
def test_grid_of_projected_tokens(tokens: int, grid: tuple[int, int] | None) -> None:
    assert spec(head=replace(PROJECTOR, tokens=tokens)).grid == grid
    assert spec().grid == (1, 4)


def test_layers_and_tokens_cannot_be_chosen_any_more(bundle: Path) -> None:
    tower = VisionTower.load(bundle)
    assert (tower.select_layer, tower.select_feature) == (3, "patch")
    tower.select(-2, "patch")  # what its head reads
    for layer, feature in ((-1, "patch"), (-2, "cls_patch"), ([-2, -3], "patch")):
        with pytest.raises(
            ConfigError, match=r"differs from hidden state 3 of 4 layers, patch tokens, which the projector"
        ):
            tower.select(layer, feature)
    with pytest.raises(ConfigError, match=r"cannot select among those of another tower: call the tower itself"):
        tower.feature_select(SimpleNamespace(hidden_states=[torch.zeros(1, 17, 32)] * 5))
    assert torch.equal(tower.feature_select(tower(pixels())), tower(pixels()))


def test_code_of_llava_would_project_twice(bundle: Path) -> None:
    twice = r"ends with the projector .*, but LLaVA's and VILA's code projects .*, or use trtower\.VisionTower"
    config = SimpleNamespace(mm_vision_select_layer=-2)
    several = SimpleNamespace(mm_vision_select_layer=-2, s2=True, s2_scales=f"{IMAGE_SIZE},{2 * IMAGE_SIZE}")
    for tower, args in ((CLIPVisionTower, config), (CLIPVisionTowerS2, several)):
        with pytest.raises(ConfigError, match=twice):
            tower(bundle, args, delay_load=True)
    with pytest.raises(ConfigError, match=twice):
        CLIPVisionTower.load(bundle)
    alone = VisionTower.load(bundle)
    assert (alone.hidden_size, alone.num_patches) == (TEXT_WIDTH, NUM_PATCHES)


def test_hidden_states_are_absent(bundle: Path) -> None:
    tower = VisionTower.load(bundle)
    output = tower.vision_tower(pixels(), output_hidden_states=True)
    with pytest.raises(
        ConfigError, match=r"hidden state 3 of 4 layers was requested, but the bundle .* output of its proj"
    ):
        output.hidden_states[3]


def test_commands_that_are_suggested_keep_or_drop_the_head(bundle: Path, embedding: Path, tmp_path: Path) -> None:
    again = export_command_of("other", Bundle.open(bundle))
    assert "--head projector --precision fp32" in again
    named = Bundle.open(shutil.copytree(bundle, tmp_path / "small-projector"))
    assert "--head" not in export_command(named, -1, IMAGE_SIZE)
    assert export_command(named, -1, IMAGE_SIZE).endswith(f"--out {tmp_path / 'small'}-layer-1")
    command = export_command_of("other", Bundle.open(embedding))
    assert "--head embedding --normalize" in command
    assert "--keep-fp32 head.pool.attention.q_proj," in command
    assert "--keep-fp32" not in export_command(Bundle.open(embedding), -1, IMAGE_SIZE)


def test_inspection_says_what_comes_out(bundle: Path, embedding: Path) -> None:
    found = inspect_bundle(Bundle.open(bundle))
    assert (found.hidden_size, found.num_tokens, found.num_patches) == (TEXT_WIDTH, 16, 16)
    assert "  features     projector LlavaMultiModalProjector, 16 tokens of 48\n" in as_text(found)
    text = as_text(inspect_bundle(Bundle.open(embedding)))
    assert "  features     embedding by attention pooling, a vector of 32, of length 1\n" in text


def test_golden_answers_of_an_embedding_are_one_vector_each(embedding: Path) -> None:
    golden = Golden.read(Bundle.open(embedding))
    assert golden.tokens.tolist() == [0]
    assert golden.answers.shape[1:] == (1, 32)
    torch.testing.assert_close(golden.answers.norm(dim=-1), torch.ones(golden.answers.shape[:2]))


def test_report_needs_a_grid_of_tokens(embedding: Path) -> None:
    bundle = Bundle.open(embedding)
    with pytest.raises(ConfigError, match=r"--report draws a grid of tokens, but this bundle returns the embedding by"):
        Report(bundle.manifest.spec, SimpleNamespace())  # type: ignore[arg-type]
