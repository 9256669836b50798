"""OpenVLA and Prismatic: what is recognised in their files, and hidden states beside those of their own backbone.

The models are stand-ins with timm's names; `make clients OPENVLA=path` exports what OpenVLA's own code has saved.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.checkpoint.test_adapters import adapt
from tests.timm_stand_in import (
    CLIP,
    DINOV2,
    PAIR,
    SIDE,
    SIGLIP,
    SIZES,
    WIDE,
    make_openvla,
    write_openvla,
)
from trtower.errors import CheckpointError, ConfigError
from trtower.spec import BatchProfile
from trtower_export import ExportOptions, export_tower
from trtower_export.check.certify import check_bundle
from trtower_export.check.photographs import load_photographs
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.checkpoint.head import describe_tower, load_head
from trtower_export.console import LoggedProgress
from trtower_export.graph.reference import UncutTower
from trtower_export.recipes import read_recipe

pytestmark = pytest.mark.usefixtures("small_timm")

WIDTH = sum(SIZES[name][0] for name in ("tiny", "little"))
CLOSE = 1e-5
"""Relative, in FP32: attention sums in another order, and the first tower's pixels come from the second's."""

MEANS, STDS = ([0.485, 0.456, 0.406], [0.5] * 3), ([0.229, 0.224, 0.225], [0.5] * 3)
TOWERS = [PAIR, (DINOV2, CLIP), (DINOV2,), (SIGLIP,), (CLIP,), ("vit_tiny_patch14_dinov2",)]


def pixels_for(towers: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two pictures as the engine takes them, and as the model does."""
    pictures = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    normalised = [
        (pictures - torch.tensor(mean).reshape(3, 1, 1)) / torch.tensor(std).reshape(3, 1, 1)
        for mean, std in zip(MEANS, STDS, strict=True)
    ]
    return normalised[1], torch.cat(normalised, dim=1) if len(towers) == 2 else normalised[1]


@pytest.mark.parametrize("towers", TOWERS, ids="+".join)
@torch.no_grad()
def test_features_are_those_of_the_backbone_and_its_projector(tmp_path: Path, towers: tuple[str, ...]) -> None:
    model = make_openvla(towers)
    checkpoint = open_checkpoint(str(write_openvla(tmp_path, model)))
    pixels, given = pixels_for(towers)
    patches = model.vision_backbone(given)
    for head, expected in (("none", patches), ("projector", model.projector(patches))):
        spec = describe_tower(checkpoint, ExportOptions(head=head))
        uncut = UncutTower.load(checkpoint, spec)
        found = [uncut.cut()(pixels), uncut.expect("pictures", uncut.states("pictures", pixels))]
        for features in found:
            kept = features if spec.head else features[:, spec.num_prefix_tokens :]
            assert (kept - expected).abs().max() <= CLOSE * expected.abs().max()


def test_pair_is_one_tower_of_patches(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_openvla(tmp_path, make_openvla())))
    spec = describe_tower(checkpoint, ExportOptions(head="projector"))
    beside = "dinov2_with_registers beside siglip"
    assert checkpoint.describe() == f"OpenVLA policy, prismatic tower ({beside}) at vision_backbone"
    assert (spec.num_layers, spec.depth, spec.layers) == (4, 3, (3,))
    assert (spec.num_prefix_tokens, spec.num_patches, spec.width) == (0, 4, WIDTH)
    assert spec.head
    assert (spec.head.name, spec.head.tokens, spec.head.width) == ("PrismaticProjector", 4, WIDE)
    assert checkpoint.profiles == (BatchProfile(min=1, opt=1, max=1),)


@pytest.mark.parametrize("layer", [-1, -2, -4, "last_hidden_state"])
@torch.no_grad()
def test_every_state_of_a_pair_is_one_of_each_tower(tmp_path: Path, layer: int | str) -> None:
    model = make_openvla()
    checkpoint = open_checkpoint(str(write_openvla(tmp_path, model)))
    uncut = UncutTower.load(checkpoint, checkpoint.spec(layer))
    pixels, given = pixels_for(PAIR)
    expected = []
    for tower, half in zip(
        (model.vision_backbone.featurizer, model.vision_backbone.fused_featurizer), given.split(3, dim=1), strict=True
    ):
        depth = len(tower.blocks) + (0 if layer == "last_hidden_state" else 1 + int(layer))
        state = tower.run(half, max(depth, 0))
        expected.append((tower.norm(state) if layer == "last_hidden_state" else state)[:, tower.prefix :])
    wanted = torch.cat(expected, dim=-1)
    assert (uncut.cut()(pixels) - wanted).abs().max() <= CLOSE * wanted.abs().max()


