"""timm's ViTs: the sizes in trtower's table, and exports beside timm's own models.

The environment of the policies has them, because timm needs torchvision; transformers prepares pictures otherwise where
that is, so the other tests have none.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig

from trtower import VisionTower
from trtower.timm_names import translate
from trtower_export import ExportOptions, export_tower
from trtower_export.check.photographs import draw_images
from trtower_export.checkpoint.timm import NAME, describe_timm
from trtower_export.families import family_of

timm = pytest.importorskip("timm")

ARCHITECTURES = [name for name in timm.list_models("vit_*") if NAME.fullmatch(name)]
ACTIVATIONS = {"gelu": "GELU", "gelu_pytorch_tanh": "GELUTanh", "quick_gelu": "QuickGELU", "silu": "SiLU"}
SMALL = {
    "vit_small_patch14_dinov2": 28,
    "vit_small_patch14_reg4_dinov2": 28,
    "vit_base_patch16_siglip_224": 32,
    "vit_base_patch32_clip_224": 64,
    "vit_base_patch32_clip_quickgelu_224": 64,
}
FP32 = ExportOptions(precision="fp32", flavour="none", check=False)
EXACT = 1e-5


def make(name: str, side: int) -> Any:
    """Make a model of timm with random weights, of which none is zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, img_size=side)
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1 or key.endswith(("token", "pos_embed", "latent")):
            nn.init.normal_(parameter, mean=float(key.endswith(("weight", "gamma"))), std=0.2)
    return model.eval()


def write(folder: Path, model: Any, name: str, side: int, **cfg: Any) -> Path:
    """Write a model as timm's `push_to_hf_hub` does."""
    folder.mkdir(parents=True)
    prepares = model.pretrained_cfg | {"input_size": [3, side, side], "tag": "made_up"} | cfg
    config = {"architecture": name, "num_classes": 0, "num_features": model.num_features, "pretrained_cfg": prepares}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_table_has_the_sizes_of_timm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linspace = torch.linspace
    # timm reads numbers from it, and they have none on the meta device.
    monkeypatch.setattr(torch, "linspace", lambda *numbers, **_: linspace(*numbers, device="cpu"))
    config = AutoConfig.for_model(**describe_timm(name))
    family = family_of(config.model_type)
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0, img_size=config.image_size)
        expected = [*family.vision_class(config).parameters()]
    found = translate(dict(model.named_parameters()), config.model_type).values()
    assert sum(each.numel() for each in found) == sum(each.numel() for each in expected)
    if not getattr(config, "use_swiglu_ffn", False):  # transformers 5.23 keeps a gate apart from what it gates
        assert sorted(tuple(each.shape) for each in found) == sorted(tuple(each.shape) for each in expected)
    assert model.blocks[0].attn.num_heads == config.num_attention_heads
    assert model.norm.eps == config.layer_norm_eps
    activation = "silu" if getattr(config, "use_swiglu_ffn", False) else config.hidden_act
    held = model.blocks[0].mlp.act
    tanh = getattr(held, "approximate", "none") == "tanh"
    assert ("GELUTanh" if tanh else type(held).__name__.replace("QuickGELUActivation", "QuickGELU")) == (
        ACTIVATIONS[activation]
    )


@pytest.mark.parametrize(("name", "side"), SMALL.items())
def test_hidden_state_is_that_of_timm(tmp_path: Path, name: str, side: int) -> None:
    model = make(name, side)
    write(tmp_path / "model", model, name, side)
    export_tower(str(tmp_path / "model"), tmp_path / "bundle", FP32)
    tower = VisionTower.load(tmp_path / "bundle", backend="onnxruntime-cpu")
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    (expected,) = model.get_intermediate_layers(pixels, n={len(model.blocks) - 2})
    assert (tower(pixels) - expected).abs().max() <= EXACT * expected.abs().max()


@pytest.mark.parametrize("crop", [{"crop_pct": 0.9}, {"crop_pct": 1.0, "crop_mode": "squash"}])
def test_pictures_are_prepared_as_by_timm(tmp_path: Path, crop: dict[str, Any]) -> None:
    name = "vit_small_patch14_dinov2"
    model = make(name, 56)
    write(tmp_path / "model", model, name, 56, **crop)
    export_tower(str(tmp_path / "model"), tmp_path / "bundle", FP32)
    prepare = VisionTower.load(tmp_path / "bundle", backend="onnxruntime-cpu").image_processor
    settings = model.pretrained_cfg | {"input_size": (3, 56, 56)} | crop
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=settings))
    for picture in [each.image for each in draw_images(100)]:
        found = prepare(picture, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(found, transform(picture.convert("RGB")))


def test_embedding_of_siglip_is_that_of_timm(tmp_path: Path) -> None:
    name, side = "vit_base_patch16_siglip_224", 32
    model = make(name, side)
    write(tmp_path / "model", model, name, side)
    export_tower(str(tmp_path / "model"), tmp_path / "bundle", ExportOptions(**vars(FP32) | {"head": "embedding"}))
    tower = VisionTower.load(tmp_path / "bundle", backend="onnxruntime-cpu")
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(pixels)
    assert (tower(pixels) - expected).abs().max() <= EXACT * expected.abs().max()
