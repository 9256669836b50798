"""Make small policies with random weights of LeRobot's own classes, and observations for them.

LeRobot's code holds the sizes of its π, so its functions that return them are patched while a policy is made. The
tokenizers of π0-FAST are on the hub only; a stand-in has their place.
"""

import importlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

CAMERAS = ("top", "left", "right")
STATE, ACTION, CHUNK, WORDS = 6, 5, 4, 300
FRAME = (48, 64)
SIDE = {"pi0": 28, "pi05": 28, "pi0_fast": 224, "smolvla": 64}
KINDS = tuple(SIDE)
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
WIDTH = 32
CLASSES = {
    "pi0": ("PI0Config", "PI0Policy"),
    "pi05": ("PI05Config", "PI05Policy"),
    "pi0_fast": ("PI0FastConfig", "PI0FastPolicy"),
    "smolvla": ("SmolVLAConfig", "SmolVLAPolicy"),
}


class TokenizerStandIn:
    """Has the place of π0-FAST's two tokenizers, whose files are on the hub only."""

    bos_token_id, vocab_size = 2, WORDS

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> "TokenizerStandIn":
        return cls()

    def convert_tokens_to_ids(self, token: str) -> int:
        del token
        return WORDS - 1


def make_policy(
    kind: str, folder: Path, cameras: Sequence[str] = CAMERAS, vision: dict[str, Any] = VISION, **settings: Any
) -> Any:
    """Make a policy of a kind, with a tower of these sizes.

    ``folder`` gets the files of the model that it is built on, if it reads any.
    """
    torch.manual_seed(0)
    if kind == "smolvla":
        tower = {"image_size": SIDE[kind], "patch_size": 8} | vision
        side = tower["image_size"]
        settings = {
            "vlm_model_name": str(make_smolvlm(folder / "smolvlm", tower)),
            "num_vlm_layers": 2,
            "resize_imgs_with_padding": (side, side),
        } | settings
        return _policy_class(kind)(_config(kind, cameras, **settings)).eval()
    side = vision.get("image_size", SIDE[kind])
    settings = {"image_resolution": (side, side)} | settings
    with small_pi(kind, vision):
        return _policy_class(kind)(_config(kind, cameras, **settings)).eval()


def _module(kind: str, part: str) -> Any:
    return importlib.import_module(f"lerobot.policies.{kind}.{part}_{kind}")


def _policy_class(kind: str) -> Any:
    return getattr(_module(kind, "modeling"), CLASSES[kind][1])


def _config(kind: str, cameras: Sequence[str], **settings: Any) -> Any:
    from lerobot.configs.types import FeatureType, PolicyFeature

    inputs = {
        f"observation.images.{name}": PolicyFeature(type=FeatureType.VISUAL, shape=(3, *FRAME)) for name in cameras
    }
    inputs["observation.state"] = PolicyFeature(type=FeatureType.STATE, shape=(STATE,))
    outputs = {"action": PolicyFeature(type=FeatureType.ACTION, shape=(ACTION,))}
    return getattr(_module(kind, "configuration"), CLASSES[kind][0])(
        input_features=inputs, output_features=outputs, device="cpu", chunk_size=CHUNK, n_action_steps=CHUNK, **settings
    )


def small_pi(kind: str, vision: dict[str, Any] = VISION) -> ExitStack:
    """Patch the sizes in LeRobot's code: those of ``vision``, and small ones for the rest."""
    module = _module(kind, "modeling")
    model_class = module.PaliGemmaForConditionalGenerationWithPiGemma
    expert_class: Any = getattr(module, "PiGemmaForCausalLM", None)
    variants = module.get_gemma_config

    def small_model(config: Any) -> Any:
        for name, value in vision.items():
            setattr(config.vision_config, name, value)
        config.vision_config.projection_dim = WIDTH
        config.text_config.vocab_size = WORDS
        config.image_token_id = WORDS - 2
        return model_class(config=config)

    def small_expert(config: Any) -> Any:
        config.vocab_size = WORDS
        return expert_class(config=config)

    def small_variant(name: str) -> Any:
        variant = variants(name)
        variant.width, variant.depth, variant.mlp_dim = WIDTH, 2, 64
        variant.num_heads, variant.num_kv_heads, variant.head_dim = 2, 1, 16
        return variant

    patches = ExitStack()
    changes: dict[str, Any] = {
        "PaliGemmaForConditionalGenerationWithPiGemma": small_model,
        "get_gemma_config": small_variant,
    }
    if expert_class:
        changes["PiGemmaForCausalLM"] = small_expert
    if kind == "pi0_fast":
        changes |= {"AutoTokenizer": TokenizerStandIn, "AutoProcessor": TokenizerStandIn}
    for name, value in changes.items():
        patches.enter_context(patch.object(module, name, value))
    return patches


def make_smolvlm(folder: Path, vision: dict[str, Any]) -> Path:
    """Write the config and the processor of a small SmolVLM2, which SmolVLA reads by their folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        SmolVLMConfig,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    special = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    words = ["<unk>", "<pad>", "<s>", "</s>", *special.values(), *(f"w{index}" for index in range(WORDS))]
    model = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=special,
    )
    text = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(words), "pad_token_id": 1}
    side = vision["image_size"]
    settings: dict[str, Any] = {"vision_config": vision, "text_config": text}
    settings |= {"scale_factor": 4, "image_token_id": 4, "pad_token_id": 1}
    SmolVLMConfig(**settings).save_pretrained(folder)
    pictures = SmolVLMImageProcessor(size={"longest_edge": side}, max_image_size={"longest_edge": side})
    SmolVLMProcessor(
        image_processor=pictures, tokenizer=tokenizer, video_processor=SmolVLMVideoProcessor(), chat_template="{{ m }}"
    ).save_pretrained(folder)
    return folder


def observe(cameras: Sequence[str] = CAMERAS, number: int = 1) -> dict[str, Any]:
    """Make what LeRobot's processors hand to a policy, always the same: frames from 0 to 1 and tokens."""
    generator = torch.Generator().manual_seed(0)
    batch: dict[str, Any] = {
        f"observation.images.{name}": torch.rand(number, 3, *FRAME, generator=generator) for name in cameras
    }
    batch["observation.state"] = torch.rand(number, STATE, generator=generator)
    batch["observation.language.tokens"] = torch.randint(5, WORDS - 10, (number, 7), generator=generator)
    batch["observation.language.attention_mask"] = torch.ones(number, 7, dtype=torch.bool)
    return batch


@torch.no_grad()
def act(kind: str, policy: Any, batch: dict[str, Any]) -> Tensor:
    """Return a chunk of actions (B, CHUNK, ACTION) from the same noise every time; of π0-FAST the embedded prefix."""
    torch.manual_seed(1)
    if kind != "pi0_fast":
        actions: Tensor = policy.predict_action_chunk(batch)
        return actions
    # Its tokenizer, which turns tokens into actions, is on the hub only.
    tokens, masks = batch["observation.language.tokens"], batch["observation.language.attention_mask"]
    images, img_masks = policy._preprocess_images(batch)
    model: nn.Module = policy.model
    embedded, padded, *_ = model.embed_prefix_fast(images, img_masks, tokens, masks)
    prefix: Tensor = embedded * padded[..., None]  # what is masked is nobody's
    return prefix