@torch.no_grad()
def test_dead_blocks_of_each_tower_are_not_read(tmp_path: Path) -> None:
    model = make_openvla()
    path = write_openvla(tmp_path, model) / "model.safetensors"
    spec = open_checkpoint(str(tmp_path)).spec()
    before = UncutTower.load(open_checkpoint(str(tmp_path)), spec).weights_sha256()
    tensors = load_file(path)
    last = ("featurizer.blocks.1.", "fused_featurizer.blocks.3.", "fused_featurizer.attn_pool.")
    dead = tuple(f"vision_backbone.{each}" for each in last)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(dead)}
    assert len(kept) < len(tensors)
    save_file(kept, path)
    assert UncutTower.load(open_checkpoint(str(tmp_path)), spec).weights_sha256() == before
    needed = "vision_backbone.featurizer.blocks.0.attn.qkv.weight"
    save_file({name: tensor for name, tensor in kept.items() if name != needed}, path)
    with pytest.raises(CheckpointError, match=r"lacks 3 tensors of a PrismaticVisionModel, including featurizer\."):
        UncutTower.load(open_checkpoint(str(tmp_path)), spec)


def test_layer_scale_may_have_timms_own_name(tmp_path: Path) -> None:
    path = write_openvla(tmp_path, make_openvla()) / "model.safetensors"
    spec = open_checkpoint(str(tmp_path)).spec()
    before = UncutTower.load(open_checkpoint(str(tmp_path)), spec).weights_sha256()
    save_file({name.replace(".scale_factor", ".gamma"): each for name, each in load_file(path).items()}, path)
    assert UncutTower.load(open_checkpoint(str(tmp_path)), spec).weights_sha256() == before


def test_pixels_are_those_of_the_last_tower(tmp_path: Path) -> None:
    layout = open_checkpoint(str(write_openvla(tmp_path, make_openvla()))).layout
    assert layout.preprocessor
    assert (layout.preprocessor["image_mean"], layout.preprocessor["resample"]) == ([0.5] * 3, 3)
    assert layout.config.image_means == (MEANS[0], MEANS[1])
    assert layout.image_aspect_ratio is None
    (tmp_path / "preprocessor_config.json").unlink()
    again = open_checkpoint(str(tmp_path)).layout
    assert (again.preprocessor, again.config.image_means) == (layout.preprocessor, layout.config.image_means)


@pytest.mark.parametrize(("strategy", "expected"), [("letterbox", "pad"), ("resize-naive", None)])
def test_letterbox_of_the_processor_is_left_to_the_model(tmp_path: Path, strategy: str, expected: str | None) -> None:
    folder = write_openvla(tmp_path, make_openvla(), image_resize_strategy="resize-crop")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_resize_strategy": strategy}))
    layout = open_checkpoint(str(folder)).layout
    assert layout.image_aspect_ratio == expected
    assert layout.preprocessor
    assert not layout.preprocessor["do_center_crop"]


def test_width_that_the_config_leaves_out_is_that_of_the_language_models_class(tmp_path: Path) -> None:
    folder = write_openvla(tmp_path, make_openvla(), text_config={"model_type": "llama", "vocab_size": 32064})
    checkpoint = open_checkpoint(str(folder), random_weights=True)
    head = describe_tower(checkpoint, ExportOptions(head="projector")).head
    assert head
    assert head.width == 4096


def test_rehearsal_draws_the_same_head_every_time(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_openvla(tmp_path, make_openvla())), random_weights=True)
    spec = describe_tower(checkpoint, ExportOptions(head="projector"))
    drawn = [load_head(checkpoint, checkpoint.load_model(spec), spec)[1] for _ in range(2)]
    assert all(torch.equal(*each) for each in zip(*drawn, strict=True))
    models = [checkpoint.load_model(spec).state_dict() for _ in range(2)]
    assert all(torch.equal(each, models[1][name]) for name, each in models[0].items())


