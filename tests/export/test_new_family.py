"""A made-up family works everywhere, given only its definition and its entry in FAMILIES.

It differs from the built-in families in everything that may differ: the names of its parts, and the fields of its
config that decide what it computes.
"""

import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

import trtower
from tests.conftest import IMAGE_SIZE, NUM_LAYERS, PATCH_SIZE, WIDTH
from trtower.cli import run
from trtower.errors import ConfigError
from trtower.layer_codes import LAST, LayerCode
from trtower.spec import Naming
from trtower.tower.vision_tower import VisionTower
from trtower_export import families
from trtower_export.families.base import Family, Pieces

pytestmark = pytest.mark.usefixtures("one_thread", "known")

Export = Callable[[LayerCode], Path]

EXACT = 1e-5
"""Relative error of ONNX Runtime in FP32: a few hundred roundings of 2**-24."""


class ToyConfig(transformers.PretrainedConfig):
    model_type = "toy_eye"

    def __init__(self, slope: float = 1.5, **options: Any) -> None:
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = WIDTH, NUM_LAYERS, 4
        self.image_size, self.patch_size, self.intermediate_size = IMAGE_SIZE, PATCH_SIZE, WIDTH
        self.slope = slope
        super().__init__(**options)


class Stem(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches: Tensor = self.patches(pixel_values)
        return patches.flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, N, D)


class Block(nn.Module):
    """One attention head; its output is added, multiplied by ``slope``."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.slope, self.calm = config.slope, nn.LayerNorm(width)
        self.ask, self.mix = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = self.calm(hidden_states)[:, None]  # (B, N, D) -> (B, 1, N, D)
        context = nn.functional.scaled_dot_product_attention(self.ask(normed), normed, normed)[:, 0]
        return hidden_states + self.slope * self.mix(context)


class ToyEye(transformers.PreTrainedModel):
    """Reads patches, and makes a summary that no hidden state depends on."""

    config_class = ToyConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.stem = Stem(config)
        self.trunk = nn.ModuleDict({"blocks": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))})
        self.closing, self.summary = nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, 8)
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        """Keep the weights that torch has drawn."""

    def forward(self, pixel_values: Tensor, output_hidden_states: bool | None = None) -> BaseModelOutputWithPooling:
        states = [self.stem(pixel_values)]
        blocks: Any = self.trunk["blocks"]
        for block in blocks:
            states.append(block(states[-1]))
        last = self.closing(states[-1])
        with_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutputWithPooling(
            last_hidden_state=last,
            pooler_output=self.summary(last.mean(dim=1)),
            hidden_states=tuple(states) if with_states else None,
        )


def take_apart(model: Any, image_size: int) -> Pieces:
    del image_size
    return Pieces(stem=model.stem, layers=model.trunk["blocks"], final_norm=model.closing)


FAMILY = Family(
    name="toy",
    model_types=("toy_eye",),
    model_class="ToyEye",
    module=__name__,
    patch_embedding="stem.patches.weight",
    num_prefix_tokens=lambda config: 0,
    take_apart=take_apart,
    naming=Naming(
        layers=("trunk.blocks",), final_norm=("closing",), unread=("summary",), config_fields=("patch_size", "slope")
    ),
    preprocessor={
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "resample": 3,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    },
)


@pytest.fixture(scope="module")
def known() -> Iterator[None]:
    """Register the family."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", (*families.FAMILIES, FAMILY))
        yield


class Model(nn.Module):
    """A custom model around a tower."""

    def __init__(self, tower: nn.Module, layer: LayerCode) -> None:
        super().__init__()
        self.tower, self.select_layer, self.projector = tower, layer, nn.Linear(WIDTH, 16)

    def encode_images(self, images: Tensor) -> Tensor:
        output = self.tower(images, output_hidden_states=True)
        state = output.last_hidden_state if self.select_layer == LAST else output.hidden_states[self.select_layer]
        features: Tensor = self.projector(state)
        return features


