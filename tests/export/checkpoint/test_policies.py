"""Towers of robot policies: what is recognised in the files that LeRobot, openpi and transformers write.

The folders here are written as those libraries write them; `make test-lerobot` exports what LeRobot itself has saved.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from tests.export.checkpoint.test_adapters import adapt
from trtower import VisionTower
from trtower.errors import CheckpointError
from trtower.layer_codes import LAST
from trtower_export import ExportOptions, export_tower
from trtower_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from trtower_export.checkpoint.head import describe_tower
from trtower_export.graph.reference import UncutTower
from trtower_export.heads import paligemma
from trtower_export.heads.base import transformers_class
from trtower_export.policies import gr00t, openpi
from trtower_export.recipes import read_recipe

WIDTH, SIDE, PROJECTED = 32, 28, 48
VISION: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
VISUAL = {"type": "VISUAL", "shape": [3, 480, 640]}
INPUTS = {
    "observation.images.top": VISUAL,
    "observation.images.wrist": VISUAL,
    "observation.state": {"type": "STATE", "shape": [6]},
}
LEROBOT: dict[str, Any] = {"n_obs_steps": 1, "input_features": INPUTS, "device": "cpu", "use_peft": False}
LEROBOT |= {"normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD"}, "empty_cameras": 0}
PI = LEROBOT | {"paligemma_variant": "gemma_2b", "image_resolution": [SIDE, SIDE]}
OPENPI = {"action_dim": 32, "action_horizon": 50, "paligemma_variant": "gemma_2b", "precision": "bfloat16"}
HEAD = ExportOptions(head="projector")


@pytest.fixture(autouse=True)
def small_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the recipe of π describe a small tower: the configs of policies do not say how large it is."""
    recipe = read_recipe("pi0_base")
    config, model = (
        recipe.config | VISION | {"image_size": SIDE},
        recipe.model | {"text_config": {"hidden_size": PROJECTED}},
    )
    monkeypatch.setattr(
        openpi, "read_recipe", lambda name: {"pi0_base": replace(recipe, config=config, model=model)}[name]
    )


