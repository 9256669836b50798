"""Small models in the place of timm's ViTs and of OpenVLA, with their names of tensors: timm needs torchvision.

`make test-lerobot` compares exports with timm itself, and `make clients OPENVLA=path` with OpenVLA's own model.
"""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

SIDE, PATCH, WIDE = 28, 14, 40
SIZES = {"tiny": (32, 2, 4), "little": (48, 4, 4)}
DINOV2, SIGLIP, CLIP = (
    "vit_tiny_patch14_reg4_dinov2.lvd142m",
    "vit_little_patch14_siglip_224",
    "vit_tiny_patch14_clip_224",
)
PAIR = (DINOV2, SIGLIP)


class TimmStandIn(nn.Module):
    """Computes what timm's `VisionTransformer` does for an architecture, with its names."""

    def __init__(self, architecture: str, side: int = SIDE) -> None:
        super().__init__()
        name = architecture.partition(".")[0]
        width, depth, heads = SIZES[name.split("_")[1]]
        dino, siglip, clip = (f"_{kind}" in name for kind in ("dinov2", "siglip", "clip"))
        registers = 4 if "reg4" in name else 0
        self.embed_dim, self.prefix = width, registers + (not siglip)
        self.patch_embed = PatchEmbed(width, side, bias=not clip)
        self.cls_token = None if siglip else nn.Parameter(torch.randn(1, 1, width))
        self.reg_token = nn.Parameter(torch.randn(1, registers, width)) if registers else None
        num_positions = (side // PATCH) ** 2 + (0 if registers or siglip else 1)
        self.pos_embed = nn.Parameter(torch.randn(1, num_positions, width))
        eps = 1e-5 if clip else 1e-6
        self.norm_pre = nn.LayerNorm(width, eps) if clip else nn.Identity()
        self.blocks: Any = nn.Sequential(*(Block(width, heads, eps, scaled=dino) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps)
        if siglip and "_gap" not in name:
            self.attn_pool = AttentionPool(width, heads, eps)

    def embed(self, pixel_values: Tensor) -> Tensor:
        tokens = self.patch_embed.proj(pixel_values).flatten(2).transpose(1, 2)
        prefix = [each.expand(len(tokens), -1, -1) for each in (self.cls_token, self.reg_token) if each is not None]
        if self.pos_embed.shape[1] == tokens.shape[1]:
            return self.norm_pre(torch.cat([*prefix, tokens + self.pos_embed], dim=1))
        return self.norm_pre(torch.cat([*prefix, tokens], dim=1) + self.pos_embed)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Return the patches of the second-last block, as Prismatic has timm do."""
        return (self.run(pixel_values, len(self.blocks) - 1)[:, self.prefix :],)

    def run(self, pixel_values: Tensor, depth: int) -> Tensor:
        tokens = self.embed(pixel_values)
        for block in self.blocks[:depth]:
            tokens = block(tokens)
        return tokens

    def pool(self, pixel_values: Tensor) -> Tensor:
        return self.attn_pool(self.norm(self.run(pixel_values, len(self.blocks))))


class PatchEmbed(nn.Module):
    def __init__(self, width: int, side: int, *, bias: bool) -> None:
        super().__init__()
        self.img_size, self.patch_size = (side, side), (PATCH, PATCH)
        self.proj = nn.Conv2d(3, width, PATCH, PATCH, bias=bias)


class Scale(nn.Module):
    """`LayerScale`, after Prismatic has renamed its weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, features: Tensor) -> Tensor:
        return features * self.scale_factor


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(features)))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        q, k, v = self.qkv(tokens).reshape(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).reshape(batch, count, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, eps: float, *, scaled: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps), nn.LayerNorm(width, eps)
        self.attn, self.mlp = Attention(width, heads), Mlp(width, 4 * width)
        self.ls1, self.ls2 = (Scale(width) if scaled else nn.Identity() for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.ls1(self.attn(self.norm1(tokens)))
        return tokens + self.ls2(self.mlp(self.norm2(tokens)))


class AttentionPool(nn.Module):
    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.latent, self.heads = nn.Parameter(torch.randn(1, 1, width)), heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.norm, self.mlp = nn.LayerNorm(width, eps), Mlp(width, 4 * width)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, count, width = tokens.shape
        q = self.q(self.latent.expand(batch, -1, -1)).reshape(batch, 1, self.heads, -1).transpose(1, 2)
        k, v = self.kv(tokens).reshape(batch, count, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        pooled = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, 1, width)
        pooled = self.proj(pooled)
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]


