"""Pictures are read as transformers reads them, or refused in one line that names the picture and the reason."""

import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from PIL import Image, ImageMode, ImageSequence
from skimage import data

from tests.runtime.tower.test_image_processor import assert_same, needs_compositing, noise, reference
from trtower.errors import ConfigError, InputError
from trtower.tower.image_processor import ImageProcessor

MODES = sorted({*Image.MODES, "I;16", "I;16B", "LA", "La", "PA", "RGBa"})  # Pillow 10 does not list the last six
DEEP = [mode for mode in MODES if ImageMode.getmode(mode).typestr not in ("|b1", "|u1")]
EIGHT_BIT = [mode for mode in MODES if mode not in DEEP]
TRANSPARENT = ("LA", "La", "PA", "RGBA", "LAB")  # transformers 5 reads LAB's second band as alpha
OFF = {"do_resize": False, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
AS_THEY_ARE = {"do_convert_rgb": False, "do_normalize": False}
PIXELS = noise(40, 60)
PICTURE = Image.fromarray(PIXELS)
MEGABYTE = 2**20


def in_mode(mode: str) -> Image.Image:
    """Make a picture of any mode, with varying alpha if the mode has alpha."""
    by_way_of = {"La": ("LA",), "LA": ("LA",), "PA": ("LA",), "RGBa": (), "RGBA": ()}
    picture = Image.fromarray(noise(120, 201, 4))
    for step in by_way_of.get(mode, ("L",) if mode in DEEP else ("RGB",)):
        picture = picture.convert(step)
    return picture.convert(mode)


def needs(mode: str) -> object:
    return pytest.param(mode, marks=needs_compositing) if mode in TRANSPARENT else mode


def test_every_mode_of_pillow_is_one_of_the_two_kinds() -> None:
    assert {"I", "F", "I;16", "I;16B"} <= set(DEEP)
    assert {"1", "L", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB", "LA", "La"} <= set(EIGHT_BIT)


@pytest.mark.parametrize("mode", [needs(mode) for mode in EIGHT_BIT if mode != "La"])
def test_every_mode_of_8_bits_gives_the_pixels_of_transformers(mode: str) -> None:
    picture = in_mode(mode)
    assert picture.mode == mode
    assert_same(ImageProcessor({})(picture).pixel_values[0], reference({})(picture).pixel_values[0])


@needs_compositing
def test_premultiplied_grey_gives_the_pixels_of_plain_alpha() -> None:
    picture = in_mode("La")
    assert_same(ImageProcessor({})(picture).pixel_values[0], reference({})(picture.convert("LA")).pixel_values[0])


@needs_compositing
@pytest.mark.parametrize("mode", [mode for mode in EIGHT_BIT if mode not in ("1", "P", "PA")])
def test_every_unconverted_mode_gives_the_pixels_of_transformers(mode: str) -> None:
    picture = in_mode(mode)
    assert_same(ImageProcessor(AS_THEY_ARE)(picture).pixel_values[0], reference(AS_THEY_ARE)(picture).pixel_values[0])


@pytest.mark.parametrize("settings", [{}, AS_THEY_ARE, OFF], ids=["defaults", "not converted", "no steps"])
@pytest.mark.parametrize("mode", DEEP)
def test_deeper_mode_is_refused_with_its_position_and_the_line_that_scales_it(
    mode: str, settings: dict[str, Any]
) -> None:
    line = r"PIL\.Image\.fromarray\(\(np\.asarray\(picture\) / white \* 255\)\.clip\(0, 255\)\.astype\(np\.uint8\)\)"
    with pytest.raises(InputError, match=rf"^images\[1\]\[0\]: mode {mode} does not have 8 bits per channel.*{line}$"):
        ImageProcessor(settings)([PICTURE, [in_mode(mode)]])


def test_line_that_scales_a_deeper_mode_works() -> None:
    picture = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 16)  # 12 bits in a 16-bit picture
    assert picture.mode == "I;16"
    scaled = Image.fromarray((np.asarray(picture) / 4080 * 255).clip(0, 255).astype(np.uint8))
    expected = ImageProcessor({})(PICTURE.getchannel(0)).pixel_values[0]
    assert_same(ImageProcessor({})(scaled).pixel_values[0], expected)


def test_16_bits_of_a_file_are_refused(tmp_path: Path) -> None:
    Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as picture, pytest.raises(InputError, match="mode I"):
        ImageProcessor({})(picture)


@pytest.mark.parametrize("mode", ["1", "P", "PA"])
def test_palette_and_bits_are_not_brightness(mode: str) -> None:
    with pytest.raises(InputError, match=f"mode {mode} .*do_convert_rgb=True"):
        ImageProcessor(AS_THEY_ARE)(in_mode(mode))


@pytest.mark.parametrize("settings", [{}, OFF], ids=["all steps", "no steps"])
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "int16", "int32", "int64", "float32", "float64"])
def test_values_beyond_255_are_refused_whichever_steps_are_on(dtype: str, settings: dict[str, Any]) -> None:
    array = PIXELS.astype(dtype) * 128
    for pictures in (array, torch.from_numpy(array)):
        with pytest.raises(InputError, match=rf"{dtype} from 0(\.0)? to 32640(\.0)?; expected 0 to 255"):
            ImageProcessor(settings)(pictures)