class Eyes(nn.Module):
    """A tower and its projector, as PaliGemma has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = transformers.SiglipVisionConfig(
            **VISION, image_size=SIDE, patch_size=14, hidden_act="gelu_pytorch_tanh", vision_use_head=False
        )
        self.vision_tower = transformers.SiglipVisionModel(config)
        self.multi_modal_projector = nn.Module()
        self.multi_modal_projector.linear = nn.Linear(WIDTH, PROJECTED)
        self.eval().requires_grad_(requires_grad=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        features: Tensor = self.multi_modal_projector.linear(self.vision_tower(pixel_values).last_hidden_state)
        return features


def save_pi(folder: Path, config: dict[str, Any] | None, prefix: str = "model.", drop: str | None = None) -> Eyes:
    """Write a π as LeRobot does, or with another ``prefix`` as openpi does, and a tensor of its language model."""
    folder.mkdir(exist_ok=True)
    eyes = Eyes()
    of_paligemma = f"{prefix}paligemma_with_expert.paligemma.model."
    tensors = {f"{of_paligemma}{name}": tensor.clone() for name, tensor in eyes.state_dict().items()}
    tensors[f"{of_paligemma}language_model.layers.0.self_attn.q_proj.weight"] = torch.ones(4, 4)
    tensors = {name: tensor for name, tensor in tensors.items() if drop is None or drop not in name}
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return eyes


@pytest.mark.parametrize(
    ("config", "prefix", "kind", "padding", "cameras"),
    [
        (PI | {"type": "pi0"}, "model.", "π0 policy of LeRobot", "lerobot", 2),
        (PI | {"type": "pi05", "empty_cameras": 1}, "model.", "π0.5 policy of LeRobot", "lerobot", 3),
        (OPENPI, "", "π0 or π0.5 policy of openpi", "openpi", 3),
        (None, "", "π0 or π0.5 policy of openpi", "openpi", 3),
    ],
    ids=["pi0", "pi05", "openpi, converted", "openpi, trained in PyTorch"],
)
def test_pi_gives_the_features_of_its_own_modules(
    tmp_path: Path, config: Any, prefix: str, kind: str, padding: str, cameras: int
) -> None:
    eyes = save_pi(tmp_path / "policy", config, prefix)
    checkpoint = open_checkpoint(str(tmp_path / "policy"))
    assert checkpoint.layout.kind == kind
    assert [(each.min, each.opt, each.max) for each in checkpoint.profiles] == [(1, cameras, cameras)]
    options = replace(HEAD, precision="fp32", flavour="none", check=False)
    bundle = export_tower(str(tmp_path / "policy"), tmp_path / "bundle", options)
    spec = bundle.manifest.spec
    assert (spec.layers, spec.select_feature, spec.head and spec.head.divisor) == ((4,), "cls_patch", 1.0)
    tower = VisionTower.load(bundle.path, backend="onnxruntime-cpu")
    settings = tower.image_processor.to_dict()
    assert settings["resize_with_pad"] == padding
    assert settings["image_mean"] == settings["image_std"] == [0.5, 0.5, 0.5]
    pixel_values = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    torch.testing.assert_close(tower(pixel_values), eyes(pixel_values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [PI | {"type": "pi0"}, OPENPI], ids=["LeRobot", "openpi"])
def test_bytes_of_a_camera_give_the_features_of_its_floats(tmp_path: Path, config: dict[str, Any]) -> None:
    """The engine rescales and normalises bytes of S x S pixels exactly; resized frames are rounded to bytes before."""
    save_pi(tmp_path / "policy", config, "" if config is OPENPI else "model.")
    options = replace(HEAD, precision="fp32", flavour="none", check=False)
    floats = export_tower(str(tmp_path / "policy"), tmp_path / "floats", options)
    small = export_tower(str(tmp_path / "policy"), tmp_path / "bytes", replace(options, pixels="uint8"))
    prepared, raw = (VisionTower.load(each.path, backend="onnxruntime-cpu") for each in (floats, small))
    square, wide = (
        np.random.default_rng(0).integers(0, 256, shape, np.uint8) for shape in ((SIDE, SIDE, 3), (30, 41, 3))
    )
    torch.testing.assert_close(raw.encode(square), prepared.encode(square), rtol=1e-5, atol=1e-5)
    fractions = prepared.image_processor(wide, return_tensors="np", do_normalize=False)["pixel_values"]
    assert np.array_equal(raw.image_processor(wide, return_tensors="np")["pixel_values"], np.rint(fractions * 255))


def test_features_are_not_divided_whatever_transformers_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paligemma, "divides", lambda: True)
    save_pi(tmp_path, PI | {"type": "pi0"})
    spec = describe_tower(open_checkpoint(str(tmp_path)), HEAD)
    assert spec.head
    assert (spec.head.divisor, spec.head.tokens, spec.head.width) == (1.0, 4, PROJECTED)


def test_policy_reads_more_pixels_than_its_recipe(tmp_path: Path) -> None:
    save_pi(tmp_path, PI | {"type": "pi0", "image_resolution": [56, 56]})
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.spec().image_size == checkpoint.config.image_size == 56
    assert checkpoint.layout.preprocessor
    assert checkpoint.layout.preprocessor["size"] == {"height": 56, "width": 56}


def save_smolvla(folder: Path, **settings: Any) -> Path:
    """Write a SmolVLA as LeRobot does, and the folder with the model that its config names."""
    vision = VISION | {"image_size": 64, "patch_size": 8}
    text = {"model_type": "llama", "hidden_size": PROJECTED, "num_hidden_layers": 1, "num_attention_heads": 4}
    text |= {"intermediate_size": 64, "num_key_value_heads": 4, "vocab_size": 32, "pad_token_id": 0}
    config = transformers.SmolVLMConfig(vision_config=vision, text_config=text, scale_factor=4, image_token_id=7)
    config.save_pretrained(folder / "vlm")
    torch.manual_seed(0)
    model = transformers_class("smolvlm", "SmolVLMModel")(config)
    (folder / "policy").mkdir()
    tensors = {f"model.vlm_with_expert.vlm.model.{name}": each.clone() for name, each in model.state_dict().items()}
    save_file(tensors, folder / "policy" / "model.safetensors")
    raw = LEROBOT | {"type": "smolvla", "vlm_model_name": str(folder / "vlm"), "resize_imgs_with_padding": [64, 64]}
    (folder / "policy" / "config.json").write_text(json.dumps(raw | settings))
    return folder / "policy"


def says_towers_are_shifted() -> bool:
    """Whether this transformers gives Idefics3's patches other positions than in training, so that none is exported."""
    return int(transformers.__version__.partition(".")[0]) < 5


