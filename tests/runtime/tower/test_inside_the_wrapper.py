"""Model code that reaches through a built tower: VILA builds and saves it, tinychat calls the model inside."""

import functools
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from tests.conftest import IMAGE_SIZE, Bundles
from tests.runtime.tower.test_vision_tower import FP32_TOLERANCE, PATCHES, WIDTH, images
from trtower import CLIPVisionTower, CLIPVisionTowerS2, VisionTower, build_vision_tower
from trtower.bundle.bundle import Bundle
from trtower.errors import BundleError, ConfigError, InputError
from trtower.tower.dicts import Size
from trtower.tower.image_processor import ImageProcessor
from trtower_export.checkpoint.checkpoint import open_checkpoint


def vila(**changes: Any) -> transformers.PretrainedConfig:
    settings: dict[str, Any] = {
        "vision_tower_cfg": {},
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch",
    }
    return transformers.PretrainedConfig(**{**settings, **changes})


def test_vila_passes_the_path_before_the_config(fp32_bundle: Path) -> None:
    config = vila()
    tower = build_vision_tower(str(fp32_bundle), config)
    assert type(tower) is CLIPVisionTower
    assert tower.is_loaded
    assert config.mm_hidden_size == WIDTH
    assert tower(images(1)).shape == (1, PATCHES + 1, WIDTH)


def test_vila_reads_two_scales_in_its_own_form(fp32_bundle: Path) -> None:
    config = vila(s2=True, s2_scales=f"{IMAGE_SIZE},{2 * IMAGE_SIZE}", s2_max_split_size=IMAGE_SIZE)
    assert type(build_vision_tower(str(fp32_bundle), config)) is CLIPVisionTowerS2
    assert config.mm_hidden_size == 2 * WIDTH


def test_vila_has_no_tower_if_it_passes_none() -> None:
    assert build_vision_tower(None, vila()) is None


def test_vila_reads_the_layer_before_the_last_by_default(fp32_bundle: Path) -> None:
    config = SimpleNamespace(vision_tower_cfg={}, mm_vision_select_feature=None)
    tower = build_vision_tower(str(fp32_bundle), config)
    assert tower is not None
    assert (tower.select_layer, tower.select_feature) == (-2, "patch")


def test_patch_is_refused_if_vila_would_drop_a_patch(bundles: Bundles) -> None:
    siglip = bundles("siglip")
    with pytest.raises(ConfigError, match=r"drops the first token in VILA; a siglip tower has 0 .*'cls_patch'"):
        CLIPVisionTower(siglip, vila(mm_vision_select_feature="patch"))
    assert CLIPVisionTower(siglip, vila())(images(1)).shape == (1, PATCHES, WIDTH)
    # LLaVA-NeXT uses the same code, but keeps every patch.
    next_config = SimpleNamespace(mm_vision_select_layer=-2, mm_vision_select_feature="patch")
    assert CLIPVisionTower(siglip, next_config)(images(1)).shape == (1, PATCHES, WIDTH)


def test_bundle_is_named_without_the_config(fp32_bundle: Path) -> None:
    config = SimpleNamespace(mm_vision_tower="openai/clip-vit-large-patch14-336", mm_vision_select_layer=-2)
    build = functools.partial(build_vision_tower, bundle=fp32_bundle)
    assert build(config, delay_load=True).vision_tower_name == str(fp32_bundle)
    assert config.mm_vision_tower == "openai/clip-vit-large-patch14-336"
    with pytest.raises(BundleError, match="openai/clip-vit-large-patch14-336"):
        build_vision_tower(config)