class PrismaticVisionBackbone(nn.Module):
    """OpenVLA's class of this name; trtower.install knows it by that."""

    def __init__(self, architectures: tuple[str, ...], side: int) -> None:
        super().__init__()
        self.use_fused_vision_backbone = len(architectures) == 2
        self.num_images_in_input = 1
        self.featurizer = TimmStandIn(architectures[0], side)
        self.embed_dim = self.featurizer.embed_dim
        if self.use_fused_vision_backbone:
            self.fused_featurizer = TimmStandIn(architectures[1], side)
            self.embed_dim += self.fused_featurizer.embed_dim

    def forward(self, pixel_values: Tensor) -> Tensor:
        if not self.use_fused_vision_backbone:
            return self.featurizer(pixel_values)[0]
        pictures = []
        for six in torch.split(pixel_values, [6] * self.num_images_in_input, dim=1):  # several only in OpenVLA-OFT
            image, fused = torch.split(six, [3, 3], dim=1)
            pictures.append(torch.cat([self.featurizer(image)[0], self.fused_featurizer(fused)[0]], dim=2))
        return torch.cat(pictures, dim=1)

    def set_num_images_in_input(self, number: int) -> None:
        self.num_images_in_input = number

    def get_num_patches(self) -> int:
        return (self.featurizer.patch_embed.img_size[0] // PATCH) ** 2


class PrismaticProjector(nn.Module):
    def __init__(self, width: int, out: int, *, fused: bool) -> None:
        super().__init__()
        widths = (width, 4 * width, out, out) if fused else (width, out, out)
        for number, sides in enumerate(pairwise(widths), start=1):
            setattr(self, f"fc{number}", nn.Linear(*sides))
        self.act_fn1, self.act_fn2 = nn.GELU(), nn.GELU()

    def forward(self, img_patches: Tensor) -> Tensor:
        features = self.fc2(self.act_fn1(self.fc1(img_patches)))
        return self.fc3(self.act_fn2(features)) if hasattr(self, "fc3") else features


class OpenVLAStandIn(nn.Module):
    """Has the modules of OpenVLA's model, and a linear layer in the place of its language model."""

    def __init__(self, architectures: tuple[str, ...] = PAIR, side: int = SIDE) -> None:
        super().__init__()
        fused = len(architectures) == 2
        self.config = SimpleNamespace(
            model_type="openvla",
            use_fused_vision_backbone=fused,
            image_sizes=[side] * len(architectures),
            timm_model_ids=list(architectures),
            timm_override_act_layers=[None] * len(architectures),
            text_config=SimpleNamespace(hidden_size=WIDE),
        )
        self.vision_backbone = PrismaticVisionBackbone(architectures, side)
        self.projector = PrismaticProjector(self.vision_backbone.embed_dim, WIDE, fused=fused)
        self.language_model = nn.Linear(WIDE, 7)

    def forward(self, *, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        del input_ids
        return self.language_model(self.projector(self.vision_backbone(pixel_values)))


def make_openvla(architectures: tuple[str, ...] = PAIR, side: int = SIDE) -> OpenVLAStandIn:
    torch.manual_seed(0)
    return OpenVLAStandIn(architectures, side).eval()


def write_openvla(folder: Path, model: OpenVLAStandIn, **changes: Any) -> Path:
    """Write a model as OpenVLA's `save_pretrained` does; ``changes`` are to its config.json, None leaves a key out."""
    folder.mkdir(parents=True, exist_ok=True)
    towers = len(model.config.timm_model_ids)
    config = {
        "architectures": ["OpenVLAForActionPrediction"],
        "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
        "image_resize_strategy": "resize-naive",
        "norm_stats": {"made_up": {"action": {"q01": [0.0] * 7, "q99": [1.0] * 7}}},
        **vars(model.config),
        "text_config": {"model_type": "llama", "hidden_size": WIDE, "vocab_size": 32064},
    } | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    prepares = {
        "image_processor_type": "PrismaticImageProcessor",
        "auto_map": {"AutoImageProcessor": "processing_prismatic.PrismaticImageProcessor"},
        "image_resize_strategy": config["image_resize_strategy"],
        "input_sizes": [[3, side, side] for side in model.config.image_sizes],
        "interpolations": ["bicubic"] * towers,
        "means": [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]][-towers:],
        "stds": [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]][-towers:],
        "use_fused_vision_backbone": towers == 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(prepares))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder
