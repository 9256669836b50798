"""A bundle of `--pixels uint8` takes bytes, and answers as the float bundle does after the image processor."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from tests.conftest import IMAGE_SIZE
from tests.export.checking import make_hashes_fit
from tests.runtime.installation import hugging_face
from tests.runtime.tower.test_image_processor import REFERENCES
from trtower import CLIPVisionTower, CLIPVisionTowerS2, VisionTower, build_vision_tower, install
from trtower.bundle.bundle import Bundle
from trtower.bundle.suggest import export_command
from trtower.cli import run
from trtower.errors import BundleError, ConfigError, InputError
from trtower.parity.golden import Golden
from trtower.parity.verify import verify
from trtower.spec import LAYOUTS, NHWC, PRECISIONS
from trtower_export.check.photographs import draw_images, load_photographs
from trtower_export.pipeline import ExportOptions

BACKENDS = ("onnxruntime-cpu", "openvino")


@pytest.fixture
def of_bytes(export: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that exports a bundle that takes bytes."""

    def get(precision: str = "fp32", layout: str = "nchw", **options: Any) -> Path:
        return export("clip", precision=precision, flavour="none", pixels="uint8", layout=layout, **options)

    return get


def pictures() -> list[Image.Image]:
    found = [each.image for each in (*load_photographs(None, limit=3).images, *draw_images(50))]
    return [*found, Image.new("L", (30, 90), 200), Image.new("RGBA", (60, 44), (200, 10, 30, 100))]


def prepare(tower: VisionTower, some: Any) -> torch.Tensor:
    pixels: torch.Tensor = tower.image_processor(some, return_tensors="pt")["pixel_values"]
    return pixels


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_are_those_of_the_float_bundle(
    export: Callable[..., Path], of_bytes: Callable[..., Path], backend: str, precision: str, layout: str
) -> None:
    if (backend, precision) == ("onnxruntime-cpu", "bf16"):
        pytest.skip("ONNX Runtime has no BF16 kernels for the CPU")
    floats = VisionTower.load(export("clip", precision=precision, flavour="none"), backend)
    tower = VisionTower.load(of_bytes(precision, layout), backend)
    pixels = prepare(tower, pictures())
    sides = (IMAGE_SIZE, IMAGE_SIZE)
    assert (pixels.dtype, pixels.shape[1:]) == (torch.uint8, (*sides, 3) if layout == NHWC else (3, *sides))
    features, expected = tower(pixels), floats(prepare(floats, pictures()).to(floats.dtype))
    assert features.dtype == tower.dtype == expected.dtype
    steps = 8 if (backend, precision) == ("openvino", "fp32") else 1  # OpenVINO rearranges FP32's first operations
    error = float((features - expected).float().norm() / expected.float().norm())
    assert error <= steps * torch.finfo(tower.dtype).eps