@pytest.fixture(scope="module")
def eye() -> ToyEye:
    torch.manual_seed(5)
    return ToyEye(ToyConfig()).eval()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def export(eye: ToyEye, known: None, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Export the toy at a layer with the command, once per layer; tests must not change the bundle."""
    folder = tmp_path_factory.mktemp("toy")
    eye.save_pretrained(folder / "eye")

    @cache
    def get(layer: LayerCode) -> Path:
        bundle = folder / f"layer{layer}"
        options = ["--precision", "fp32", "--flavour", "none", "--no-check", "--out", str(bundle)]
        assert run(["export", str(folder / "eye"), "--select-layer", str(layer), *options]) == 0
        return bundle

    return get


def copy_of(eye: ToyEye, **changes: Any) -> ToyEye:
    copied = ToyEye(ToyConfig(**changes))
    copied.load_state_dict(eye.state_dict())
    return copied.eval()  # type: ignore[no-untyped-call]


def draw(count: int = 2) -> Tensor:
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))


def test_new_family_is_exported_checked_loaded_and_inspected(
    export: Export, eye: ToyEye, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(export(-2), tmp_path / "bundle"))
    picture = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(picture).save(tmp_path / "images" / "a.png")
    assert run(["check", str(bundle), "--images", str(tmp_path / "images"), "--by-layer"]) == 0
    capsys.readouterr()
    assert run(["inspect", str(bundle)]) == 0
    assert ": toy tower from" in capsys.readouterr().out
    tower = VisionTower.load(bundle, require_certificate=True)
    expected = eye(draw(), output_hidden_states=True).hidden_states[-2]
    assert (tower(draw()) - expected).norm() < EXACT * expected.norm()


@pytest.mark.parametrize("layer", [-2, LAST])
@torch.no_grad()
def test_new_family_is_installed_in_a_loaded_model(export: Export, eye: ToyEye, layer: LayerCode) -> None:
    bundle, model = export(layer), Model(copy_of(eye), layer)
    unread = [model.tower.summary, *([] if layer == LAST else [model.tower.closing, model.tower.trunk["blocks"][-1]])]
    for parameter in (each for module in unread for each in module.parameters()):
        parameter.fill_(7.0)  # never read
    expected = model.encode_images(draw())
    with trtower.install(model, bundle):
        assert isinstance(model.tower, ToyEye)
        assert (model.encode_images(draw()) - expected).norm() < EXACT * expected.norm()


@pytest.mark.parametrize("name", ["stem.patches.weight", "trunk.blocks.0.mix.bias", "closing.weight"])
def test_new_family_with_other_weights_is_refused(export: Export, eye: ToyEye, name: str) -> None:
    bundle, model = export(LAST), Model(copy_of(eye), LAST)
    with torch.no_grad():
        model.tower.get_parameter(name).mul_(1.01)
    with pytest.raises(ConfigError, match="tower of this model has other weights than"):
        trtower.install(model, bundle)


def test_new_family_with_another_config_is_refused(export: Export, eye: ToyEye) -> None:
    bundle, model = export(-2), Model(copy_of(eye, slope=0.5), -2)
    with pytest.raises(ConfigError, match=r"was made of a tower with slope=1\.5; tower of this model has 0\.5"):
        trtower.install(model, bundle)


def test_new_family_with_fewer_layers_is_refused(export: Export, eye: ToyEye) -> None:
    bundle, model = export(-2), Model(copy_of(eye), -2)
    del model.tower.trunk["blocks"][2:]
    with pytest.raises(ConfigError, match="holds a state of layer 3; tower of this model has only 2 layers"):
        trtower.install(model, bundle)


@pytest.mark.parametrize(
    ("tensor", "refusal"),
    [
        ("trunk.blocks.4.mix.bias", f"but its config has num_hidden_layers={NUM_LAYERS}"),
        ("trunk.blocks.0.gate.bias", "but its config describes a ToyEye without it"),
        ("stem.positions.bias", "but its config describes a ToyEye without it"),
    ],
)
def test_weights_that_a_new_family_does_not_have_are_refused(
    eye: ToyEye, tmp_path: Path, capsys: pytest.CaptureFixture[str], tensor: str, refusal: str
) -> None:
    eye.save_pretrained(tmp_path)
    save_file({**load_file(tmp_path / "model.safetensors"), tensor: torch.ones(WIDTH)}, tmp_path / "model.safetensors")
    assert run(["export", str(tmp_path), "--flavour", "none", "--out", str(tmp_path / "bundle")]) == 1
    assert f"holds {tensor}, {refusal}" in capsys.readouterr().err


def test_tower_of_a_new_family_is_found_in_a_folder_of_several(
    eye: ToyEye, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    eye.save_pretrained(tmp_path / "eye")
    transformers.LlamaConfig().save_pretrained(tmp_path / "talk")
    assert run(["export", str(tmp_path), "--flavour", "none"]) == 1
    assert f"it has no config.json. Export {tmp_path / 'eye'}, which has one" in capsys.readouterr().err
