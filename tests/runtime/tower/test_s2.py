"""Running several scales in few calls gives the same features as running one scale after another."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional

from tests.conftest import BATCH, IMAGE_SIZE, NUM_LAYERS, PATCH_SIZE, WIDTH
from trtower import CLIPVisionTower, CLIPVisionTowerDynamicS2, CLIPVisionTowerS2, VisionTower, build_vision_tower
from trtower.errors import ConfigError, InputError
from trtower_export.pipeline import ExportOptions, export_tower

S, P, N = IMAGE_SIZE, 1, 9
"""Pixels per side of a tile, prefix tokens, and patches per tile."""

FP32_TOLERANCE = 2e-5
"""ONNX Runtime and PyTorch sum in different orders; values here are of the order of 1."""

Reference = Callable[[torch.Tensor], torch.Tensor]


def config(scales: object = "42,84,126", **changes: object) -> SimpleNamespace:
    return SimpleNamespace(**{"mm_vision_select_layer": -2, "s2": True, "s2_scales": scales, **changes})


def images(batch: int, side: int = 126, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(batch + side)).to(dtype)


def read_scale_by_scale(
    tower: Reference, pixels: torch.Tensor, scales: list[int], index: int = 0, prefix: int = 0
) -> torch.Tensor:
    """Do what s2wrapper's `forward` does with split_mode="resize", in loops: one call of the tower per tile."""
    grids, prefixes = [], []
    for scale in scales:
        resized = functional.interpolate(pixels.float(), size=(scale, scale), mode="bicubic").to(pixels.dtype)
        n = math.ceil(scale / S)
        assert scale == n * S
        rows, heads = [], []
        for i in range(n):
            row = []
            for j in range(n):
                tokens = tower(resized[:, :, i * S : (i + 1) * S, j * S : (j + 1) * S])
                heads.append(tokens[:, :prefix])
                patches = tokens[:, prefix:]
                p = math.isqrt(patches.shape[1])
                row.append(patches.reshape(len(pixels), p, p, -1).permute(0, 3, 1, 2))
            rows.append(torch.cat(row, dim=3))
        grids.append(torch.cat(rows, dim=2))
        prefixes.append(torch.stack(heads).mean(dim=0))
    size = grids[index].shape[-2:]
    merged = [functional.interpolate(grid.float(), size=size, mode="area").to(grid.dtype) for grid in grids]
    patches = torch.cat(merged, dim=1).permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([torch.cat(prefixes, dim=-1), patches], dim=1)


@pytest.fixture(scope="module")
def eager(checkpoints: dict[str, Path]) -> Callable[..., torch.Tensor]:
    """LLaVA's forward_feature: state -2 of one scale's tiles, in their dtype."""
    model = transformers.CLIPVisionModel.from_pretrained(checkpoints["clip"]).eval()

    @torch.no_grad()
    def forward(tiles: torch.Tensor, first: int = P) -> torch.Tensor:
        return model(tiles.float(), output_hidden_states=True).hidden_states[-2][:, first:].to(tiles.dtype)

    return forward


