"""An OpenCLIP file is read as a CLIP tower: compared with OpenCLIP's arithmetic, written out in PyTorch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trtower.errors import CheckpointError
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.checkpoint.head import describe_tower
from trtower_export.checkpoint.open_clip import preprocessor
from trtower_export.graph.reference import UncutTower
from trtower_export.graph.truncate import truncate
from trtower_export.options import Trust
from trtower_export.pipeline import ExportOptions, export_tower

WIDTH, HEADS, LAYERS, IMAGE_SIZE, PATCH_SIZE = 64, 2, 3, 42, 14
VISION: dict[str, Any] = {
    "image_size": IMAGE_SIZE,
    "layers": LAYERS,
    "width": WIDTH,
    "head_width": 32,
    "patch_size": PATCH_SIZE,
}
CLOSE = 2e-6
"""Not exact, because PyTorch's MultiheadAttention sums in another order than transformers' projections."""


class QuickGelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Block(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(WIDTH, 4 * WIDTH))
        self.mlp.add_module("gelu", activation)
        self.mlp.add_module("c_proj", nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        mixed: Tensor = x + self.mlp(self.ln_2(x))
        return mixed


class Visual(nn.Module):
    """The module tree of `open_clip.transformer.VisionTransformer`, so that the state dict has its names."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn((IMAGE_SIZE // PATCH_SIZE) ** 2 + 1, WIDTH))
        self.proj = nn.Parameter(torch.randn(WIDTH, 16))
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH_SIZE, stride=PATCH_SIZE, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(Block(activation) for _ in range(LAYERS))

    def hidden_states(self, pixel_values: Tensor) -> list[Tensor]:
        patches = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(len(patches), 1, -1)
        states = [self.ln_pre(torch.cat([cls, patches], dim=1) + self.positional_embedding)]
        for block in self.transformer.resblocks:
            states.append(block(states[-1]))
        return states


def draw(activation: nn.Module) -> Visual:
    torch.manual_seed(3)
    visual = Visual(activation).eval()
    for parameter in visual.parameters():
        nn.init.normal_(parameter, std=max(parameter.shape[-1], 16) ** -0.5)
    return visual


def write(folder: Path, visual: Visual, *, quick_gelu: bool = False, pickled: bool = False, **vision: Any) -> Path:
    tensors = {f"visual.{name}": tensor.contiguous() for name, tensor in visual.state_dict().items()}
    tensors |= {"text.token_embedding.weight": torch.zeros(8, 4), "logit_scale": torch.zeros(())}
    config = {
        "model_cfg": {"embed_dim": 16, "quick_gelu": quick_gelu, "vision_cfg": VISION | vision, "text_cfg": {}},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7], "resize_mode": "squash"},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / "open_clip_pytorch_model.bin")
        return folder / "open_clip_pytorch_model.bin"
    save_file(tensors, folder / "open_clip_model.safetensors")
    return folder / "open_clip_model.safetensors"


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_every_layer_equals_open_clips(tmp_path: Path, quick: bool, layer: int) -> None:
    visual = draw(QuickGelu() if quick else nn.GELU())
    checkpoint = open_checkpoint(str(write(tmp_path, visual, quick_gelu=quick)))
    spec = checkpoint.spec(layer)
    pixel_values = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        features = truncate(checkpoint.load_model(), checkpoint.family, spec)(pixel_values)
        states = visual.hidden_states(pixel_values)
    errors = [float((features - state).norm() / state.norm()) for state in states]
    assert errors[layer] < CLOSE
    assert sum(error < 100 * CLOSE for error in errors) == 1


def test_embedding_equals_open_clips(tmp_path: Path) -> None:
    visual = draw(nn.GELU())
    checkpoint = open_checkpoint(str(write(tmp_path, visual)))
    uncut = UncutTower.load(checkpoint, describe_tower(checkpoint, ExportOptions(head="embedding")))
    pixel_values = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        expected = visual.ln_post(visual.hidden_states(pixel_values)[-1][:, 0]) @ visual.proj
        found = uncut.cut()(pixel_values)
    assert float((found - expected).norm() / expected.norm()) < CLOSE


@pytest.mark.parametrize(
    "other", [{"pool_type": "avg"}, {"pool_type": "none"}, {"attentional_pool": True}, {"attentional_pool": "parallel"}]
)
def test_embedding_that_is_pooled_otherwise_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(str(write(tmp_path, draw(nn.GELU()), **other)))
    assert checkpoint.spec()
    with pytest.raises(CheckpointError, match=r"pools otherwise than by the CLS token; without --head"):
        describe_tower(checkpoint, ExportOptions(head="embedding"))


def test_folder_is_recognised_like_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, draw(nn.GELU()))
    assert open_checkpoint(str(tmp_path)).config.to_dict() == open_checkpoint(str(file)).config.to_dict()


