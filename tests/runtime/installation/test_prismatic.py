"""trtower.install in OpenVLA: one engine in the place of two ViTs of timm, and of the projector behind them.

The model is a stand-in with the modules and names of OpenVLA's; `make clients OPENVLA=path` installs into its own.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trtower
from tests.export.checkpoint.test_prismatic import pixels_for
from tests.timm_stand_in import (
    DINOV2,
    PAIR,
    SIGLIP,
    SIZES,
    OpenVLAStandIn,
    make_openvla,
    write_openvla,
)
from trtower.errors import BackendError, CheckpointError, ConfigError, InputError
from trtower.installation.find import find_tower
from trtower_export import ExportOptions, export_tower
from trtower_export.checkpoint import timm
from trtower_export.checkpoint.checkpoint import open_checkpoint

FP32 = ExportOptions(precision="fp32", flavour="none", check=False)
WORDS = torch.ones(2, 2, dtype=torch.int64)
CLOSE = 1e-5
TOWERS = {"pair": PAIR, "dinov2": (DINOV2,), "siglip": (SIGLIP,)}
Bundles = dict[tuple[str, str], Path]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """A bundle of each kind of towers, without and with the projector."""
    folder, made = tmp_path_factory.mktemp("prismatic"), {}
    with pytest.MonkeyPatch.context() as patches:
        for name, size in SIZES.items():
            patches.setitem(timm.SIZES, name, size)
        for kind, towers in TOWERS.items():
            write_openvla(folder / kind, make_openvla(towers))
            for head in ("none", "projector"):
                made[kind, head] = export_tower(
                    str(folder / kind), folder / f"{kind}-{head}", replace(FP32, head=head)
                ).path
    return made


def install(model: Any, bundle: Path, **options: Any) -> Any:
    return trtower.install(model, bundle, backend="onnxruntime-cpu", **options)


@torch.no_grad()
def act(model: OpenVLAStandIn, pixels: Tensor) -> Tensor:
    return model(input_ids=WORDS, pixel_values=pixels)


@pytest.mark.parametrize("head", ["none", "projector"])
@pytest.mark.parametrize("kind", TOWERS)
def test_answers_are_those_of_the_eager_model(bundles: Bundles, kind: str, head: str) -> None:
    model, (_, given) = make_openvla(TOWERS[kind]), pixels_for(TOWERS[kind])
    expected, state = act(model, given), {name: each.clone() for name, each in model.state_dict().items()}
    calls: list[int] = []
    with install(model, bundles[kind, head]) as installation:
        installation.tower.on_batch = lambda report: calls.append(report.batch)
        found = act(model, given)
        assert calls == [1, 1]  # of the profile
        saved = model.state_dict()
        assert saved.keys() == state.keys()
        assert all(torch.equal(saved[name], each) for name, each in state.items())
    assert (found - expected).abs().max() <= CLOSE * expected.abs().max()
    assert torch.equal(act(model, given), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_model_may_hold_its_weights_in_another_dtype(bundles: Bundles, dtype: torch.dtype) -> None:
    model, (_, given) = make_openvla().to(dtype), pixels_for(PAIR)
    patches = model.vision_backbone(given.to(dtype))
    with install(model, bundles["pair", "none"]):
        found = model.vision_backbone(given.to(dtype))
    assert found.dtype == dtype
    assert (found - patches).float().norm() <= 0.03 * patches.float().norm()


@pytest.mark.parametrize("head", ["none", "projector"])
def test_pictures_of_several_cameras_run_together(bundles: Bundles, head: str) -> None:
    model, (_, given) = make_openvla(), pixels_for(PAIR)
    model.vision_backbone.set_num_images_in_input(2)
    both = torch.cat([given, given.flip(0)], dim=1)
    expected, patches = act(model, both), model.vision_backbone.get_num_patches()
    with install(model, bundles["pair", head]):
        found = act(model, both)
        assert model.vision_backbone.get_num_patches() == patches
        with pytest.raises(InputError, match=r"two towers expect \(B, 12, 28, 28\)"):
            act(model, given)
        model.vision_backbone.set_num_images_in_input(1)
        if head == "projector":
            with pytest.raises(ConfigError, match=r"got states \(3,\) of shape \(4, 80\), but the engine projects"):
                act(model, given)
    assert found.shape == expected.shape == (2, 2 * patches, 7)
    assert (found - expected).abs().max() <= CLOSE * expected.abs().max()


class FiLMedPrismaticVisionBackbone(nn.Module):
    """What OpenVLA-OFT puts around a backbone that it conditions on the text."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.vision_backbone = backbone