needs_right_positions = pytest.mark.skipif(says_towers_are_shifted(), reason="this transformers shifts positions")


@needs_right_positions
def test_smolvla_is_read_by_the_model_that_it_names(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_smolvla(tmp_path)))
    assert (checkpoint.layout.kind, checkpoint.layout.cameras) == ("SmolVLA policy of LeRobot", 2)
    spec = describe_tower(checkpoint, HEAD)
    assert spec.head
    assert (spec.family, spec.head.name, spec.head.tokens, spec.head.width) == (
        "smolvlm_vision",
        "SmolVLMConnector",
        4,
        48,
    )
    assert checkpoint.layout.preprocessor
    assert checkpoint.layout.preprocessor["resize_with_pad"] == "smolvla"
    assert any("embed_prefix" in remark and "still multiplies" in remark for remark in checkpoint.layout.remarks)


@needs_right_positions
def test_smolvla_may_read_fewer_pixels_than_its_model(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(save_smolvla(tmp_path, resize_imgs_with_padding=[32, 32])))
    assert (checkpoint.spec().image_size, checkpoint.config.image_size) == (32, 64)


def test_smolvla_names_a_model_that_cannot_be_found(tmp_path: Path) -> None:
    save_smolvla(tmp_path)
    (tmp_path / "vlm" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"names vlm_model_name '.*vlm'.*If it has moved, edit vlm_model_name"):
        open_checkpoint(str(tmp_path / "policy"))


@pytest.mark.skipif(not hasattr(transformers, "PI0Config"), reason="this transformers has no π0")
def test_pi0_of_transformers_is_read_by_the_config_inside_its_own(tmp_path: Path) -> None:
    checkpoint = save_transformers_pi0(tmp_path)
    spec = describe_tower(checkpoint, HEAD)
    assert spec.head
    assert (checkpoint.layout.kind, spec.layers, spec.head.width) == ("pi0 model", (4,), PROJECTED)
    assert checkpoint.layout.select_layer == LAST


def save_transformers_pi0(folder: Path) -> Checkpoint:
    text = {"model_type": "gemma", "hidden_size": PROJECTED, "intermediate_size": 64, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 12, "vocab_size": 120}
    vision = VISION | {"model_type": "siglip_vision_model", "image_size": SIDE, "patch_size": 14}
    vision |= {"projection_dim": PROJECTED, "vision_use_head": False}
    vlm = {"model_type": "paligemma", "vision_config": vision, "text_config": text, "projection_dim": PROJECTED}
    config = transformers.PI0Config(vlm_config=vlm | {"image_token_id": 119}, dit_config=text | {"hidden_size": 24})
    transformers.PI0ForConditionalGeneration(config).save_pretrained(folder)
    return open_checkpoint(str(folder))


GR00T = {"model_type": "gr00t_n1_5", "backbone_cfg": {"eagle_path": "NVEagle/eagle_er-qwen3_1_7B_1mlp_nops"}}
GROOT = LEROBOT | {"type": "groot", "base_model_path": "nvidia/GR00T-N1.5-3B"}


