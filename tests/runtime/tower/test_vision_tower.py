"""The tower returns what LLaVA's eager tower returns."""

import json
import logging
import re
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers
from PIL import Image

import trtower
from trtower import CLIPVisionTower, VisionTower, build_vision_tower
from trtower.bundle.bundle import Bundle
from trtower.errors import BackendError, BundleError, ConfigError, InputError
from trtower.runners.choose import choose
from trtower.tower.image_processor import ImageProcessor
from trtower.tower.pixel_range import expected_range
from trtower_export.check.certify import certify
from trtower_export.check.photographs import load_photographs
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.console import LoggedProgress

SIZE, PATCHES, WIDTH, MAX = 42, 9, 64, 4

Eager = Callable[[torch.Tensor], torch.Tensor]

FP32_TOLERANCE = 2e-5
"""ONNX Runtime and PyTorch sum in different orders; values here are of the order of 1."""


@pytest.fixture(scope="module")
def tower(fp32_bundle: Path) -> VisionTower:
    return VisionTower.load(fp32_bundle)


@pytest.fixture(scope="module")
def eager(checkpoints: dict[str, Path]) -> Callable[[torch.Tensor], torch.Tensor]:
    """LLaVA's CLIPVisionTower.forward for one tensor, `patch` of state -2."""
    model = transformers.CLIPVisionModel.from_pretrained(checkpoints["clip"]).eval()

    @torch.no_grad()
    def forward(images: torch.Tensor) -> torch.Tensor:
        return model(images.float(), output_hidden_states=True).hidden_states[-2][:, 1:].to(images.dtype)

    return forward


def images(batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch)).to(dtype)