def test_bundle_prepares_images_as_open_clip_does(tmp_path: Path) -> None:
    file = write(tmp_path, draw(nn.GELU()))
    bundle = export_tower(str(file), tmp_path / "b", ExportOptions(flavour="none"))
    assert bundle.manifest.certificate
    assert bundle.manifest.certificate.passed
    assert bundle.manifest.source.checkpoint == str(file.resolve())
    written = json.loads((tmp_path / "b" / "preprocessor_config.json").read_text())
    assert written["image_mean"] == [0.1, 0.2, 0.3]
    assert not written["do_center_crop"]


def test_pickle_is_read_only_if_it_is_allowed(tmp_path: Path) -> None:
    file = write(tmp_path, draw(nn.GELU()), pickled=True)
    for source in (file, tmp_path):
        with pytest.raises(CheckpointError, match="--allow-pickle"):
            open_checkpoint(str(source))
        assert open_checkpoint(str(source), trust=Trust(allow_pickle=True)).load_model()


def test_file_without_its_config_asks_for_it(tmp_path: Path) -> None:
    file = write(tmp_path, draw(nn.GELU()))
    (tmp_path / "open_clip_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no open_clip_config\.json beside it"):
        open_checkpoint(str(file))


@pytest.mark.parametrize(
    "vision",
    [{"timm_model_name": "vit_so400m"}, {"ls_init_value": 1e-4}, {"no_ln_pre": True}, {"qk_norm": True}],
)
def test_other_architecture_is_named(tmp_path: Path, vision: dict[str, Any]) -> None:
    file = write(tmp_path, draw(nn.GELU()), **vision)
    with pytest.raises(CheckpointError, match=next(iter(vision))):
        open_checkpoint(str(file))


def test_repository_of_timm_may_have_its_own_config_too(tmp_path: Path) -> None:
    write(tmp_path, draw(nn.GELU()))
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_small", "num_classes": 0}))
    assert open_checkpoint(str(tmp_path)).layout.kind == "OpenCLIP checkpoint"


@pytest.mark.parametrize(
    ("section", "value"),
    [
        *(("vision_cfg", VISION | {"width": value}) for value in ("64", 0, None)),
        *(("vision_cfg", VISION | {"head_width": value}) for value in (0, "x", None)),
        ("vision_cfg", VISION | {"mlp_ratio": None}),
        *(("vision_cfg", VISION | {"image_size": value}) for value in (None, "42", 0)),
        ("vision_cfg", VISION | {"patch_size": None}),
        ("vision_cfg", 5),
        ("model_cfg", []),
        ("preprocess_cfg", {}),
        ("preprocess_cfg", 5),
        ("preprocess_cfg", {"mean": [0.5], "std": [0.5], "interpolation": "random"}),
        ("preprocess_cfg", {"mean": [0.5], "std": [0.5], "resize_mode": "longest"}),
    ],
)
def test_garbage_in_the_config_is_one_line_that_names_it(tmp_path: Path, section: str, value: Any) -> None:
    file = write(tmp_path, draw(nn.GELU()))
    path = tmp_path / "open_clip_config.json"
    config = json.loads(path.read_text())
    (config["model_cfg"] if section == "vision_cfg" else config)[section] = value
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json") as caught:
        open_checkpoint(str(file))
    assert "\n" not in str(caught.value)


def test_fused_projection_of_another_shape_is_named(tmp_path: Path) -> None:
    file = write(tmp_path, draw(nn.GELU()))
    tensors = load_file(file)
    name = "visual.transformer.resblocks.1.attn.in_proj_weight"
    save_file({**tensors, name: tensors[name][:-1].clone()}, file)
    with pytest.raises(CheckpointError, match=r"attn\.in_proj_weight has shape \(191, 64\)"):
        open_checkpoint(str(file)).load_model()


def test_width_of_the_mlp_follows_its_ratio(tmp_path: Path) -> None:
    assert open_checkpoint(str(write(tmp_path, draw(nn.GELU()), mlp_ratio=4.9231))).config.intermediate_size == 315


@pytest.mark.parametrize(("written", "resample"), [("bilinear", 2), ("bicubic", 3)])
def test_pixels_are_resized_as_the_config_says(tmp_path: Path, written: str, resample: int) -> None:
    config = {"preprocess_cfg": {"mean": [0.5], "std": [0.5], "interpolation": written, "resize_mode": "shortest"}}
    result = preprocessor(config, 56)
    assert result
    assert (result["resample"], result["do_center_crop"], result["size"]) == (resample, True, {"shortest_edge": 56})


def test_res_net_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, draw(nn.GELU()), layers=[3, 4, 6, 3])
    with pytest.raises(CheckpointError, match="a ResNet"):
        open_checkpoint(str(file))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path, draw(nn.GELU()))
    save_file({"weight": torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match=r"holds no visual\.conv1\.weight"):
        open_checkpoint(str(file))