class EagleStandIn(nn.Module):
    """The part of Eagle between pixels and features, after `extract_feature` of `modeling_eagle2_5_vl.py`."""

    def __init__(self, *, shuffles: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = transformers.SiglipVisionConfig(**VISION, image_size=SIDE, patch_size=14)
        self.vision_model = transformers.SiglipVisionModel(config)
        self.shuffles = shuffles
        wide = 4 * WIDTH
        layers = [nn.LayerNorm(wide), nn.Linear(wide, PROJECTED), nn.GELU(), nn.Linear(PROJECTED, PROJECTED)]
        self.mlp1 = nn.Sequential(*(layers if shuffles else [nn.Linear(WIDTH, PROJECTED)]))
        self.eval().requires_grad_(requires_grad=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        states: Tensor = self.vision_model(pixel_values).last_hidden_state
        if self.shuffles:
            side = SIDE // 14
            rows = states.reshape(len(states), side, side // 2, 2 * WIDTH).permute(0, 2, 1, 3).contiguous()
            squares = rows.reshape(len(states), side // 2, side // 2, 4 * WIDTH).permute(0, 2, 1, 3)
            states = squares.reshape(len(states), -1, 4 * WIDTH)
        features: Tensor = self.mlp1(states)
        return features


@pytest.mark.parametrize("shuffles", [False, True], ids=["one layer", "pixel shuffle and two"])
@pytest.mark.parametrize(("raw", "prefix"), [(GR00T, ""), (GROOT, "_groot_model.")], ids=["NVIDIA", "LeRobot 0.4"])
def test_gr00t_gives_the_features_of_its_own_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: dict[str, Any], prefix: str, shuffles: bool
) -> None:
    recipe = read_recipe("GR00T-N1.5-3B")
    of_head: dict[str, Any] = {"text_config": {"hidden_size": PROJECTED}}
    of_head |= {"use_pixel_shuffle": True, "mlp_connector_layers": 2} if shuffles else {}
    small = replace(recipe, config=recipe.config | VISION | {"image_size": SIDE}, model=recipe.model | of_head)
    small = replace(small, preprocessor=recipe.preprocessor | {"size": {"height": SIDE, "width": SIDE}})
    monkeypatch.setattr(gr00t, "read_recipe", lambda name: {"GR00T-N1.5-3B": small}[name])
    eagle = EagleStandIn(shuffles=shuffles)
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text(json.dumps(raw))
    tensors = {f"{prefix}backbone.eagle_model.{name}": each.clone() for name, each in eagle.state_dict().items()}
    save_file(tensors, tmp_path / "policy" / "model.safetensors")
    options = replace(HEAD, precision="fp32", flavour="none", check=False)
    bundle = export_tower(str(tmp_path / "policy"), tmp_path / "bundle", options)
    tower, pixel_values = VisionTower.load(bundle.path, backend="onnxruntime-cpu"), torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    torch.testing.assert_close(tower(pixel_values), eagle(pixel_values), rtol=1e-4, atol=1e-5)


class Eagle3StandIn(nn.Module):
    """The part of Eagle 3 between pixels and features, after `extract_feature` of `modeling_eagle3_vl.py`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = transformers.Siglip2VisionConfig(**VISION, num_patches=9, patch_size=14, vision_use_head=False)
        self.vision_model = transformers.Siglip2VisionModel(config)
        wide = 4 * WIDTH
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(wide), nn.Linear(wide, PROJECTED), nn.GELU(), nn.Linear(PROJECTED, PROJECTED)
        )
        self.eval().requires_grad_(requires_grad=False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        batch, channels, size, _ = pixel_values.shape
        side = size // 14
        patches = pixel_values.reshape(batch, channels, side, 14, side, 14).permute(0, 2, 4, 3, 5, 1)
        states = self.vision_model(
            patches.reshape(batch, side * side, -1),
            pixel_attention_mask=torch.ones(batch, side * side, dtype=torch.int32),
            spatial_shapes=torch.full((batch, 2), side),
        ).last_hidden_state
        grid = states.transpose(1, 2).reshape(batch, WIDTH, side, side)
        features: Tensor = self.mlp1(functional.pixel_unshuffle(grid, 2).flatten(2).transpose(1, 2))
        return features


@pytest.mark.parametrize(
    ("frames", "side"),
    [
        ({"shortest_image_edge": 60}, 56),
        ({"shortest_image_edge": 60, "image_target_size": [80, 80]}, 56),
        ({"shortest_image_edge": None, "image_target_size": [80, 80]}, 84),
        ({"use_albumentations_transforms": False, "image_target_size": [80, 80]}, 84),
        ({}, 252),
    ],
)
def test_gr00t_n1_6_gives_the_features_of_its_own_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: dict[str, Any], side: int
) -> None:
    recipe = read_recipe("GR00T-N1.6-3B")
    of_head: dict[str, Any] = {"text_config": {"hidden_size": PROJECTED}}
    small = replace(recipe, config=recipe.config | VISION | {"num_patches": 9}, model=recipe.model | of_head)
    monkeypatch.setattr(gr00t, "read_recipe", lambda name: {"GR00T-N1.6-3B": small}[name])
    eagle = Eagle3StandIn()
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text(json.dumps({"model_type": "Gr00tN1d6"} | frames))
    tensors = {f"backbone.model.{name}": each.clone() for name, each in eagle.state_dict().items()}
    save_file(tensors, tmp_path / "policy" / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path / "policy"))
    spec = describe_tower(checkpoint, HEAD)
    assert (spec.image_size, spec.layers) == (side, (VISION["num_hidden_layers"] + 1,))
    assert any(f"come to its tower at {side};" in each for each in checkpoint.layout.remarks)
    pixel_values = torch.rand(2, 3, side, side) * 2 - 1
    found = UncutTower.load(checkpoint, spec).cut()(pixel_values)
    torch.testing.assert_close(found, eagle(pixel_values), rtol=1e-4, atol=1e-5)


def test_evo1_is_read_at_what_its_language_model_gets(tmp_path: Path) -> None:
    evo1 = LEROBOT | {"type": "evo1", "vlm_model_name": "OpenGVLab/InternVL3-1B-hf", "image_resolution": [448, 448]}
    (tmp_path / "config.json").write_text(json.dumps(evo1))
    checkpoint = open_checkpoint(str(tmp_path), random_weights=True)
    spec = describe_tower(checkpoint, HEAD)
    assert (spec.family, spec.layers, spec.image_size) == ("internvl_vision", (25,), 448)
    assert spec.head
    assert (spec.head.tokens, spec.head.width) == (256, 896)
    assert checkpoint.profiles[0].max == 3


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            {"type": "evo1", "vlm_model_name": "openai/clip-vit-base-patch16", "image_resolution": [224, 224]},
            r"vlm_model_name='openai/clip-vit-base-patch16' is a vision tower by itself; that of a EVO-1",
        ),
        (
            {
                "type": "multi_task_dit",
                "vision_encoder_name": "google/siglip-so400m-patch14-224",
                "image_crop_shape": [224, 224],
            },
            r"has a siglip tower; that of a multi-task DiT policy of LeRobot is one of clip",
        ),
    ],
)
def test_policy_on_another_kind_of_model_is_refused(tmp_path: Path, policy: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LEROBOT | policy))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(tmp_path), random_weights=True)


def test_multi_task_dit_is_read_at_its_class_token(tmp_path: Path) -> None:
    dit = LEROBOT | {"type": "multi_task_dit", "vision_encoder_name": "openai/clip-vit-base-patch16"}
    dit |= {"n_obs_steps": 2, "image_crop_shape": [224, 224], "image_resize_shape": [256, 256]}
    (tmp_path / "config.json").write_text(json.dumps(dit))
    checkpoint = open_checkpoint(str(tmp_path), random_weights=True)
    spec = checkpoint.spec()
    assert (spec.family, spec.layers, spec.select_feature) == ("clip", (13,), "cls_patch")
    assert checkpoint.profiles[0].max == 4  # two cameras, now and before
    prepares = checkpoint.layout.preprocessor
    assert prepares
    assert (prepares["size"], prepares["crop_size"]) == ({"height": 256, "width": 256}, {"height": 224, "width": 224})
    with pytest.raises(CheckpointError, match="has no projector"):
        describe_tower(checkpoint, HEAD)


def test_dataset_that_normalises_frames_is_remarked(tmp_path: Path) -> None:
    save_pi(tmp_path, PI | {"type": "pi0", "normalization_mapping": {"VISUAL": "MEAN_STD"}})
    (remark,) = open_checkpoint(str(tmp_path)).layout.remarks
    assert "normalises frames by MEAN_STD of its dataset before: encode does not" in remark


def change(**settings: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        merged = PI | {"type": "pi0"} | settings
        save_pi(folder, {name: value for name, value in merged.items() if value is not None})

    return write


def nvidias(model_type: str, **settings: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        config = {"model_type": model_type, "backbone_cfg": settings} | settings
        (folder / "config.json").write_text(json.dumps(config))

    return write


def without_tower(folder: Path) -> None:
    save_pi(folder, PI | {"type": "pi0"}, drop="vision_tower")


def without_projector(folder: Path) -> None:
    save_pi(folder, PI | {"type": "pi0"}, drop="multi_modal_projector")


def only_an_adapter(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(PI | {"type": "pi0", "use_peft": True}))
    adapt(folder, "model.paligemma_with_expert.x.lora_A.weight", base_model_name_or_path="lerobot/pi0_base")


def adapter_inside(folder: Path) -> None:
    save_pi(folder, PI | {"type": "pi0"})
    of_tower = "model.paligemma_with_expert.paligemma.model.vision_tower.encoder"
    adapt(folder, f"{of_tower}.layers.0.mlp.fc1.lora_A.weight")


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (change(type="act"), r"LeRobot's policy 'act', whose tower cannot be exported: .* ResNet"),
        (change(type="groot"), r"'groot', .*: its tower is that of GR00T N1\.7.* any shape"),
        (nvidias("Gr00tN1d7"), r"'Gr00tN1d7' belongs to no family .*: its 2-D RoPE accepts pictures of any shape"),
        (nvidias("Gr00tN1d6", model_name="x"), r"its Eagle model 'x' is none that trtower knows; .*Block2A-2B-v2"),
        *(
            (nvidias("Gr00tN1d6", shortest_image_edge=edge), r"its frames have no size that is known here \(shortest")
            for edge in ("x", 0, -300, True, 256.9, 10**7)
        ),
        (
            nvidias("Gr00tN1d6", shortest_image_edge=None, image_target_size=[256, 448]),
            r"known here \(shortest_image_edge=None, image_target_size=\[256, 448\]\)",
        ),
        *(
            (change(type="evo1", vlm_model_name="x", max_views=views), r"its max_views is .*; expected a number from 1")
            for views in (0, -1, "3")
        ),
        (nvidias("gr00t_n1"), r"'gr00t_n1' .*differs from those of GR00T N1\.5 and N1\.6"),
        (nvidias("gr00t_n1_5", eagle_path="eagle_x"), r"its Eagle model 'eagle_x' is none that trtower knows"),
        (change(type="xvla"), "'xvla', .* DaViT"),
        (
            change(type="pi9"),
            r"'pi9', .*: it is none that trtower knows; it knows the policies of LeRobot 0\.4 to 0\.6",
        ),
        (change(image_resolution=None), r"no image_resolution, as that of LeRobot before 0\.4.* save it again"),
        (change(image_resolution=[224, 448]), r"image_resolution is \[224, 448\]; expected the side of a square"),
        (change(type="pi0_fast", image_resolution=[448, 448]), "π0-FAST builds its tower for 224 pixels"),
        (change(paligemma_variant="gemma_2b_lora"), "gemma_2b_lora, so it holds LoRA adapters; merge them"),
        (change(type="evo1", image_resolution=[448, 224]), r"image_resolution is \[448, 224\]; expected the side of a"),
        (change(type="evo1"), "its config.json has no vlm_model_name, the model that its tower comes from"),
        (change(type="multi_task_dit"), "image_crop_shape is None and its image_resize_shape None, so its tower"),
        (change(type="multi_task_dit", image_crop_shape=[56, 48]), r"image_crop_shape is \[56, 48\]"),
        (change(type="multi_task_dit", image_crop_shape=[56, 56]), "its config.json has no vision_encoder_name"),
        (change(input_features=[1]), "could not be read as that of a π0 policy of LeRobot: 'list' object"),
        (change(empty_cameras="two"), "could not be read as that of a π0 policy of LeRobot"),
        (change(normalization_mapping=["VISUAL"]), "could not be read as that of a π0 policy of LeRobot"),
        (change(type="smolvla"), "has no vlm_model_name, the model that its tower comes from"),
        (change(type="smolvla", vlm_model_name="x", resize_imgs_with_padding=None), "not squares of one size"),
        (without_tower, "holds no weights of the siglip tower of a π0 policy of LeRobot"),
        (without_projector, "holds no multi_modal_projector, the weights of the PaliGemmaMultiModalProjector"),
        (only_an_adapter, r"is a LoRA adapter: merge it into lerobot/pi0_base with merge_and_unload\(\)"),
        (adapter_inside, r"adapter_config\.json belongs to a LoRA adapter: merge it"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    tmp_path: Path, write: Callable[[Path], None], problem: str
) -> None:
    write(tmp_path)
    with pytest.raises(CheckpointError, match=problem) as refused:
        describe_tower(open_checkpoint(str(tmp_path)), HEAD)
    assert "\n" not in str(refused.value)