def config(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(**{"mm_vision_select_layer": -2, **changes})


def test_features_are_those_of_the_eager_tower(tower: VisionTower, eager: Eager) -> None:
    assert torch.allclose(tower(images(3)), eager(images(3)), atol=FP32_TOLERANCE)


def test_list_gives_a_list_in_order(tower: VisionTower, eager: Eager) -> None:
    batch = images(MAX + 2)
    answers = tower(list(batch))
    assert isinstance(answers, list)
    assert [tuple(a.shape) for a in answers] == [(1, PATCHES, WIDTH)] * (MAX + 2)
    for answer, image in zip(answers, batch, strict=True):
        assert torch.allclose(answer, eager(image[None]), atol=FP32_TOLERANCE)


@pytest.fixture
def sizes(tower: VisionTower, count_calls: Callable[[VisionTower], list[int]]) -> list[int]:
    """How many images each engine call ran."""
    return count_calls(tower)


def test_list_runs_as_batches(tower: VisionTower, sizes: list[int]) -> None:
    tower(list(images(MAX + 2)))
    assert sizes == [MAX, 2]


def test_tiles_keep_their_places(tower: VisionTower, eager: Eager, sizes: list[int]) -> None:
    tiles = images(6).unflatten(0, (2, 3))
    features = tower(tiles)
    assert sizes == [MAX, 2]
    assert features.shape == (2, 3, PATCHES, WIDTH)
    for row, row_tiles in zip(features, tiles, strict=True):
        assert torch.allclose(row, eager(row_tiles), atol=FP32_TOLERANCE)
    # A view whose tiles are not contiguous in memory.
    assert torch.equal(tower(tiles.transpose(0, 1)), features.transpose(0, 1))
    assert torch.equal(tower(tiles.transpose(0, 1).double()), features.transpose(0, 1).double())


def test_list_of_images_and_tiles_keeps_its_form(tower: VisionTower, eager: Eager, sizes: list[int]) -> None:
    pixels = images(7)
    mixed = [pixels[:3], pixels[3], pixels[4:6].double(), pixels[6:7].half()]
    answers = tower(mixed)
    assert sizes == [MAX, 3]
    assert [tuple(a.shape) for a in answers] == [(t, PATCHES, WIDTH) for t in (3, 1, 2, 1)]
    assert [a.dtype for a in answers] == [torch.float32, torch.float32, torch.float64, torch.float16]
    tolerances = [FP32_TOLERANCE] * 3 + [5e-3]  # half a unit of FP16 at 8, the largest feature
    for answer, tiles, tolerance in zip(answers, mixed, tolerances, strict=True):
        assert torch.allclose(answer, eager(tiles.view(-1, 3, SIZE, SIZE)), atol=tolerance)


def test_single_tiles_in_a_list_stay_a_list(tower: VisionTower) -> None:
    tiles = images(3)
    (answer,) = tower([tiles])
    assert torch.equal(answer, tower(tiles))
    (answer,) = tower((tiles[0],))
    assert torch.equal(answer, tower(tiles[:1]))


def test_pixels_on_the_device_are_not_copied(tower: VisionTower, monkeypatch: pytest.MonkeyPatch) -> None:
    addresses: list[int] = []
    monkeypatch.setattr(tower.runner, "run", lambda pixel_values, _: addresses.append(pixel_values.data_ptr()))
    tiles = images(4).unflatten(0, (2, 2))
    for batch in (tiles[0], tiles):
        tower(batch)
        assert addresses.pop() == batch.data_ptr()


def test_batch_over_the_maximum_is_run_in_pieces(tower: VisionTower, eager: Eager, sizes: list[int]) -> None:
    batch = images(2 * MAX + 3)
    assert torch.allclose(tower(batch), eager(batch), atol=FP32_TOLERANCE)
    assert sizes == [MAX, MAX, 3]


def test_remainder_below_the_minimum_is_still_right(export: Callable[..., Path], eager: Eager) -> None:
    profile = trtower.spec.BatchProfile(min=3, opt=3, max=4)
    tower = VisionTower.load(export("clip", precision="fp32", flavour="none", profiles=(profile,)))
    batch = images(5)
    assert torch.allclose(tower(batch), eager(batch), atol=FP32_TOLERANCE)
    with pytest.raises(InputError, match="batch 2; this engine accepts 3 to 4"):
        tower(images(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_features_come_in_the_dtype_of_the_images(tower: VisionTower, dtype: torch.dtype) -> None:
    assert tower(images(1, dtype)).dtype == dtype
    mixed = tower([images(1)[0], images(1, dtype)[0]])
    assert [answer.dtype for answer in mixed] == [torch.float32, dtype]


def test_features_carry_no_gradient(tower: VisionTower) -> None:
    assert not tower(images(1).requires_grad_()).requires_grad


def test_strided_views_are_read_correctly(tower: VisionTower) -> None:
    wide = torch.randn(2, 3, SIZE, 2 * SIZE)
    assert torch.equal(tower(wide[..., ::2]), tower(wide[..., ::2].contiguous()))


def test_features_are_not_overwritten_by_the_next_call(tower: VisionTower) -> None:
    first = tower(images(1))
    kept = first.clone()
    tower(images(2))
    assert torch.equal(first, kept)


def test_cls_patch_keeps_the_cls_token(fp32_bundle: Path, tower: VisionTower) -> None:
    both = CLIPVisionTower(fp32_bundle, config(mm_vision_select_feature="cls_patch"))
    assert both(images(2)).shape == (2, PATCHES + 1, WIDTH)
    assert torch.equal(both(images(2))[:, 1:], tower(images(2)))
    assert both.num_patches == PATCHES


def test_eight_threads_get_the_answers_of_one(tower: VisionTower) -> None:
    batches = [images(1 + i % MAX) * (i + 1) for i in range(8)]
    expected = [tower(batch) for batch in batches]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            if not torch.equal(tower(batches[index]), expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_stays_flat_over_a_thousand_calls(tower: VisionTower) -> None:
    def grown(calls: int) -> int:
        before = psutil.Process().memory_info().rss
        for index in range(calls):
            tower(batches[index % MAX])
        return psutil.Process().memory_info().rss - before

    batches = [images(n + 1) for n in range(MAX)]
    grown(100)
    # One leaked (4, 10, 64) FP32 output per call would be 10 MB.
    assert grown(1000) < 4_000_000


def test_config_answers_before_loading(fp32_bundle: Path) -> None:
    tower = CLIPVisionTower(fp32_bundle, config(), delay_load=True)
    assert not tower.is_loaded
    assert (tower.hidden_size, tower.num_patches, tower.num_patches_per_side, tower.image_size) == (WIDTH, 9, 3, SIZE)
    assert tower.config.hidden_size == WIDTH
    assert tower.config.num_hidden_layers == 4
    assert tower.cfg_only.patch_size == 14
    assert tower.vision_tower_name == str(fp32_bundle)
    assert (tower.select_layer, tower.select_feature) == (-2, "patch")
    with pytest.raises(BackendError, match=r"is not loaded, or was closed\. Call load_model\(\)"):
        tower(images(1))
    tower.load_model()
    assert tower.is_loaded
    assert tower(images(1)).shape == (1, PATCHES, WIDTH)


def test_bundle_that_failed_its_check_warns_when_it_is_loaded(
    fp32_bundle: Path, tmp_path: Path, checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    bundle = Bundle.open(shutil.copytree(fp32_bundle, tmp_path / "b"))
    photographs = load_photographs(None, limit=1)
    passing = certify(
        bundle,
        open_checkpoint(str(checkpoints["clip"])),
        photographs,
        progress=LoggedProgress(),
        quick=True,
        backend="onnxruntime-cpu",
    )
    VisionTower.load(bundle.add_certificate(passing).path, "onnxruntime-cpu")
    assert "failed its check" not in caplog.text
    failed = replace(passing, passed=False, bounds=tuple(replace(bound, holds=False) for bound in passing.bounds))
    VisionTower.load(bundle.add_certificate(failed).path, "onnxruntime-cpu")
    assert (
        f"failed its check on onnxruntime-cpu. To see which bounds it missed: trtower inspect {bundle.path}"
        in caplog.text
    )


def test_second_load_does_nothing(fp32_bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    tower = CLIPVisionTower(fp32_bundle, config())
    runner = tower.runner
    with caplog.at_level(logging.INFO, logger="trtower"):
        tower.load_model(device_map="auto")
    assert tower.runner is runner
    assert "already loaded" in caplog.text


def test_checkpoint_trained_with_its_tower_loads_at_once(fp32_bundle: Path) -> None:
    assert CLIPVisionTower(fp32_bundle, config(unfreeze_mm_vision_tower=True), delay_load=True).is_loaded


def test_next_passes_its_config_by_another_name(fp32_bundle: Path) -> None:
    assert CLIPVisionTower(fp32_bundle, vision_tower_cfg=config(), delay_load=True).select_layer == -2


def test_positive_code_of_the_same_layer_is_accepted(fp32_bundle: Path) -> None:
    assert CLIPVisionTower(fp32_bundle, config(mm_vision_select_layer=3), delay_load=True).select_layer == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"mm_vision_select_layer": -30},
        {"mm_vision_select_layer": None},
        {"mm_vision_select_layer": "-2"},
        {"mm_vision_select_layer": [-2, -3]},
        {"mm_vision_select_feature": "cls"},
        {"mm_vision_select_feature": "slicefour_patch"},
    ],
)
def test_args_that_no_tower_can_read_are_refused(fp32_bundle: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        CLIPVisionTower(fp32_bundle, config(**changes), delay_load=True)


def test_args_without_a_layer_are_refused(fp32_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="no mm_vision_select_layer"):
        CLIPVisionTower(fp32_bundle)


def test_builder_reads_either_name(fp32_bundle: Path) -> None:
    for name in ("mm_vision_tower", "vision_tower"):
        tower = build_vision_tower(config(**{name: str(fp32_bundle)}), delay_load=True)
        assert isinstance(tower, CLIPVisionTower)


def test_builder_refuses_what_it_cannot_build(fp32_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither mm_vision_tower nor vision_tower"):
        build_vision_tower(config())
    for flag, name in (("s2", "CLIPVisionTowerS2"), ("dynamic_s2", "CLIPVisionTowerDynamicS2")):
        with pytest.raises(
            ConfigError, match=rf"needs {name}; this is .* trtower\.{name}, or trtower\.build_vision_tower"
        ):
            CLIPVisionTower(fp32_bundle, config(**{flag: True}), delay_load=True)
    with pytest.raises(BundleError, match="is not a bundle"):
        build_vision_tower(config(mm_vision_tower=str(tmp_path)))


def test_tower_works_inside_a_model(fp32_bundle: Path) -> None:
    model = torch.nn.Module()
    model.vision_tower = VisionTower.load(fp32_bundle)
    model.half().eval().requires_grad_(requires_grad=False)
    model.to(device="cpu", dtype=torch.bfloat16)
    tower = model.vision_tower
    assert tower.dtype == torch.float32 == next(tower.parameters()).dtype
    assert tower.device == torch.device("cpu") == next(tower.parameters()).device
    assert model.state_dict() == {}
    assert tower(images(1, torch.float16)).dtype == torch.float16


def test_tower_loads_inside_from_pretrained(fp32_bundle: Path, tmp_path: Path) -> None:
    """transformers makes models on the meta device; LLaVA loads the tower afterwards."""

    class Llava(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self, config: transformers.PretrainedConfig, *, delay_load: bool = True) -> None:
            super().__init__(config)
            self.projector = torch.nn.Linear(WIDTH, 8)
            args = SimpleNamespace(mm_vision_select_layer=-2)
            self.vision_tower = CLIPVisionTower(fp32_bundle, args, delay_load=delay_load)
            self.post_init()  # type: ignore[no-untyped-call]

    Llava(transformers.PretrainedConfig()).save_pretrained(tmp_path)
    model = Llava.from_pretrained(tmp_path)
    model.vision_tower.load_model()
    model.to(torch.float16)  # type: ignore[arg-type] # mypy misreads transformers' decorated `to`
    assert model.vision_tower.dummy_feature.device == torch.device("cpu")
    assert model.vision_tower(images(1, torch.float16)).shape == (1, PATCHES, WIDTH)
    assert Llava.from_pretrained(tmp_path, delay_load=False).vision_tower.is_loaded


def test_state_dict_can_be_loaded_again(fp32_bundle: Path) -> None:
    model = torch.nn.ModuleDict({"vision_tower": VisionTower.load(fp32_bundle)})
    model.load_state_dict(model.state_dict())


def test_weights_for_the_tower_are_reported_as_unexpected(fp32_bundle: Path) -> None:
    model = torch.nn.ModuleDict({"vision_tower": VisionTower.load(fp32_bundle)})
    weights = {"vision_tower.vision_tower.embeddings.weight": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict(weights)
    assert model.load_state_dict(weights, strict=False).unexpected_keys == list(weights)


def test_casts_and_modes_return_the_tower(fp32_bundle: Path) -> None:
    tower = VisionTower.load(fp32_bundle)
    assert tower.half() is tower.eval() is tower.requires_grad_(requires_grad=False) is tower
    assert tower.to(device="cpu", dtype=torch.float16) is tower


def test_dummy_feature_is_one_row_of_zeros(tower: VisionTower) -> None:
    assert torch.equal(tower.dummy_feature, torch.zeros(1, WIDTH))


def test_feature_select_accepts_an_eager_output(tower: VisionTower, checkpoints: dict[str, Path]) -> None:
    model = transformers.CLIPVisionModel.from_pretrained(checkpoints["clip"]).eval()
    with torch.no_grad():
        output = model(images(2), output_hidden_states=True)
    assert torch.equal(tower.feature_select(output), output.hidden_states[-2][:, 1:])


def test_image_processor_makes_what_the_tower_accepts(tower: VisionTower) -> None:
    picture = torch.randint(0, 256, (60, 80, 3), dtype=torch.uint8).numpy()
    pixel_values = tower.image_processor.preprocess(picture, return_tensors="pt")["pixel_values"]
    assert tower(pixel_values).shape == (1, PATCHES, WIDTH)


def test_backend_names_what_runs(fp32_bundle: Path) -> None:
    tower = VisionTower.load(fp32_bundle, "onnxruntime-cpu")
    assert tower.backend.startswith("onnxruntime ")
    assert tower.backend.endswith(", CPU")
    assert tower.backend in repr(tower)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 3, 41, 42), r"shape \(2, 3, 41, 42\); this engine accepts \(B, 3, 42, 42\)"),
        (torch.zeros(3, 42, 42), r"this engine accepts \(B, 3, 42, 42\)"),
        (torch.zeros(0, 3, 42, 42), r"shape \(0, 3, 42, 42\)"),
        (torch.zeros(1, 1, 1, 3, 42, 42), r"shape \(1, 1, 1, 3, 42, 42\)"),
        (torch.zeros(2, 0, 3, 42, 42), r"shape \(2, 0, 3, 42, 42\); .* or tiles \(B, T, 3, 42, 42\)"),
        (torch.zeros(1, 3, 42, 42, dtype=torch.uint8), r"dtype torch\.uint8; expected floating-point"),
        (torch.zeros(1, 3, 42, 42, device="meta"), "meta device"),
        (torch.zeros(1, 3, 42, 42).to_sparse(), "layout torch.sparse_coo; expected a dense tensor"),
        ([], "images is an empty list"),
        ([torch.zeros(3, 42, 42), torch.zeros(1, 2, 3, 42, 42)], r"images\[1\] has shape \(1, 2, 3, 42, 42\)"),
        ([torch.zeros(0, 3, 42, 42)], r"images\[0\] has shape \(0, 3, 42, 42\); .* tiles \(T, 3, 42, 42\) in a list"),
        ([torch.zeros(3, 42, 42), torch.zeros(2, 3, 42, 41)], r"images\[1\] has shape \(2, 3, 42, 41\)"),
        ([torch.zeros(3, 42, 42), torch.zeros(42, 42)], r"images\[1\] has shape \(42, 42\)"),
        ([torch.zeros(2, 3, 42, 42), torch.zeros(3, 42, 42, dtype=torch.int64)], r"images\[1\] has dtype torch\.int64"),
        ([torch.zeros(3, 42, 42), "a.png"], r"images\[1\] is a str"),
        ("a.png", "images is a str"),
        (torch.full((1, 3, 42, 42), float("nan")), "5292 values that are NaN or infinite"),
        ([torch.full((3, 42, 42), float("inf"))], "5292 values that are NaN or infinite"),
    ],
)
def test_bad_images_get_one_clear_line(tower: VisionTower, bad: object, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        tower(bad)
    assert "\n" not in str(caught.value)


PICTURE = np.random.default_rng(3).integers(0, 256, (50, 60, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    "bad",
    [
        Image.fromarray(PICTURE),
        [Image.fromarray(PICTURE)],
        PICTURE,
        PICTURE[None],
        torch.from_numpy(PICTURE),
        torch.from_numpy(PICTURE)[None],
        [torch.from_numpy(PICTURE)],
        None,
        {"pixel_values": [PICTURE]},
    ],
    ids=["PIL", "PIL in a list", "array", "batch", "tensor", "tensors", "tensor in a list", "nothing", "unstacked"],
)
def test_error_for_pictures_quotes_the_call_that_prepares_them(tower: VisionTower, bad: object) -> None:
    with pytest.raises(InputError, match=r"tower\(tower\.image_processor\(pictures, return_tensors='pt'\)") as caught:
        tower(bad)
    assert "\n" not in str(caught.value)


def test_output_of_an_image_processor_is_accepted(tower: VisionTower) -> None:
    prepared = tower.image_processor(Image.fromarray(PICTURE), return_tensors="pt")
    expected = tower(prepared["pixel_values"])
    theirs = transformers.BatchFeature(dict(prepared))
    for features in (tower(prepared), tower(**prepared), tower(theirs), tower(**theirs)):
        assert torch.equal(features, expected)


def test_other_inputs_beside_pixels_are_refused_by_name(tower: VisionTower) -> None:
    with pytest.raises(InputError, match=r"holds pixel_values, image_sizes; .* tower\(inputs\['pixel_values'\]\)"):
        tower({"pixel_values": images(1), "image_sizes": [[42, 42]]})
    with pytest.raises(InputError, match="got both images and pixel_values; expected exactly one"):
        tower(images(1), pixel_values=images(1))


@pytest.mark.parametrize(
    ("pixels", "values"),
    [
        (torch.rand(2, 3, SIZE, SIZE), r"from \S+ to (1|0\.9\d*)"),
        (torch.rand(2, 3, SIZE, SIZE) * 255, r"from \S+ to 25\d"),
    ],
)
def test_pixels_that_nobody_normalised_warn_once(
    fp32_bundle: Path, caplog: pytest.LogCaptureFixture, pixels: torch.Tensor, values: str
) -> None:
    tower = VisionTower.load(fp32_bundle)
    tower(torch.zeros(1, 3, SIZE, SIZE))  # LLaVA's, for a sample without a picture
    tower(tower.image_processor(PICTURE, return_tensors="pt")["pixel_values"])
    tower(images(2))
    assert not caplog.records
    tower(pixels)
    tower(list(pixels))
    (record,) = caplog.records
    assert re.search(
        rf"{values}; .*tiny-clip expects about -1\.79 to 2\.15, rescaled and normalised", record.getMessage()
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (-1.7923, 2.1459)),
        ({"image_mean": 0.5, "image_std": 0.5}, (-1, 1)),
        ({"do_normalize": False}, (0, 1)),
        ({"do_normalize": False, "do_rescale": False}, (0, 255)),
    ],
)
def test_expected_range_is_that_of_the_image_processor(
    settings: dict[str, object], expected: tuple[float, float]
) -> None:
    assert expected_range(ImageProcessor(settings)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", [VisionTower, CLIPVisionTower])
def test_load_returns_the_class_that_it_is_called_on(fp32_bundle: Path, kind: type[VisionTower]) -> None:
    for load in (kind.load, kind.from_pretrained):
        tower = load(fp32_bundle, "onnxruntime-cpu", select_feature="cls_patch")
        assert type(tower) is kind
        assert tower.is_loaded
        assert tower(images(1)).shape == (1, PATCHES + 1, WIDTH)
    assert kind.load(fp32_bundle).select_layer == 3


def test_tower_stays_where_it_is_if_torch_cannot_move_it(tower: VisionTower) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(BackendError, match="cannot be moved from cpu: Torch not compiled with CUDA enabled"):
        tower.to("cuda")
    assert tower(images(1)).shape == (1, PATCHES, WIDTH)


def test_large_finite_images_are_not_reported_as_infinite(tower: VisionTower) -> None:
    # Their sum overflows FP32, but their values do not.
    assert tower(torch.full((1, 3, SIZE, SIZE), 3e38)).shape == (1, PATCHES, WIDTH)


def test_pixels_that_overflow_the_engine_are_refused(clip_bundle: Path) -> None:
    with pytest.raises(InputError, match=r"infinite in torch\.float16"):
        VisionTower.load(clip_bundle)(torch.full((1, 3, SIZE, SIZE), 1e5))


def test_finite_check_can_be_disabled(fp32_bundle: Path) -> None:
    tower = VisionTower.load(fp32_bundle, check_finite=False)
    assert tower(torch.full((1, 3, SIZE, SIZE), float("nan"))).isnan().all()


def test_device_map_of_one_device_is_accepted(fp32_bundle: Path) -> None:
    tower = CLIPVisionTower(fp32_bundle, config(), delay_load=True)
    with pytest.raises(ConfigError, match="splits the tower"):
        tower.load_model(device_map={"stem": "cpu", 1: "cuda:0"})
    for wrong in (257, -1, True, {"": 257}, {"": [1]}, [1], "balanced"):
        with pytest.raises((ConfigError, BackendError), match="device"):
            tower.load_model(device_map=wrong)
    tower.load_model(device_map={"": "cpu"})
    assert tower.device == torch.device("cpu")


def test_device_from_a_map_is_kept_when_the_tower_is_reopened(
    fp32_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[object] = []

    def watch(bundle: Bundle, backend: str, device: Any, **options: Any) -> Any:
        requested.append(device)
        return choose(bundle, backend, device, **options)

    monkeypatch.setattr("trtower.tower.engine.choose", watch)
    tower = CLIPVisionTower(fp32_bundle, config(), delay_load=True)
    tower.load_model(device_map="cpu")
    tower.close()
    tower.load_model()
    assert requested == [torch.device("cpu")] * 2


def test_config_is_what_hugging_face_wrote(fp32_bundle: Path, tower: VisionTower) -> None:
    assert tower.config.to_dict() == json.loads((fp32_bundle / "config.json").read_text())


@pytest.mark.parametrize(("picture", "mean"), [(128, None), (200, 0.5), (130, 0.5), (255, 0.5)])
def test_bright_pictures_do_not_warn(
    fp32_bundle: Path, caplog: pytest.LogCaptureFixture, picture: int, mean: float | None
) -> None:
    tower = VisionTower.load(fp32_bundle)
    if mean:
        tower.image_processor.image_mean = tower.image_processor.image_std = [mean] * 3
    bright = np.linspace(picture, 255 if mean else picture, 50 * 60 * 3).reshape(50, 60, 3).astype(np.uint8)
    tower(tower.image_processor(bright, return_tensors="pt")["pixel_values"])
    assert not caplog.records


def test_invalid_processor_settings_do_not_fail_a_call(tower: VisionTower, fp32_bundle: Path) -> None:
    for invalid in (None, [0.1, 0.2], "a"):
        tower = VisionTower.load(fp32_bundle)
        tower.image_processor.image_mean = invalid  # type: ignore[assignment]
        assert tower(images(1)).shape == (1, PATCHES, WIDTH)


def test_requires_grad_works_after_loading_in_inference_mode(fp32_bundle: Path) -> None:
    tower = CLIPVisionTower(fp32_bundle, config(), delay_load=True)
    with torch.inference_mode():
        tower.load_model()
    assert tower.requires_grad_() is tower


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("device", [0, 1, "cpu:1"])
def test_index_of_a_missing_device_is_refused(fp32_bundle: Path, device: object) -> None:
    with pytest.raises((BackendError, ConfigError), match=r"no GPU here|'cpu:1' has no backend"):
        VisionTower.load(fp32_bundle, device=device)  # type: ignore[arg-type]


def test_engine_of_another_type_is_refused(fp32_bundle: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected trtower\.EngineOptions"):
        VisionTower.load(fp32_bundle, engine={"contexts": 4})  # type: ignore[arg-type]