@pytest.fixture(scope="module")
def siglip_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(5)
    shape: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    model = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(**shape, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)
    )
    model.save_pretrained(root / "checkpoint")
    options = ExportOptions(precision="fp32", flavour="none", profiles=(BATCH,), check=False)
    return export_tower(str(root / "checkpoint"), root / "bundle", options).path


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    ("scales", "index"),
    [
        ("42,84,126", 0),
        ("42,84,126", 1),
        ("42,84,126", -1),
        ("42,84,126", 2),
        ("42,168", 0),
        ("42,168", 1),
        ("84,126", 0),
        ("42", 0),
    ],
)
def test_features_are_those_of_the_eager_scales(
    fp32_bundle: Path, eager: Reference, scales: str, index: int, batch: int
) -> None:
    args = config(scales, s2_max_split_size=S, s2_resize_output_to_scale_idx=index)
    sizes = [int(size) for size in scales.split(",")]
    pixels = images(batch, max(sizes))
    tower = CLIPVisionTowerS2(fp32_bundle, args)
    features = tower(pixels)
    expected = read_scale_by_scale(eager, pixels, sizes, index)
    assert features.shape == (batch, N * (sizes[index] // S) ** 2, WIDTH * len(sizes))
    assert torch.allclose(features, expected, atol=FP32_TOLERANCE)
    out = torch.empty_like(features)
    assert torch.equal(tower(pixels, out=out), features)
    assert torch.equal(out, features)


@pytest.mark.parametrize("side", [30, 42, 100, 200])
def test_images_of_any_size_are_resized_to_every_scale(fp32_bundle: Path, eager: Reference, side: int) -> None:
    pixels = images(2, side)
    features = CLIPVisionTowerS2(fp32_bundle, config())(pixels)
    assert torch.allclose(features, read_scale_by_scale(eager, pixels, [42, 84, 126]), atol=FP32_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pixels_and_features_are_rounded_where_the_eager_tower_rounds(fp32_bundle: Path, dtype: torch.dtype) -> None:
    """Resized pixels, the features of a tile and area averages are each rounded to the dtype of the images."""
    pixels = images(2, 126, dtype)
    one_scale = VisionTower.load(fp32_bundle)
    features = CLIPVisionTowerS2(fp32_bundle, config())(pixels)
    expected = read_scale_by_scale(one_scale, pixels, [42, 84, 126])
    assert features.dtype == dtype
    # The same tile differs in the last FP32 bits between batches, which can tip a rounding: few values, one unit each.
    assert torch.isclose(features, expected, rtol=0, atol=FP32_TOLERANCE).float().mean() > 0.99
    assert torch.allclose(features, expected, rtol=torch.finfo(dtype).eps, atol=FP32_TOLERANCE)


def test_half_precision_engine_gives_the_same_features_scale_by_scale(clip_bundle: Path) -> None:
    pixels = images(2, 126, torch.float16)
    expected = read_scale_by_scale(VisionTower.load(clip_bundle), pixels, [42, 84, 126])
    features = CLIPVisionTowerS2(clip_bundle, config())(pixels)
    assert features.dtype == torch.float16
    # FP16 kernels round differently for other batches: some units of 2 ** -9 for features, which reach 4.
    assert torch.allclose(features, expected, rtol=0, atol=2e-2)
    assert (features - expected).abs().float().mean() < 1e-3


def test_list_of_images_comes_back_in_order(fp32_bundle: Path, eager: Reference) -> None:
    pixels = [images(1, 126)[0], images(2, 84), images(1, 60, torch.float64)[0]]
    answers = CLIPVisionTowerS2(fp32_bundle, config())(pixels)
    assert [tuple(a.shape) for a in answers] == [(1, N, 3 * WIDTH), (2, N, 3 * WIDTH), (1, N, 3 * WIDTH)]
    assert [a.dtype for a in answers] == [torch.float32, torch.float32, torch.float64]
    for answer, image in zip(answers, pixels, strict=True):
        batch = image if image.ndim == 4 else image[None]
        assert torch.allclose(answer, read_scale_by_scale(eager, batch, [42, 84, 126]), atol=FP32_TOLERANCE)


@pytest.mark.parametrize(("scales", "tiles"), [("42,84,126", 14), ("42,84", 5), ("42,168", 17)])
def test_all_tiles_of_all_scales_run_packed(
    fp32_bundle: Path, count_calls: Callable[[VisionTower], list[int]], scales: str, tiles: int
) -> None:
    tower = CLIPVisionTowerS2(fp32_bundle, config(scales))
    calls = count_calls(tower)
    for inputs in (images(1), images(2), [images(1)[0], images(1, 50)[0], images(2, 84)]):
        calls.clear()
        tower(inputs)
        total = tiles * (len(inputs) if isinstance(inputs, torch.Tensor) else 4)
        assert sum(calls) == total
        assert len(calls) == math.ceil(total / BATCH.max)


def test_cls_tokens_are_averaged_over_a_scale(fp32_bundle: Path, eager: Callable[..., torch.Tensor]) -> None:
    pixels = images(2)
    args = config(mm_vision_select_feature="cls_patch", s2_resize_output_to_scale_idx=1)
    features = CLIPVisionTowerS2(fp32_bundle, args)(pixels)
    expected = read_scale_by_scale(lambda tiles: eager(tiles, first=0), pixels, [42, 84, 126], index=1, prefix=P)
    assert features.shape == (2, P + 4 * N, 3 * WIDTH)
    assert torch.allclose(features, expected, atol=FP32_TOLERANCE)


def test_tower_without_cls_keeps_all_patches_as_in_vila(siglip_bundle: Path) -> None:
    args = config("42,84", mm_vision_select_feature="cls_patch")
    tower = build_vision_tower(SimpleNamespace(**vars(args), mm_vision_tower=str(siglip_bundle)))
    assert isinstance(tower, CLIPVisionTowerS2)
    pixels = images(2, 84)
    expected = read_scale_by_scale(VisionTower.load(siglip_bundle), pixels, [42, 84])
    assert expected.shape == (2, N, 2 * WIDTH)
    assert torch.allclose(tower(pixels), expected, atol=FP32_TOLERANCE)


def test_several_layers_at_several_scales(export: Callable[..., Path]) -> None:
    path = export("clip", select_layer=(4, 1, 3), precision="fp32", flavour="none")
    tower = CLIPVisionTowerS2(path, config(mm_vision_select_layer=[3, 4]))
    pixels = images(1)
    expected = read_scale_by_scale(VisionTower.load(path, select_layer=[3, 4]), pixels, [42, 84, 126])
    assert tower.hidden_size == expected.shape[-1] == 6 * WIDTH
    assert torch.allclose(tower(pixels), expected, atol=FP32_TOLERANCE)


def test_attributes_are_those_of_llavas_and_vilas_towers(fp32_bundle: Path) -> None:
    tower = CLIPVisionTowerS2(fp32_bundle, config("126,42,84"), delay_load=True)
    assert (tower.s2_scales, tower.s2_split_size, tower.s2_image_size) == ([42, 84, 126], 42, 126)
    assert (tower.scales, tower.max_split_size, tower.resize_output_to_scale_idx) == ([42, 84, 126], 42, 0)
    assert tower.hidden_size == 3 * WIDTH
    assert torch.equal(tower.dummy_feature, torch.zeros(1, 3 * WIDTH))
    assert (tower.num_patches, tower.num_patches_per_side, tower.image_size) == (N, 3, S)
    assert not tower.is_loaded
    assert CLIPVisionTowerS2(fp32_bundle, config([42, 84]), delay_load=True).scales == [42, 84]
    assert CLIPVisionTowerS2(fp32_bundle, config(["84", "42"]), delay_load=True).scales == [42, 84]


def test_image_processor_makes_the_largest_scale(fp32_bundle: Path, siglip_bundle: Path) -> None:
    picture = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8).numpy()
    for path, size in ((fp32_bundle, {"shortest_edge": 126}), (siglip_bundle, {"height": 126, "width": 126})):
        tower = CLIPVisionTowerS2(path, config())
        assert tower.image_processor.size == size
        assert tower.image_processor.crop_size == {"height": 126, "width": 126}
        pixel_values = tower.image_processor.preprocess(picture, return_tensors="pt")["pixel_values"]
        assert pixel_values.shape == (1, 3, 126, 126)
        assert tower(pixel_values).shape == (1, N, 3 * WIDTH)


def test_dynamic_s2_multiplies_only_the_width(fp32_bundle: Path) -> None:
    args = config("84,42", s2=False, dynamic_s2=True, s2_max_split_size=42, s2_resize_output_to_scale_idx=-1)
    tower = build_vision_tower(SimpleNamespace(**vars(args), mm_vision_tower=str(fp32_bundle)))
    assert type(tower) is CLIPVisionTowerDynamicS2
    assert (tower.scales, tower.max_split_size, tower.resize_output_to_scale_idx) == ([42, 84], 42, -1)
    assert tower.hidden_size == 2 * WIDTH
    assert tower.image_processor.crop_size == {"height": 42, "width": 42}
    tiles = images(5, S)
    assert torch.equal(tower(tiles), VisionTower.load(fp32_bundle)(tiles))
    assert torch.equal(tower(tiles, out=torch.empty(5, N, WIDTH)), tower(tiles))
    with pytest.raises(InputError, match="this engine accepts"):
        tower(images(1, 84))


def test_builder_chooses_the_class_that_the_config_needs(fp32_bundle: Path) -> None:
    for flags, kind in (
        ({"s2": True}, CLIPVisionTowerS2),
        ({"s2": False, "dynamic_s2": True}, CLIPVisionTowerDynamicS2),
        ({"s2": False}, CLIPVisionTower),
    ):
        args = config(**flags, mm_vision_tower=str(fp32_bundle))
        tower = build_vision_tower(args, delay_load=True, check_finite=False)
        assert type(tower) is kind
        assert not tower.is_loaded
        assert tower.check_finite is False
    assert build_vision_tower(config(mm_vision_tower=str(fp32_bundle), unfreeze_mm_vision_tower=True)).is_loaded


def test_class_can_be_used_without_the_flag(fp32_bundle: Path) -> None:
    assert CLIPVisionTowerS2(fp32_bundle, config("42,84", s2=False), delay_load=True).hidden_size == 2 * WIDTH


def test_class_that_does_not_fit_the_config_is_refused(fp32_bundle: Path) -> None:
    with pytest.raises(ConfigError, match=r"this is CLIPVisionTowerS2\. Use trtower\.CLIPVisionTowerDynamicS2"):
        CLIPVisionTowerS2(fp32_bundle, config(s2=False, dynamic_s2=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"s2_scales": ""}, "s2_scales='' is not a list of sizes"),
        ({"s2_scales": []}, "not a list of sizes"),
        ({"s2_scales": "42,big"}, "s2_scales='42,big' is not a list of sizes"),
        ({"s2_scales": [42, 84.0]}, "not a list of sizes"),
        ({"s2_scales": [True, 42]}, "not a list of sizes"),
        ({"s2_scales": [42, None]}, "not a list of sizes"),
        ({"s2_scales": 42}, "not a list of sizes"),
        ({"s2_scales": "0,42"}, "not a list of sizes"),
        ({"s2_scales": "-42,42"}, "not a list of sizes"),
        ({"s2_scales": "42,100"}, "s2_scales=42,100 cannot be cut into tiles of 42 pixels"),
        ({"s2_scales": "21,42", "s2_max_split_size": 42}, "s2_scales=21,42 cannot be cut"),
        ({"s2_max_split_size": 0}, "s2_max_split_size=0"),
        ({"s2_max_split_size": "42"}, "s2_max_split_size='42'"),
        ({"s2_resize_output_to_scale_idx": 3}, r"idx=3 is outside s2_scales=42,84,126; expected -3 to 2"),
        ({"s2_resize_output_to_scale_idx": -4}, "idx=-4"),
        ({"s2_resize_output_to_scale_idx": 0.0}, "idx=0.0 is not an index"),
        (
            {"s2_scales": "84,168"},
            r"read in tiles of 84 pixels, but .* accepts 42\. .*trtower export .* --image-size 84 ",
        ),
        ({"s2_scales": None}, r"\[336, 672, 1008\] are read in tiles of 336 pixels, but .* --image-size 336 "),
    ],
)
@pytest.mark.parametrize("kind", [CLIPVisionTowerS2, CLIPVisionTowerDynamicS2])
def test_bad_scales_get_one_clear_line(
    fp32_bundle: Path, kind: type[CLIPVisionTower], changes: dict[str, object], message: str
) -> None:
    dynamic = kind is CLIPVisionTowerDynamicS2
    with pytest.raises(ConfigError, match=message) as caught:
        kind(fp32_bundle, config(**{"s2": not dynamic, "dynamic_s2": dynamic, **changes}), delay_load=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(1, 3, 126, 84), r"shape \(1, 3, 126, 84\); .* square images \(B, 3, H, H\)"),
        (torch.zeros(3, 126, 126), r"shape \(3, 126, 126\)"),
        (torch.zeros(1, 4, 126, 126), r"shape \(1, 4, 126, 126\)"),
        ([torch.zeros(3, 126, 126), torch.zeros(3, 126, 84)], r"images\[1\] has shape \(3, 126, 84\)"),
        ([torch.zeros(3, 126, 126), torch.zeros(0, 3, 126, 126)], r"images\[1\] has shape \(0, 3, 126, 126\)"),
        ([], "empty list"),
        (torch.full((1, 3, 126, 126), float("nan")), "NaN or infinite"),
    ],
)
def test_bad_images_get_one_clear_line(fp32_bundle: Path, bad: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        CLIPVisionTowerS2(fp32_bundle, config())(bad)
    assert "\n" not in str(caught.value)