def test_trained_tower_that_the_bundle_was_not_exported_from_is_warned_about(
    fp32_bundle: Path, checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    def build(**settings: object) -> None:
        CLIPVisionTower(fp32_bundle, SimpleNamespace(mm_vision_select_layer=-2, **settings), delay_load=True)

    build(_name_or_path="acme/llava-7b")
    build(mm_tunable_parts="mm_vision_tower", _name_or_path=str(checkpoints["clip"]))
    assert not caplog.records
    build(mm_tunable_parts="mm_vision_tower,mm_mlp_adapter", _name_or_path="acme/llava-7b")
    assert "acme/llava-7b says that its tower was trained (mm_tunable_parts)" in caplog.text
    assert "trtower export acme/llava-7b" in caplog.text


def test_saved_tower_is_opened_again(fp32_bundle: Path, tmp_path: Path) -> None:
    """What `save_pretrained` of VILA's LlavaMetaModel does, line by line."""
    tower, config = build_vision_tower(str(fp32_bundle), vila()), vila()
    assert tower is not None
    folder = str(tmp_path / "vision_tower")
    tower.config._name_or_path = folder
    tower.vision_tower.save_pretrained(folder, state_dict={})
    tower.image_processor.save_pretrained(folder)
    config.vision_tower_cfg = tower.config
    tower.config.auto_map = {}
    if hasattr(config.vision_tower_cfg, "auto_map"):
        delattr(config.vision_tower_cfg, "auto_map")
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["vision_tower_cfg"]["hidden_size"] == WIDTH
    again = build_vision_tower(folder, vila(**{"vision_tower_cfg": saved["vision_tower_cfg"]}))
    assert again is not None
    assert torch.equal(again(images(2)), tower(images(2)))
    assert not Bundle.open(folder).altered()


def test_saving_over_a_bundle_replaces_it_and_over_anything_else_is_refused(
    fp32_bundle: Path, clip_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "vision_tower"
    inner = VisionTower.load(fp32_bundle).vision_tower
    VisionTower.load(clip_bundle).vision_tower.save_pretrained(folder)
    inner.save_pretrained(folder)
    assert Bundle.open(folder).manifest == Bundle.open(fp32_bundle).manifest
    VisionTower.load(folder).vision_tower.save_pretrained(folder)  # the bundle itself
    assert not Bundle.open(folder).altered()
    eager = tmp_path / "eager"
    eager.mkdir()
    (eager / "model.safetensors").touch()
    with pytest.raises(BundleError, match="exists and is not a bundle, so it was not touched"):
        inner.save_pretrained(eager)


def test_processor_of_a_bundle_is_kept_and_changes_are_named(
    fp32_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tower = VisionTower.load(fp32_bundle)
    tower.vision_tower.save_pretrained(tmp_path / "bundle")
    tower.image_processor.save_pretrained(tmp_path / "bundle")
    assert not caplog.records
    tower.image_processor.size = {"shortest_edge": 84}  # type: ignore[assignment] # it becomes a Size
    tower.image_processor.save_pretrained(tmp_path / "bundle")
    assert "belongs to a bundle and is kept; changes not saved: size." in caplog.text
    tower.image_processor.save_pretrained(tmp_path / "separate")
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path / "separate")
    assert dict(theirs.size) == {"shortest_edge": 84}
    assert ImageProcessor.from_file(tmp_path / "separate" / "preprocessor_config.json").size == {"shortest_edge": 84}


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_states_are_those_of_the_model_inside_llavas_wrapper(
    bundles: Bundles, checkpoints: dict[str, Path], family: str
) -> None:
    tower = CLIPVisionTower.load(bundles(family, [-2, -1]))
    inner, eager = tower.vision_tower, open_checkpoint(str(checkpoints[family])).load_model()
    assert isinstance(inner, type(eager))
    assert (inner.dtype, inner.device) == (next(inner.parameters()).dtype, tower.device)
    actual = inner(images(2).to(inner.dtype), output_hidden_states=True)
    with torch.no_grad():
        expected = eager(images(2), output_hidden_states=True)
    for layer in (-2, 3, -1):
        assert torch.allclose(actual.hidden_states[layer], expected.hidden_states[layer], atol=FP32_TOLERANCE)
    with pytest.raises(
        ConfigError, match=r"hidden state 1 of 4 layers was requested, .*export that state too: trtower export"
    ):
        actual.hidden_states[1]


def test_model_inside_refuses_unsupported_options(fp32_bundle: Path) -> None:
    inner = VisionTower.load(fp32_bundle).vision_tower
    with pytest.raises(ConfigError, match="output_attentions is not supported by a compiled tower"):
        inner(images(1), output_attentions=True)
    with pytest.raises(
        InputError, match=r"pixel_values has shape \(3, 42, 42\); this engine accepts a tensor \(B, 3, 42, 42\)"
    ):
        inner(images(1)[0])


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_size_can_be_read_in_every_way_that_llava_and_next_do(bundles: Bundles, family: str) -> None:
    processor = VisionTower.load(bundles(family)).image_processor
    size: Any = processor.size
    assert isinstance(size, dict)
    assert size["shortest_edge"] == size["height"] == size["width"] == size[0] == min(size) == IMAGE_SIZE
    assert processor.crop_size["height"] == IMAGE_SIZE
    expected = {"shortest_edge": IMAGE_SIZE} if family == "clip" else {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    assert json.loads(json.dumps(size)) == dict(size) == {**size} == expected
    with pytest.raises(KeyError, match="longest_edge"):
        size["longest_edge"]


def test_size_of_unequal_sides_keeps_them_apart() -> None:
    size: Any = Size(height=3, width=5)
    assert (size["shortest_edge"], size[0], size[1], size[-1], min(size), max(size), tuple(size)) == (
        3, 3, 5, 5, 3, 5, (3, 5),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _warnings_only(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)


def test_folder_with_files_beside_a_bundle_stays_unchanged(
    fp32_bundle: Path, clip_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "saved"
    VisionTower.load(clip_bundle).vision_tower.save_pretrained(folder)
    (folder / "README.md").write_text("mine")
    VisionTower.load(clip_bundle).vision_tower.save_pretrained(folder)  # the same graph: nothing to do
    with pytest.raises(BundleError, match=r"holds a bundle and README\.md"):
        VisionTower.load(fp32_bundle).vision_tower.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "mine"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(BundleError, match="is the current folder"):
        VisionTower.load(fp32_bundle).vision_tower.save_pretrained(".")
    assert Path.cwd() == tmp_path / "here"


def test_saved_bundle_that_was_altered_or_reads_other_tokens_is_replaced(
    bundles: Bundles, fp32_bundle: Path, tmp_path: Path
) -> None:
    other = bundles(select_feature="cls_patch")  # the same graph
    VisionTower.load(fp32_bundle).vision_tower.save_pretrained(tmp_path / "saved")
    VisionTower.load(other).vision_tower.save_pretrained(tmp_path / "saved")
    assert Bundle.open(tmp_path / "saved").manifest.spec.select_feature == "cls_patch"
    data = tmp_path / "saved" / "tower.onnx.data"
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(content)
    VisionTower.load(other).vision_tower.save_pretrained(tmp_path / "saved")
    assert not Bundle.open(tmp_path / "saved").altered()


def test_model_inside_a_tower_of_several_scales_accepts_single_tiles(fp32_bundle: Path) -> None:
    args = SimpleNamespace(mm_vision_select_layer=-2, s2=True, s2_scales=f"{IMAGE_SIZE},{2 * IMAGE_SIZE}")
    inner = CLIPVisionTowerS2(fp32_bundle, args).vision_tower
    assert inner(images(1)).hidden_states is None
    with pytest.raises(InputError, match=r"shape \(1, 3, 84, 84\); this engine accepts a tensor \(B, 3, 42, 42\)"):
        inner(torch.zeros(1, 3, 84, 84))
    with pytest.raises(ConfigError, match="attention_mask is not supported"):
        inner(images(1), attention_mask=torch.ones(2, 10))


def test_size_is_set_in_the_form_that_it_has() -> None:
    square, edge = Size(height=42, width=42), Size(shortest_edge=42)
    square["shortest_edge"] = 84
    assert square == {"height": 84, "width": 84}
    edge["height"] = 84
    assert edge == {"height": 84, "width": 42}
    with pytest.raises(KeyError):
        Size()["height"]


@pytest.mark.parametrize("config", [{"mm_vision_select_layer": -2, "mm_vision_tower": "a"}, "engines/a"], ids=type)
def test_config_that_is_a_dict_or_a_path_is_described(fp32_bundle: Path, config: object) -> None:
    with pytest.raises(
        ConfigError, match=r"the config (is a dict \(pass types\.SimpleNamespace.*\), so it|'engines/a') has neither"
    ):
        build_vision_tower(config)
    with pytest.raises(
        ConfigError, match=r"the config (is a dict .*, so it|'engines/a') has no mm_vision_select_layer"
    ):
        CLIPVisionTower(fp32_bundle, config)