def test_towers_that_read_the_text_are_refused(bundles: Bundles, tmp_path: Path, small_timm: None) -> None:
    model = make_openvla()
    model.vision_backbone = FiLMedPrismaticVisionBackbone(model.vision_backbone)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"vision_backbone\.vision_backbone of this model is conditioned on the text"):
        install(model, bundles["pair", "none"])
    (write_openvla(tmp_path, make_openvla()) / "vision_backbone--150000_checkpoint.pt").touch()
    with pytest.raises(CheckpointError, match=r"vision_backbone--150000_checkpoint\.pt conditions the towers"):
        open_checkpoint(str(tmp_path))


def swapped(given: Tensor) -> Tensor:
    return torch.cat(given.split(3, dim=1)[::-1], dim=1)


def of_another_picture(given: Tensor) -> Tensor:
    return torch.cat([given[:, :3], given[:, 3:].flip(0)], dim=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swapped, "are not the picture in the last three"),
        (of_another_picture, "are not the picture in the last three"),
        (lambda given: given * float("nan"), "pixel_values holds NaN or infinity"),
        (lambda given: given[:, :3], r"pixel_values is \(2, 3, 28, 28\); two towers expect \(B, 6, 28, 28\)"),
        (lambda given: given.to(torch.uint8), r"pixel_values is torch\.uint8; expected pictures that are normalised"),
        (lambda given: given.tolist(), "pixel_values is list"),
        (lambda given: given[..., :14], r"pixel_values is \(2, 6, 28, 14\); two towers expect \(B, 6, 28, 28\)"),
    ],
)
def test_pixels_of_two_pictures_are_refused(bundles: Bundles, change: Any, message: str) -> None:
    model, (_, given) = make_openvla(), pixels_for(PAIR)
    with install(model, bundles["pair", "projector"]), pytest.raises(InputError, match=message):
        act(model, change(given))


def test_other_weights_are_refused(bundles: Bundles) -> None:
    for name in ("featurizer.blocks.0.ls1.scale_factor", "fused_featurizer.blocks.2.attn.qkv.bias"):
        model, (_, given) = make_openvla(), pixels_for(PAIR)
        expected = act(model, given)
        with torch.no_grad():
            model.vision_backbone.get_parameter(name)[1] += 0.01
        changed = act(model, given)
        assert not torch.equal(changed, expected)
        with pytest.raises(ConfigError, match="vision_backbone of this model has other weights"):
            install(model, bundles["pair", "none"])
        assert torch.equal(act(model, given), changed)


@pytest.mark.parametrize("name", ["featurizer", "fused_featurizer"])
@pytest.mark.parametrize(
    "change",
    [lambda patches: torch.randn_like(patches), lambda patches: patches.roll(1, dims=1)],
    ids=["drawn", "moved"],
)
def test_tower_that_computes_otherwise_is_refused(bundles: Bundles, name: str, change: Any) -> None:
    model = make_openvla()
    tower = getattr(model.vision_backbone, name)
    forward = tower.forward
    tower.forward = lambda pixels: (change(forward(pixels)[0]),)
    with pytest.raises(ConfigError, match=r"vision_backbone of this model and .* differ on the same image"):
        install(model, bundles["pair", "none"])


def test_empty_batch_is_refused_as_by_other_towers(bundles: Bundles) -> None:
    model, (_, given) = make_openvla(), pixels_for(PAIR)
    with install(model, bundles["pair", "none"]), pytest.raises(InputError):
        model.vision_backbone(given[:0])