@pytest.mark.parametrize("dtype", ["int8", "int16", "float32"])
def test_values_below_0_are_refused_whichever_steps_are_on(dtype: str) -> None:
    with pytest.raises(InputError, match=r"from -1(\.0)? to .*; expected 0 to 255"):
        ImageProcessor(OFF)((PIXELS % 100).astype(dtype) - np.dtype(dtype).type(1))


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint64", ">u2", ">i4", ">f4", ">f8", "float16"])
def test_bytes_in_numbers_of_another_type_are_those_bytes(dtype: str) -> None:
    found = ImageProcessor({})(PIXELS.astype(dtype), return_tensors="pt").pixel_values
    assert torch.equal(found, ImageProcessor({})(PIXELS, return_tensors="pt").pixel_values)
    unscaled = ImageProcessor(OFF)(PIXELS.astype(dtype), return_tensors="pt").pixel_values[0]
    assert np.array_equal(unscaled.numpy(), PIXELS.transpose(2, 0, 1))


NOT_PIXELS = {
    "bool": PIXELS > 99,
    "complex64": PIXELS.astype(np.complex64),
    "object": PIXELS.astype(object),
    "<U3": PIXELS.astype(str),
    "S3": PIXELS.astype(bytes),
    "datetime64": PIXELS.astype("M8[s]"),
    "V3": np.zeros((40, 60, 3), "V3"),
    "bfloat16": PIXELS.astype(ml_dtypes.bfloat16),
}
if np.dtype(np.longdouble).itemsize > 8:
    NOT_PIXELS["float128|float96"] = PIXELS.astype(np.longdouble)


@pytest.mark.parametrize("settings", [{}, OFF], ids=["all steps", "no steps"])
@pytest.mark.parametrize("dtype", NOT_PIXELS)
def test_arrays_that_are_not_numbers_of_pixels_are_refused_by_name(dtype: str, settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"^images\[1\]: values of dtype .*({dtype})"):
        ImageProcessor(settings)([PIXELS, NOT_PIXELS[dtype]])


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_tensors_that_are_not_numbers_of_pixels_are_refused_by_name(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match=f"values of dtype {str(dtype).removeprefix('torch.')}"):
        ImageProcessor({})(torch.ones(3, 40, 60, dtype=dtype))


def test_line_for_bools_makes_true_white() -> None:
    with pytest.raises(InputError, match=r"array \* np\.uint8\(255\)"):
        ImageProcessor({})(PIXELS > 99)
    assert set(np.unique(ImageProcessor(OFF)((PIXELS > 99) * np.uint8(255)).pixel_values)) == {0, 255}