def test_transformers_makes_the_same_bytes_from_the_bundle(of_bytes: Callable[..., Path]) -> None:
    folder = of_bytes()
    theirs = REFERENCES["CLIPImageProcessor"].from_pretrained(folder)
    ours = VisionTower(folder).image_processor
    for picture in pictures()[:7]:
        expected = np.asarray(theirs(picture, return_tensors="np")["pixel_values"])
        assert expected.dtype == np.uint8
        assert np.array_equal(expected, ours(picture, return_tensors="np")["pixel_values"])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_precision_is_verified(of_bytes: Callable[..., Path], precision: str, layout: str) -> None:
    bundle = Bundle.open(of_bytes(precision, layout))
    assert Golden.read(bundle).pixel_values.dtype == torch.uint8
    certificate = verify(bundle, backend="openvino")
    assert certificate.passed, [bound.describe() for bound in certificate.bounds if not bound.holds]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_check_covers_it(
    of_bytes: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    folder = shutil.copytree(of_bytes("fp16", layout), tmp_path / "bundle")
    assert run(["check", str(folder), "--by-layer", "--report", str(tmp_path / "report")]) == 0
    assert "FP16 emulated" in capsys.readouterr().out
    assert "passed" in (tmp_path / "report" / "report.html").read_text()


def test_graph_that_rescales_wrongly_is_found(of_bytes: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(of_bytes(), tmp_path / "bundle"))
    model = onnx.load(folder / "tower.onnx", load_external_data=False)
    first, *_ = (node for node in model.graph.node if node.op_type == "Div" and node.name.startswith("pixels"))
    first.op_type = "Mul"
    onnx.save(model, folder / "tower.onnx")
    make_hashes_fit(folder, "tower.onnx")
    assert not verify(Bundle.open(folder), backend="onnxruntime-cpu").passed


def test_lists_tiles_and_out(of_bytes: Callable[..., Path]) -> None:
    tower = VisionTower.load(of_bytes("fp32", NHWC))
    pixels = prepare(tower, pictures()[:4])
    expected = tower(pixels)
    listed = tower(list(pixels))
    assert [each.shape for each in listed] == [(1, 9, 64)] * 4
    torch.testing.assert_close(torch.cat(listed), expected)
    torch.testing.assert_close(tower(pixels.unflatten(0, (2, 2))).flatten(0, 1), expected)
    out = torch.empty(4, 9, 64)
    assert tower(pixels, out=out) is out
    torch.testing.assert_close(out, expected)
    assert tower.read_tokens(pixels).shape == (4, 10, 64)
    assert tower.warmup().dtype == torch.float32


def test_floats_are_refused_with_the_way_out(of_bytes: Callable[..., Path], fp32_bundle: Path) -> None:
    tower, floats = VisionTower.load(of_bytes()), VisionTower.load(fp32_bundle)
    kind = r"images has dtype torch\.float16; expected torch\.uint8: this bundle takes bytes.*without --pixels uint8"
    with pytest.raises(InputError, match=kind):
        tower(prepare(floats, pictures()[0]).half())
    with pytest.raises(InputError, match=r"dtype torch\.int64; expected torch\.uint8"):
        tower(prepare(tower, pictures()[0]).long())


def test_bytes_are_refused_by_a_bundle_of_floats(of_bytes: Callable[..., Path], fp32_bundle: Path) -> None:
    pixels = prepare(VisionTower(of_bytes()), pictures()[0])
    with pytest.raises(InputError, match=r"torch\.uint8; .*takes prepared floats.* export it with --pixels uint8"):
        VisionTower.load(fp32_bundle)(pixels)


def test_other_layout_is_refused_with_how_to_turn_it(of_bytes: Callable[..., Path], fp32_bundle: Path) -> None:
    tower = VisionTower.load(of_bytes("fp32", NHWC))
    images = prepare(VisionTower(of_bytes()), pictures()[0])
    refusal = (
        r"has shape \(1, 3, 42, 42\); this engine accepts \(B, 42, 42, 3\).* Turn them: images\.movedim\(-3, -1\)\."
    )
    with pytest.raises(InputError, match=refusal):
        tower(images)
    assert tower(images.movedim(-3, -1)).shape == (1, 9, 64)
    with pytest.raises(InputError, match=r"accepts \(B, 3, 42, 42\).* Turn them: images\.movedim\(-1, -3\)\."):
        VisionTower.load(of_bytes())(images.movedim(-3, -1))
    with pytest.raises(InputError, match=r"dtype torch\.float32; expected torch\.uint8"):  # before the shape
        tower(prepare(VisionTower(fp32_bundle), pictures()[0]))


def test_processor_gives_bytes_and_nothing_else(of_bytes: Callable[..., Path]) -> None:
    processor = VisionTower(of_bytes()).image_processor
    frame = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    expected = processor(frame, return_tensors="np")["pixel_values"]
    assert np.array_equal(processor([frame])["pixel_values"][0], expected[0])
    for dtype in (np.float32, np.int16):
        with pytest.raises(InputError, match=r"takes bytes from 0 to 255: pass images\.astype\(np\.uint8\)"):
            processor(frame.astype(dtype))
    for floats in (frame.astype(np.float32) / 255, (frame > 100).astype(np.float32)):
        with pytest.raises(InputError, match=r"pass \(images \* 255\)\.round\(\)\.astype\(np\.uint8\)"):
            processor(floats)
    for asked in ({"do_normalize": True}, {"do_rescale": True}, {"image_mean": 0.5}):
        with pytest.raises(ConfigError, match=f"{next(iter(asked))} is not for this bundle"):
            processor(frame, **asked)


def test_default_name_is_another(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--flavour", "none", "--precision", "fp32", "--no-check", "--pixels", "uint8", "--layout", "nhwc"]
    assert run(["export", str(checkpoints["clip"]), *options]) == 0
    captured = capsys.readouterr()
    assert Bundle.open("engines/tiny-clip-uint8").manifest.spec.layout == NHWC
    assert "at 42 pixels, as bytes in NHWC, in fp32" in " ".join(captured.err.split())
    assert "tower.encode(" in captured.out
    assert "install" not in captured.out


def test_arrays_with_negative_strides_are_pictures_too(of_bytes: Callable[..., Path]) -> None:
    tower = VisionTower.load(of_bytes("fp32", NHWC))
    bgr = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    flipped = prepare(tower, bgr[::-1, :, ::-1])
    assert torch.equal(flipped, prepare(tower, np.ascontiguousarray(bgr[::-1, :, ::-1])))
    assert tower(flipped).shape == (1, 9, 64)
    with pytest.raises(InputError, match="is a ndarray"):
        tower(bgr[None, :42, :42, ::-1])


def test_several_scales_need_floats(of_bytes: Callable[..., Path]) -> None:
    args = SimpleNamespace(mm_vision_select_layer=-2, s2=True, s2_scales=f"{IMAGE_SIZE},{2 * IMAGE_SIZE}")
    with pytest.raises(ConfigError, match="takes bytes, but several scales resize prepared floats"):
        CLIPVisionTowerS2(of_bytes(), args)


def test_model_of_llava_needs_floats(of_bytes: Callable[..., Path]) -> None:
    config = SimpleNamespace(mm_vision_select_layer=-2, mm_vision_tower=str(of_bytes()))
    with pytest.raises(ConfigError, match="takes bytes, but the code of this model prepares floats"):
        build_vision_tower(config)
    assert CLIPVisionTower.load(of_bytes()).encode(pictures()[0]).shape == (1, 9, 64)


def test_loaded_model_needs_floats(of_bytes: Callable[..., Path]) -> None:
    model = hugging_face.make("llava")
    before = set(map(id, model.modules()))
    with pytest.raises(ConfigError, match="takes pixels as bytes, but this model prepares floats"):
        install(model, of_bytes())
    assert set(map(id, model.modules())) == before


def test_suggested_export_makes_the_same_kind(of_bytes: Callable[..., Path]) -> None:
    bundle = Bundle.open(of_bytes("fp32", NHWC))
    assert "--pixels uint8 --layout nhwc" in export_command(bundle, -3, IMAGE_SIZE)


def test_build_notes_and_inspection_say_what_goes_in(
    of_bytes: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = of_bytes("fp32", NHWC)
    assert "(batch, 42, 42, 3) has the type uint8: RGB, resized and cropped as" in (folder / "BUILD.md").read_text()
    assert run(["inspect", str(folder)]) == 0
    assert "pixel_values (batch, 42, 42, 3) uint8" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"layout": "nhwc"}, "--layout nhwc needs --pixels uint8"),
        ({"pixels": "bytes"}, "pixels"),
        ({"pixels": "uint8", "layout": "hwc"}, "layout"),
    ],
)
def test_other_kinds_are_refused(options: dict[str, str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        ExportOptions(**options)  # type: ignore[arg-type]


def test_manifest_that_contradicts_its_graph_is_refused(of_bytes: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(of_bytes(), tmp_path / "bundle"))
    text = (folder / "tower.json").read_text()
    (folder / "tower.json").write_text(text.replace('"pixels": "uint8"', '"pixels": "float"'))
    with pytest.raises(BundleError, match="the spec and precision require"):
        Bundle.open(folder)