def test_pixels_that_were_rounded_before_are_one_picture(bundles: Bundles) -> None:
    model, (_, given) = make_openvla(), pixels_for(PAIR)
    expected = model.vision_backbone(given)
    with install(model, bundles["pair", "none"]):
        for dtype in (torch.bfloat16, torch.float16):
            found = model.vision_backbone(given.to(dtype).float())
            assert (found - expected).norm() <= 0.01 * expected.norm()


def test_weights_of_blocks_that_are_not_read_may_differ(bundles: Bundles) -> None:
    model = make_openvla()
    with torch.no_grad():
        for tower in (model.vision_backbone.featurizer, model.vision_backbone.fused_featurizer):
            for parameter in tower.blocks[-1].parameters():
                parameter.add_(1.0)
    with install(model, bundles["pair", "none"]):
        pass


@pytest.mark.parametrize(
    ("towers", "kind", "message"),
    [
        ((DINOV2,), "pair", r"is of family prismatic .*; vision_backbone of this model is a PrismaticVisionBackbone"),
        (PAIR, "siglip", r"is of family siglip .*\(prismatic_fused\)"),
        ((SIGLIP,), "dinov2", r"is of family dinov2_with_registers .*\(siglip_vision_model\)"),
    ],
)
def test_bundle_of_other_towers_is_refused(bundles: Bundles, towers: tuple[str, ...], kind: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        install(make_openvla(towers), bundles[kind, "none"])


def test_training_mode_and_gradients_are_refused(bundles: Bundles) -> None:
    model, (_, given) = make_openvla(), pixels_for(PAIR)
    with pytest.raises(ConfigError, match="vision_backbone is in training mode"):
        install(model.train(), bundles["pair", "none"])
    with install(model.eval(), bundles["pair", "none"]):
        with pytest.raises(BackendError, match="pixel_values requires a gradient"):
            model(input_ids=WORDS, pixel_values=given.requires_grad_())
        model.train()
        with pytest.raises(BackendError, match="cannot be trained"):
            act(model, given)


def test_bundle_of_another_layer_is_refused(bundles: Bundles, tmp_path: Path, small_timm: None) -> None:
    model = make_openvla()
    write_openvla(tmp_path / "model", model)
    bundle = export_tower(str(tmp_path / "model"), tmp_path / "bundle", replace(FP32, select_layer=-1)).path
    with pytest.raises(ConfigError, match=r"this model reads layer=-2, hidden state 3 of 4 layers; .* holds 4"):
        install(model, bundle)


def test_parts_of_the_eager_towers_are_named_as_replaced(bundles: Bundles) -> None:
    model = make_openvla()
    with (
        install(model, bundles["pair", "none"]),
        pytest.raises(AttributeError, match=r"vision_backbone\.featurizer is a part of the eager tower"),
    ):
        model.vision_backbone.featurizer.blocks  # noqa: B018
    assert find_tower(model).path == "vision_backbone"


def test_picture_becomes_the_features_that_the_projector_gets(bundles: Bundles) -> None:
    tower = trtower.VisionTower.load(bundles["pair", "none"], backend="onnxruntime-cpu")
    pixels, given = pixels_for(PAIR)
    with torch.no_grad():
        expected = make_openvla().vision_backbone(given)
    assert (tower.num_patches, tower.hidden_size) == tuple(expected.shape[1:])
    assert (tower(pixels) - expected).abs().max() <= CLOSE * expected.abs().max()


def test_bytes_are_prepared_in_the_engine(bundles: Bundles, tmp_path: Path, small_timm: None) -> None:
    model = make_openvla()
    write_openvla(tmp_path / "model", model)
    bundle = export_tower(str(tmp_path / "model"), tmp_path / "bundle", replace(FP32, pixels="uint8")).path
    taken = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prepared = (taken.float() / 255 - 0.5) / 0.5
    tower = trtower.VisionTower.load(bundle, backend="onnxruntime-cpu")
    floats = trtower.VisionTower.load(bundles["pair", "none"], backend="onnxruntime-cpu")
    assert (tower(taken) - floats(prepared)).abs().max() <= CLOSE * floats(prepared).abs().max()
    with pytest.raises(ConfigError, match="takes pixels as bytes"):
        install(model, bundle)