@pytest.mark.parametrize("settings", [{}, OFF, {"do_rescale": False}], ids=["all steps", "no steps", "fractions"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(value: float, settings: dict[str, Any]) -> None:
    array = PIXELS.astype(np.float32) / 255
    array[3, 5, 1] = value
    with pytest.raises(InputError, match="NaN or infinite"):
        ImageProcessor(settings)(array)


def test_masked_values_are_refused_and_unmasked_ones_read() -> None:
    with pytest.raises(InputError, match=r"masked values; fill them: array\.filled\(0\)"):
        ImageProcessor({})(np.ma.masked_greater(PIXELS, 250))
    found = ImageProcessor(OFF)(np.ma.masked_greater(PIXELS, 255)).pixel_values[0]
    assert type(found) is np.ndarray


@pytest.mark.parametrize("array", [PIXELS / 2, PIXELS.astype(np.float32) + np.float32(0.5) - PIXELS % 2])
def test_fractions_beyond_1_are_not_resized(array: np.ndarray) -> None:
    with pytest.raises(InputError, match=r"fractions of float(32|64) .*array\.round\(\)"):
        ImageProcessor({})(array.clip(0, 255))


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, *FLOAT8], ids=str)
def test_float_types_that_numpy_lacks_are_read_as_float32(dtype: torch.dtype) -> None:
    tensor = (torch.from_numpy(PIXELS) / 256).to(dtype)
    expected = reference({"do_rescale": False})(tensor.float().numpy()).pixel_values[0]
    assert_same(ImageProcessor({"do_rescale": False})(tensor).pixel_values[0], expected)


def test_tensors_that_autograd_tracks_are_read() -> None:
    tensor = torch.from_numpy(PIXELS).float()
    expected = ImageProcessor({})(PIXELS).pixel_values[0]
    negated = torch.complex(tensor, -tensor).conj().imag  # a view that torch negates when it is read
    for tracked in (tensor.clone().requires_grad_(), torch.nn.Parameter(tensor), tensor.clone().requires_grad_() * 1):
        assert_same(ImageProcessor({})(tracked).pixel_values[0], expected)
    assert_same(ImageProcessor({})(negated).pixel_values[0], expected)


@pytest.mark.filterwarnings("ignore")  # torch's own, about beta and deprecated features
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (torch.Tensor.to_sparse, "torch.sparse_coo"),
        (lambda ones: ones[0].to_sparse_csr(), "torch.sparse_csr"),
        (lambda ones: torch.quantize_per_tensor(ones, 0.1, 0, torch.quint8), "torch.quint8"),
        (lambda ones: ones.to("meta"), "on meta"),
        (lambda ones: torch.nested.nested_tensor([ones, ones[:, 1:]]), "torch.float32"),
        (lambda ones: ones.byte().view(torch.bits8), "torch.bits8"),
    ],
    ids=["sparse", "sparse rows", "quantised", "meta", "nested", "bits"],
)
def test_tensors_without_an_array_are_refused_by_name(make: Callable[[torch.Tensor], torch.Tensor], named: str) -> None:
    with pytest.raises(InputError, match=rf"^images\[0\] is a tensor of .*{named}.*to_dense\(\)"):
        ImageProcessor({})([make(torch.ones(3, 8, 8))])


