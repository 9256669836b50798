"""timm's ViTs in its repositories, in transformers' wrapper, and as the trunk of an OpenCLIP model.

The models are stand-ins with timm's names; tests/policies/test_timm.py exports those of timm itself.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.timm_stand_in import (
    CLIP,
    DINOV2,
    SIDE,
    SIGLIP,
    TimmStandIn,
)
from trtower.errors import CheckpointError
from trtower_export import ExportOptions
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.checkpoint.head import describe_tower
from trtower_export.checkpoint.timm import describe_timm
from trtower_export.graph.reference import UncutTower

pytestmark = pytest.mark.usefixtures("small_timm")

CLOSE = 1e-5
PREPARES = {
    "input_size": [3, SIDE, SIDE],
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}
OPEN_CLIP = {"image_size": SIDE, "timm_model_name": SIGLIP, "timm_pool": "map", "timm_proj": "none"}


def make(architecture: str) -> TimmStandIn:
    torch.manual_seed(0)
    return TimmStandIn(architecture).eval()


def write(folder: Path, model: TimmStandIn, config: dict[str, Any], begin: str = "", file: str = "config") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{file}.json").write_text(json.dumps(config))
    weights = "open_clip_model" if begin == "visual.trunk." else "model"
    save_file({f"{begin}{name}": each for name, each in model.state_dict().items()}, folder / f"{weights}.safetensors")
    return folder


def write_timm(folder: Path, architecture: str, wrapped: bool = False, **changes: Any) -> Path:
    config = {"architecture": architecture, "num_classes": 0, "pretrained_cfg": PREPARES} | changes
    if wrapped:
        config |= {"model_type": "timm_wrapper", "architectures": ["TimmWrapperModel"]}
    return write(folder, make(architecture), config, "timm_model." if wrapped else "")


def write_open_clip(folder: Path, architecture: str, **vision: Any) -> Path:
    config = {"model_cfg": {"embed_dim": 48, "vision_cfg": OPEN_CLIP | {"timm_model_name": architecture} | vision}}
    return write(folder, make(architecture), config, "visual.trunk.", "open_clip_config")


def images() -> torch.Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", [DINOV2, SIGLIP, CLIP, "vit_tiny_patch14_dinov2"])
@pytest.mark.parametrize("kind", ["timm", "wrapper", "open_clip"])
@torch.no_grad()
def test_hidden_state_is_that_of_timm(tmp_path: Path, kind: str, architecture: str) -> None:
    if kind == "open_clip":
        folder = write_open_clip(tmp_path, architecture)
    else:
        folder = write_timm(tmp_path, architecture, wrapped=kind == "wrapper")
    checkpoint = open_checkpoint(str(folder))
    model = make(architecture)
    for layer, depth in ((-2, -1), (-1, None)):
        spec = checkpoint.spec(layer)
        uncut = UncutTower.load(checkpoint, spec)
        expected = model.run(images(), len(model.blocks[:depth]))
        assert (uncut.cut()(images()) - expected).abs().max() <= CLOSE * expected.abs().max()


@pytest.mark.parametrize("kind", ["timm", "open_clip"])
@torch.no_grad()
def test_pooled_vector_of_siglip_is_that_of_timm(tmp_path: Path, kind: str) -> None:
    folder = write_open_clip(tmp_path, SIGLIP) if kind == "open_clip" else write_timm(tmp_path, SIGLIP)
    checkpoint = open_checkpoint(str(folder))
    spec = describe_tower(checkpoint, ExportOptions(head="embedding"))
    expected = make(SIGLIP).pool(images())
    assert (UncutTower.load(checkpoint, spec).cut()(images()) - expected).abs().max() <= CLOSE * expected.abs().max()


@pytest.mark.parametrize("vision", [{"timm_pool": "avg"}, {"timm_proj": "linear"}, {"timm_proj": "mlp"}])
def test_other_pooling_in_open_clip_has_no_embedding(tmp_path: Path, vision: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(str(write_open_clip(tmp_path, SIGLIP, **vision)))
    with pytest.raises(CheckpointError, match="pool otherwise than SigLIP does; without --head its hidden states"):
        describe_tower(checkpoint, ExportOptions(head="embedding"))


@pytest.mark.parametrize(("architecture", "pool"), [(SIGLIP, "avg"), (DINOV2, "map"), (DINOV2, ""), (CLIP, "token")])
def test_other_pooling_in_timm_has_no_embedding(tmp_path: Path, architecture: str, pool: str) -> None:
    checkpoint = open_checkpoint(str(write_timm(tmp_path, architecture, global_pool=pool)))
    with pytest.raises(CheckpointError, match="pools otherwise than trtower does; without --head its hidden states"):
        describe_tower(checkpoint, ExportOptions(head="embedding"))


def test_pooling_of_a_trunk_that_is_not_siglip_is_another(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_open_clip(tmp_path, DINOV2)))
    with pytest.raises(CheckpointError, match="pool otherwise than SigLIP does"):
        describe_tower(checkpoint, ExportOptions(head="embedding"))


def test_setting_beside_a_trunk_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has fc_norm=True beside timm_model_name, which trtower does not know"):
        open_checkpoint(str(write_open_clip(tmp_path, SIGLIP, fc_norm=True)))


def test_file_of_open_clip_without_a_trunk_is_named(tmp_path: Path) -> None:
    write_open_clip(tmp_path, SIGLIP)
    save_file({"visual.conv1.weight": torch.ones(1)}, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no visual\.trunk\.patch_embed\.proj\.weight"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("cfg", "expected"),
    [
        ({}, {"size": {"shortest_edge": 31}, "resample": 3}),
        ({"crop_pct": 1.0, "interpolation": "bilinear"}, {"size": {"shortest_edge": SIDE}, "resample": 2}),
        ({"crop_mode": "squash"}, {"size": {"height": 31, "width": 31}}),
    ],
)
def test_pictures_are_prepared_as_timm_does(tmp_path: Path, cfg: dict[str, Any], expected: dict[str, Any]) -> None:
    folder = write_timm(tmp_path, DINOV2, pretrained_cfg=PREPARES | cfg)
    prepares = open_checkpoint(str(folder)).layout.preprocessor
    assert prepares
    assert {name: prepares[name] for name in expected} == expected
    assert (prepares["crop_size"], prepares["crop_like"]) == ({"height": SIDE, "width": SIDE}, "torchvision")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": (
        {"architecture": "convnext_base"},
        r"timm's 'convnext_base' is none that trtower exports; .*dinov2",
    ),
    "size": ({"architecture": "vit_enormous_patch14_dinov2"}, r"timm's 'vit_enormous_patch14_dinov2' is none"),
    "settings": ({"model_args": {"depth": 3}}, r"model_args=\{'depth': 3\} changes the architecture"),
    "no object": ({"model_args": 5}, r"model_args=5 changes the architecture"),
    "two sizes": ({"model_args": {"img_size": 42}}, r"model_args=\{'img_size': 42\}, but pretrained_cfg prepares"),
    "no settings": ({"pretrained_cfg": None}, r"pretrained_cfg=None; expected timm's settings"),
    "input": ({"pretrained_cfg": PREPARES | {"input_size": [3, 28, 42]}}, r"input_size=\[3, 28, 42\]; expected"),
    "filter": ({"pretrained_cfg": PREPARES | {"interpolation": "random"}}, r"interpolation='random'"),
    "share": ({"pretrained_cfg": PREPARES | {"crop_pct": 0}}, r"crop_pct=0 "),
    "text": ({"pretrained_cfg": PREPARES | {"crop_pct": "x"}}, r"could not be read"),
    "colours": ({"pretrained_cfg": {name: each for name, each in PREPARES.items() if name != "mean"}}, "could not be"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD.keys())
def test_other_config_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = write_timm(tmp_path, DINOV2)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(folder))
    assert "\n" not in str(caught.value)


def test_size_may_be_written_twice(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_timm(tmp_path, DINOV2, model_args={"img_size": SIDE})))
    assert checkpoint.spec().image_size == SIDE


def test_repository_without_the_tower_is_named(tmp_path: Path) -> None:
    save_file({"fc.weight": torch.ones(1)}, write_timm(tmp_path, DINOV2) / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no weights of a vit_tiny_patch14_reg4_dinov2\.lvd142m of timm"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("vit_so400m_patch14_siglip_384.webli", "gelu"),
        ("vit_so400m_patch16_siglip_256.v2_webli", "gelu_pytorch_tanh"),
        ("vit_large_patch16_siglip_512", "gelu_pytorch_tanh"),
        ("vit_large_patch16_siglip_384", "gelu"),
        ("vit_large_patch14_clip_quickgelu_224.openai", "quick_gelu"),
        ("vit_large_patch14_clip_224", "gelu"),
    ],
)
def test_activation_is_that_of_the_architecture(name: str, activation: str) -> None:
    assert describe_timm(name)["hidden_act"] == activation
    assert describe_timm(name, act_layer="quick_gelu")["hidden_act"] == "quick_gelu"
