"""LeRobot's policies with other towers than SigLIP: EVO-1 with InternViT, and multi-task DiT with CLIP."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import trtower
from tests.policies.conftest import OPTIONS
from tests.policies.small import ACTION, CHUNK, FRAME, STATE
from trtower_export import export_tower
from trtower_export.checkpoint.checkpoint import open_checkpoint

pytest.importorskip("lerobot", reason="LeRobot has an environment of its own: make test-lerobot")

SIDE, TOKENS, CAMERAS = 56, 4, ("top", "left")
EXACT = 1e-5


def features(frame: tuple[int, int]) -> dict[str, Any]:
    from lerobot.configs.types import FeatureType, PolicyFeature

    inputs = {
        f"observation.images.{name}": PolicyFeature(type=FeatureType.VISUAL, shape=(3, *frame)) for name in CAMERAS
    }
    inputs["observation.state"] = PolicyFeature(type=FeatureType.STATE, shape=(STATE,))
    return {
        "input_features": inputs,
        "output_features": {"action": PolicyFeature(type=FeatureType.ACTION, shape=(ACTION,))},
        "device": "cpu",
    }


def write_tokenizer(folder: Path, *special: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<pad>", "<s>", "</s>", *special, *(f"w{index}" for index in range(20))]
    model = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_evo1(folder: Path) -> Any:
    """Make an EVO-1 on a small InternVL3, which it loads from a folder."""
    from lerobot.policies.evo1.configuration_evo1 import Evo1Config
    from lerobot.policies.evo1.modeling_evo1 import Evo1Policy

    tokenizer = write_tokenizer(folder / "internvl", "<IMG_CONTEXT>", "<img>", "</img>")
    vision: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    vision |= {"image_size": [SIDE, SIDE], "patch_size": [14, 14]}
    text = {"model_type": "qwen2", "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer) + 8}
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=text, image_seq_length=TOKENS, image_token_id=4, downsample_ratio=0.5
    )
    torch.manual_seed(0)
    transformers.InternVLForConditionalGeneration(config).save_pretrained(folder / "internvl")
    return Evo1Policy(
        Evo1Config(
            **features(FRAME),
            vlm_model_name=str(folder / "internvl"),
            image_resolution=(SIDE, SIDE),
            vlm_dtype="float32",
            vlm_num_layers=2,
            embed_dim=48,
            hidden_dim=32,
            state_hidden_dim=32,
            num_layers=2,
            num_heads=4,
            num_inference_timesteps=2,
            chunk_size=CHUNK,
            n_action_steps=CHUNK,
            use_flash_attn=False,
        )
    ).eval()


def make_dit(folder: Path, **settings: Any) -> Any:
    """Make a multi-task DiT on a small CLIP."""
    pytest.importorskip("diffusers", reason="multi-task DiT needs it")
    from lerobot.policies.multi_task_dit.configuration_multi_task_dit import MultiTaskDiTConfig
    from lerobot.policies.multi_task_dit.modeling_multi_task_dit import MultiTaskDiTPolicy

    part = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        vision_config=part | {"image_size": SIDE, "patch_size": 14}, text_config=part | {"vocab_size": 60}
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder / "clip")
    write_tokenizer(folder / "clip")
    return MultiTaskDiTPolicy(
        MultiTaskDiTConfig(
            **features((SIDE + 8, SIDE + 8)),
            vision_encoder_name=str(folder / "clip"),
            text_encoder_name=str(folder / "clip"),
            image_crop_shape=(SIDE, SIDE),
            hidden_dim=32,
            num_layers=2,
            num_heads=4,
            horizon=8,
            n_action_steps=4,
            **settings,
        )
    ).eval()


def observe(frame: tuple[int, int], cameras: tuple[str, ...] = CAMERAS) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, Any] = {
        f"observation.images.{name}": torch.rand(1, 3, *frame, generator=generator) for name in cameras
    }
    batch["observation.state"] = torch.rand(1, STATE, generator=generator)
    return batch | {"task": ["w3 w4 w5"]}


@torch.no_grad()
def act(policy: Any, batch: dict[str, Any]) -> Tensor:
    torch.manual_seed(1)
    actions: Tensor = policy.predict_action_chunk(batch)
    return actions


@pytest.mark.parametrize("head", ["none", "projector"])
def test_evo1_acts_as_before(tmp_path: Path, head: str) -> None:
    policy = make_evo1(tmp_path)
    policy.save_pretrained(tmp_path / "policy")
    checkpoint = open_checkpoint(str(tmp_path / "policy"))
    assert (
        checkpoint.describe() == "EVO-1 policy of LeRobot, internvl_vision tower at model.embedder.model.vision_tower"
    )
    assert checkpoint.profiles[0].max == 3  # EVO-1 always has so many views
    bundle = export_tower(str(tmp_path / "policy"), tmp_path / "bundle", replace(OPTIONS, head=head)).path
    batch = observe(FRAME)
    expected = act(policy, batch)
    calls: list[int] = []
    with trtower.install(policy, bundle, backend="onnxruntime-cpu") as installation:
        installation.tower.on_batch = lambda report: calls.append(report.batch)
        found = act(policy, batch)
    assert calls == [2]  # not the third view, which is masked
    assert (found - expected).norm() <= EXACT * expected.norm()
    assert torch.equal(act(policy, batch), expected)


def test_pictures_are_prepared_as_by_evo1(tmp_path: Path) -> None:
    from lerobot.policies.evo1.internvl3_embedder import IMAGENET_MEAN, IMAGENET_STD, _batched_pixel_values

    policy = make_evo1(tmp_path)
    policy.save_pretrained(tmp_path / "policy")
    bundle = export_tower(str(tmp_path / "policy"), tmp_path / "bundle", OPTIONS).path
    frame = torch.randint(0, 256, (3, *FRAME), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    colours = (torch.tensor(each) for each in (IMAGENET_MEAN, IMAGENET_STD))
    expected = _batched_pixel_values([frame[None] / 255], 1, SIDE, *colours, torch.float32, "cpu")
    prepare = trtower.VisionTower.load(bundle, backend="onnxruntime-cpu").image_processor
    found = prepare(frame, return_tensors="pt")["pixel_values"]
    # EVO-1 rounds fractions down to bytes, and torchvision's kernel is not Pillow's: most pixels are off by one.
    assert (found - expected).abs().mean() <= 1.5 / 255 / min(IMAGENET_STD)


@pytest.mark.parametrize("separate", [False, True])
def test_multi_task_dit_acts_as_before(tmp_path: Path, separate: bool) -> None:
    policy = make_dit(tmp_path, use_separate_rgb_encoder_per_camera=separate)
    policy.save_pretrained(tmp_path / "policy")
    towers = ["observation_encoder.vision_encoders.0.model"] if separate else [None]
    encoder = policy.observation_encoder
    held = encoder.vision_encoders[0] if separate else encoder.vision_encoder
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = held(pixels)
    for tower in towers:
        checkpoint = open_checkpoint(str(tmp_path / "policy"), tower=tower)
        assert checkpoint.describe().startswith("multi-task DiT policy of LeRobot, clip tower at observation_encoder.")
        bundle = export_tower(str(tmp_path / "policy"), tmp_path / "bundle", replace(OPTIONS, tower=tower)).path
        with trtower.install(policy, bundle, backend="onnxruntime-cpu", tower=tower):
            found = held(pixels)
        assert (found - expected).abs().max() <= EXACT * expected.abs().max()