@pytest.mark.parametrize(
    "shape", [(1, 300, 3), (3, 200, 3), (3, 9, 3), (3, 9, 1), (4, 9, 3), (1, 9, 4), (4, 9, 4), (1, 1, 1), (1, 3, 3)]
)
def test_array_with_channels_at_both_ends_needs_a_format(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    for pictures in (array, torch.from_numpy(array), array[None], [PIXELS, array]):
        with pytest.raises(InputError, match=rf"\({', '.join(map(str, shape))}\).*input_data_format='channels_first'"):
            ImageProcessor({})(pictures)


@needs_compositing
@pytest.mark.parametrize("shape", [(1, 300, 3), (3, 200, 3), (3, 9, 3), (3, 9, 1), (4, 9, 3), (1, 9, 4), (1, 1, 1)])
@pytest.mark.parametrize("input_data_format", ["channels_first", "channels_last"])
def test_input_data_format_means_what_it_means_in_transformers(shape: tuple[int, ...], input_data_format: str) -> None:
    array = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    expected = reference({})(array, input_data_format=input_data_format).pixel_values[0]
    for pictures in (array, torch.from_numpy(array), array[None], [array]):
        assert_same(ImageProcessor({})(pictures, input_data_format=input_data_format).pixel_values[0], expected)


def test_enum_of_transformers_is_accepted_as_a_format() -> None:
    from transformers.image_utils import ChannelDimension

    array = PIXELS[:3]
    found = ImageProcessor({}).preprocess(array, input_data_format=ChannelDimension.LAST)
    expected = ImageProcessor({}).preprocess(array, input_data_format="channels_last", data_format="channels_first")
    assert_same(found.pixel_values[0], expected.pixel_values[0])


def test_format_none_means_greyscale_without_channels() -> None:
    grey = PIXELS[..., 0]
    expected = ImageProcessor({})(Image.fromarray(grey)).pixel_values[0]
    assert_same(ImageProcessor({})(grey, input_data_format="none").pixel_values[0], expected)
    batch = ImageProcessor({})(torch.from_numpy(np.stack([grey, grey // 2, grey])), input_data_format="none")
    assert len(batch.pixel_values) == 3
    assert_same(batch.pixel_values[2], expected)
    for array, dims in ((PIXELS[None], "2 dimensions"), (PIXELS[0, :, 0], "2 dimensions")):
        with pytest.raises(InputError, match=dims):
            ImageProcessor({})(array, input_data_format="none")
    with pytest.raises(InputError, match=r"\(40, 60\).*input_data_format='none'"):
        ImageProcessor({})(grey)


def test_format_does_not_matter_for_pil_images() -> None:
    expected = ImageProcessor({})(PICTURE).pixel_values[0]
    for input_data_format in ("channels_first", "channels_last", "none"):
        assert_same(ImageProcessor({})(PICTURE, input_data_format=input_data_format).pixel_values[0], expected)


def test_a_side_that_cannot_be_channels_is_refused() -> None:
    for array, input_data_format, named in (
        (PIXELS, "channels_first", "first side"),
        (PIXELS.transpose(2, 0, 1), "channels_last", "last side"),
        (PIXELS[..., :2], None, "first or last side"),
    ):
        with pytest.raises(InputError, match=f"{named} of 1, 3 or 4"):
            ImageProcessor({})(array, input_data_format=input_data_format)


@pytest.mark.parametrize("wrong", [{"input_data_format": "last"}, {"input_data_format": 3}, {"data_format": "none"}])
def test_an_unknown_format_is_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))}=.*'channels_first'"):
        ImageProcessor({})(PIXELS, **wrong)


def test_channels_come_last_if_asked_for() -> None:
    expected = ImageProcessor({})(PIXELS, "np")["pixel_values"].transpose(0, 2, 3, 1)
    assert np.array_equal(ImageProcessor({})(PIXELS, "np", data_format="channels_last")["pixel_values"], expected)
    assert np.array_equal(ImageProcessor({"data_format": "channels_last"})(PIXELS, "np")["pixel_values"], expected)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("trtower")]


FRACTIONS = PIXELS.astype(np.float32) / 256


@pytest.mark.parametrize(
    ("pictures", "settings", "values", "expected", "advice"),
    [
        (FRACTIONS, {}, r"0\.0 to 0\.99", "0 to 255", "do_rescale=False"),
        (torch.from_numpy(FRACTIONS).double(), {"do_resize": False}, r"0\.0 to 0\.99", "0 to 255", "do_rescale=False"),
        (PIXELS.astype(np.float32), {"do_rescale": False}, r"0\.0 to 255\.0", "0 to 1", "do_rescale=True"),
        (FRACTIONS * 255, {"do_rescale": False, "do_resize": False}, r"0\.0 to 254\.0", "0 to 1", "do_rescale=True"),
        (PICTURE, {"do_rescale": False}, "0 to 255", "0 to 1", "do_rescale=True"),
    ],
)
def test_range_that_is_scaled_twice_or_not_at_all_warns_once(
    pictures: Any, settings: dict[str, Any], values: str, expected: str, advice: str, caplog: pytest.LogCaptureFixture
) -> None:
    processor = ImageProcessor(settings)
    for _ in range(3):
        found = processor([pictures, pictures]).pixel_values[0]
    (message,) = warnings_of(caplog)
    assert values.replace("\\", "") in message
    assert f"expects {expected}" in message
    assert advice in message
    assert_same(found, reference(settings)(pictures).pixel_values[0])


@pytest.mark.parametrize(
    ("pictures", "settings"),
    [
        (PIXELS.astype(np.float32), {}),
        (FRACTIONS, {"do_rescale": False}),
        (PIXELS // 128, {}),  # bytes of a dark picture
        (PIXELS * 0.0, {}),  # black in either range
        (PICTURE, {"do_rescale": False, "image_mean": [123, 117, 104]}),
        (PICTURE, {"do_rescale": False, "do_normalize": False}),
    ],
)
def test_range_that_fits_does_not_warn(
    pictures: Any, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    ImageProcessor(settings)(pictures)
    assert warnings_of(caplog) == []


def test_exif_orientation_is_ignored_as_in_transformers(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    PICTURE.save(tmp_path / "turned.jpg", exif=exif)
    with Image.open(tmp_path / "turned.jpg") as turned:
        assert ImageProcessor(OFF)(turned).pixel_values[0].shape == (3, 40, 60)
        assert_same(ImageProcessor({})(turned).pixel_values[0], reference({})(turned).pixel_values[0])


@pytest.mark.parametrize("size", [(1000, 1), (1, 1000), (10000, 1), (1, 10000), (30000, 30)])
def test_strip_is_refused_before_memory_is_allocated(size: tuple[int, int]) -> None:
    picture = Image.new("L", size)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=rf"images\[1\]: {size[0]} x {size[1]} pixels.*at most 334 to 1"):
            ImageProcessor({})([PICTURE, picture])
        assert tracemalloc.get_traced_memory()[1] < 50 * MEGABYTE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("settings", [{}, {"do_center_crop": False}], ids=["cropped", "whole"])
def test_the_longest_strip_takes_a_few_hundred_megabytes(settings: dict[str, Any]) -> None:
    tracemalloc.start()
    try:
        ImageProcessor(settings)(Image.new("L", (334, 1)))
        assert tracemalloc.get_traced_memory()[1] < 450 * MEGABYTE
    finally:
        tracemalloc.stop()


def test_strips_that_are_possible_give_the_pixels_of_transformers() -> None:
    strip = Image.fromarray(noise(2, 600))
    assert_same(ImageProcessor({})(strip).pixel_values[0], reference({})(strip).pixel_values[0])
    strip, square = Image.fromarray(noise(1, 10000)), {"size": {"height": 30, "width": 40}}
    # transformers 4.57 needs the format for PIL images too.
    expected = reference(square)(strip, input_data_format="channels_last").pixel_values[0]
    assert_same(ImageProcessor(square)(strip).pixel_values[0], expected)


def test_large_tower_still_accepts_a_panorama() -> None:
    assert ImageProcessor({"size": 2100, "crop_size": 10})(Image.new("L", (4, 1))).pixel_values[0].shape == (3, 10, 10)
    with pytest.raises(InputError, match="at most 4 to 1"):
        ImageProcessor({"size": 2100})(Image.new("L", (5, 1)))


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tif"])
def test_truncated_file_gives_one_line(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole.{suffix}"
    Image.fromarray(data.chelsea()).save(whole)
    content = whole.read_bytes()
    broken = io.BytesIO(content[: len(content) * 2 // 3])
    with pytest.raises(InputError, match=r"^images\[1\]: Pillow cannot decode it \(\w+: .*replace the file"):
        ImageProcessor({})([PICTURE, Image.open(broken)])


def test_closed_file_gives_one_line(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "closed.png")
    with Image.open(tmp_path / "closed.png") as closed:
        pass
    with pytest.raises(InputError, match="keep it open"):
        ImageProcessor({})(closed)


@pytest.mark.parametrize("suffix", ["gif", "tif", "webp", "png"])
def test_first_of_several_frames_is_read_as_in_transformers(tmp_path: Path, suffix: str) -> None:
    first, *others = (Image.fromarray(noise(30, 40) // (index + 1)) for index in range(3))
    first.save(tmp_path / f"frames.{suffix}", save_all=True, append_images=others)
    with Image.open(tmp_path / f"frames.{suffix}") as frames:
        assert frames.n_frames == 3  # type: ignore[attr-defined] # only classes of formats with frames declare it
        expected = reference({})(frames).pixel_values[0]
        assert_same(ImageProcessor({})(frames).pixel_values[0], expected)
        every = ImageProcessor({})(ImageSequence.Iterator(frames)).pixel_values
    assert len(every) == 3
    assert_same(every[0], expected)
    assert not np.array_equal(every[0], every[2])


def test_lists_tuples_generators_and_kinds_can_be_mixed() -> None:
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    expected = ImageProcessor({})(PICTURE).pixel_values[0]
    mixed: list[Any] = [PICTURE, PIXELS, (tensor, [PIXELS[None], tensor[None]])]
    for pictures in (mixed, tuple(mixed), iter(mixed), (each for each in mixed), map(np.asarray, [PICTURE] * 5)):
        found = ImageProcessor({})(pictures, return_tensors="np").pixel_values
        assert_same(found, np.stack([expected] * 5))


def test_strides_do_not_matter() -> None:
    for array in (
        PIXELS[::-1, ::-2],
        np.asfortranarray(PIXELS),
        PIXELS[..., ::-1],
        np.broadcast_to(PIXELS, (2, 40, 60, 3)),
    ):
        for settings in ({}, OFF):
            found = ImageProcessor(settings)(array, return_tensors="pt").pixel_values
            expected = ImageProcessor(settings)(array.copy(order="C"), return_tensors="pt").pixel_values
            assert torch.equal(found, expected)


class Subclass(Image.Image):
    """A picture of a caller's own class."""


def test_subclasses_of_pil_images_are_pictures() -> None:
    picture = Subclass()
    picture.__dict__.update(PICTURE.copy().__dict__)
    assert_same(ImageProcessor({})(picture).pixel_values[0], ImageProcessor({})(PICTURE).pixel_values[0])


@pytest.mark.parametrize(
    ("pictures", "named"),
    [
        ("cat.jpg", r"images is of type str; open it with PIL\.Image\.open\(path\)"),
        (Path("cat.jpg"), r"Path; open it with PIL\.Image\.open\(path\)"),
        (["https://a.b/cat.jpg"], r"images\[0\] is of type str; open it"),
        (b"\x89PNG", r"bytes; open it with PIL\.Image\.open\(io\.BytesIO\(data\)\)"),
        (bytearray(b"\x89PNG"), r"bytearray; open it with PIL\.Image\.open\(io\.BytesIO\(data\)\)"),
        (io.BytesIO(b"\x89PNG"), r"BytesIO; open it with PIL\.Image\.open\(file\)"),
        (None, r"images is None; expected PIL images"),
        ([PICTURE, [None]], r"images\[1\]\[0\] is None"),
        (3, r"images is of type int; expected PIL images"),
        ([[1, 2], [3, 4]], r"images\[0\]\[0\] is of type int"),
        (np.uint8(3), r"of type uint8"),
        ({"image": PICTURE}, r"of type dict"),
        (np.array(3), r"shape \(\); expected 3 dimensions"),
        (np.zeros(3), r"shape \(3,\)"),
        (np.zeros((1, 1, 3, 9, 9)), r"shape \(1, 1, 3, 9, 9\)"),
        (torch.tensor(3), r"shape \(\)"),
        (np.array([PICTURE, None], dtype=object), r"shape \(2,\)"),
    ],
)
def test_other_objects_are_refused_with_the_call_that_opens_them(pictures: Any, named: str) -> None:
    with pytest.raises(InputError, match=named):
        ImageProcessor({})(pictures)


@pytest.mark.parametrize("mode", EIGHT_BIT)
def test_pictures_without_pixels_are_refused(mode: str) -> None:
    for size in ((0, 9), (9, 0), (0, 0)):
        with pytest.raises(InputError, match=r"without pixels, of shape \(3, "):
            ImageProcessor({})(Image.new(mode, size))


@pytest.mark.parametrize("shape", [(0, 9, 3), (9, 0, 3), (3, 0, 9), (4, 9, 0)])
def test_arrays_without_pixels_are_refused(shape: tuple[int, ...]) -> None:
    for pictures in (np.zeros(shape, np.uint8), torch.zeros(shape)):
        with pytest.raises(InputError, match="without pixels"):
            ImageProcessor({})(pictures)


def test_invalid_transparency_gives_one_line() -> None:
    picture = PICTURE.convert("L")
    picture.info["transparency"] = b"abc"
    with pytest.raises(InputError, match="Pillow cannot"):
        ImageProcessor({})(picture)