def test_recipe_is_the_published_pair() -> None:
    recipe = read_recipe("openvla-7b")
    spec = open_checkpoint("openvla-7b", random_weights=True).spec()
    assert (recipe.checkpoint, spec.num_layers, spec.layers) == ("openvla/openvla-7b", 27, (26,))
    assert spec.naming.offsets == {"featurizer.": 3}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"timm_model_ids": [DINOV2, "eva02_base_patch14_224"]},
        r"timm's 'eva02_base_patch14_224' is none",
    ),
    "activation": ({"timm_override_act_layers": [None, "relu"]}, r"its activation 'relu' is none"),
    "one of two": ({"timm_model_ids": [DINOV2]}, r"use_fused_vision_backbone=True, but timm_model_ids names 1"),
    "said in words": ({"use_fused_vision_backbone": "false"}, r"use_fused_vision_backbone='false', but timm_model_ids"),
    "no names": ({"timm_model_ids": None}, r"could not be read: it has no 'timm_model_ids'"),
    "not fused": ({"use_fused_vision_backbone": False}, r"use_fused_vision_backbone=False, but timm_model_ids names 2"),
    "sizes": ({"image_sizes": [SIDE, 2 * SIDE]}, r"two towers see 28 pixels in patches of 14 and 56"),
    "strategy": ({"image_resize_strategy": "random"}, r"image_resize_strategy='random'; expected resize-naive"),
    "no size": ({"image_sizes": [0, 0]}, r"its images have 0 pixels a side; expected 1 to 8192"),
    "pairs of sizes": ({"image_sizes": [[28, 28], [28, 28]]}, r"its images have \[28, 28\] pixels a side"),
    "activations": ({"timm_override_act_layers": [[], None]}, r"its activation \[\] is none"),
    "null": ({"timm_model_ids": 5}, r"could not be read"),
    "no language model": ({"text_config": {}}, r"could not be read"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_other_config_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = write_openvla(tmp_path, make_openvla(), **changes)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("interpolations", ["bicubic", "bilinear"], r"has interpolations=\['bicubic', 'bilinear'\]"),
        ("input_sizes", [[3, SIDE, SIDE], [3, 30, 30]], r"input_sizes="),
        *(
            ("means", means, r"has means=.*; expected 3 numbers for each of 2 towers\.")
            for means in (
                [[0.5] * 3],
                [[0.5] * 3] * 3,
                [[0.5]] * 2,
                [[0.5] * 4] * 2,
                [[0.5] * 3, [0.5, float("nan"), 0]],
            )
        ),
        ("stds", [[0.5] * 3, [0.5, 0.5, 0.0]], r"expected 3 numbers for each of 2 towers, above 0"),
        ("means", 5, r"could not be read"),
        ("means", [["a"] * 3] * 2, r"could not be read"),
    ],
)
def test_other_preprocessing_is_refused_in_one_line(tmp_path: Path, name: str, value: Any, message: str) -> None:
    path = write_openvla(tmp_path, make_openvla()) / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(tmp_path))
    assert "\n" not in str(caught.value)


def without_towers(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file({name: each for name, each in load_file(path).items() if "vision" not in name}, path)


def with_adapter(folder: Path) -> None:
    adapt(folder, "vision_backbone.featurizer.blocks.0.attn.qkv.lora_A.weight")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without_towers, r"holds no weights of the towers of this OpenVLA policy"),
        (with_adapter, r"LoRA adapter: merge it"),
    ],
)
def test_checkpoint_without_its_towers_is_refused(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(write_openvla(tmp_path, make_openvla()))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("model_type", [["openvla"], {"a": 1}, 5])
def test_model_type_may_be_anything(tmp_path: Path, model_type: Any) -> None:
    folder = write_openvla(tmp_path, make_openvla(), model_type=model_type, auto_map=None)
    with pytest.raises(CheckpointError, match="belongs to no family"):
        open_checkpoint(str(folder))


def test_pair_has_no_embedding(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_openvla(tmp_path, make_openvla())))
    with pytest.raises((CheckpointError, ConfigError), match="prismatic_fused, has no pooled embedding"):
        describe_tower(checkpoint, ExportOptions(head="embedding"))


def test_check_measures_every_layer_of_both_towers(tmp_path: Path) -> None:
    write_openvla(tmp_path / "model", make_openvla())
    for head in ("none", "projector"):
        options = ExportOptions(head=head, flavour="none", check=False)
        bundle = export_tower(str(tmp_path / "model"), tmp_path / head, options)
        checkpoint = open_checkpoint(str(tmp_path / "model"))
        checked = check_bundle(bundle, checkpoint, load_photographs(None).first(1), LoggedProgress(), by_layer=True)
        certificate = checked.manifest.certificate
        assert certificate
        assert certificate.passed
        assert [each.layer for each in certificate.layers] == [0, 1, 2, 3]
        assert all(0 < (each.bundle.relative_error or 0) < 2e-3 for each in certificate.layers)
