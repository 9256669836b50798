import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trtower.errors import InputError, MissingExtraError
from trtower.parity.bounds import PHOTOGRAPH
from trtower.tower.image_processor import ImageProcessor
from trtower_export.check.photographs import (
    SHIPPED,
    Photograph,
    Photographs,
    draw_images,
    load_photographs,
    prepare,
    say_skipped,
)
from trtower_export.console import LoggedProgress


def save(path: Path, colour: tuple[int, ...], mode: str = "RGB") -> None:
    Image.new(mode, (6, 4), colour).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "b.png", (0, 255, 0, 10), "RGBA")
    save(tmp_path / "A.JPG", (255, 0, 0))
    save(tmp_path / "c.webp", (0, 0, 255))
    (tmp_path / "broken.png").write_bytes((tmp_path / "b.png").read_bytes()[:40])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "deeper.png").mkdir()
    save(tmp_path / "deeper.png" / "d.png", (9, 9, 9))
    return tmp_path


def test_folder_is_read_by_name_as_rgb_and_what_is_damaged_is_named(folder: Path) -> None:
    photographs = load_photographs(folder)
    assert [p.name for p in photographs.images] == ["A.JPG", "b.png", "c.webp"]
    assert {p.image.mode for p in photographs.images} == {"RGB"}
    assert photographs.skipped == ("broken.png",)


def test_limit_counts_readable_photographs(folder: Path) -> None:
    (folder / "A.JPG").write_bytes(b"")
    photographs = load_photographs(folder, limit=1)
    assert [p.name for p in photographs.images] == ["b.png"]
    assert photographs.skipped == ("A.JPG",)


def test_digest_follows_names_and_pixels_and_not_the_file_format(folder: Path) -> None:
    before = load_photographs(folder).sha256
    Image.open(folder / "b.png").save(folder / "b.png", compress_level=0)
    assert load_photographs(folder).sha256 == before
    (folder / "b.png").rename(folder / "bb.png")
    renamed = load_photographs(folder).sha256
    save(folder / "bb.png", (0, 254, 0))
    assert len({before, renamed, load_photographs(folder).sha256}) == 3


def save_unlike_rgb(folder: Path) -> None:
    """Save pictures that readers may decode differently: rotated by EXIF, transparent, with a palette, 1 bit, CMYK."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(noise)
    picture.convert("RGB").save(folder / "turned.jpg", exif=exif)
    picture.convert("RGB").save(folder / "turned.png", exif=exif)
    picture.save(folder / "transparent.png")
    picture.save(folder / "transparent.webp", lossless=True)
    picture.convert("LA").save(folder / "grey.png")
    picture.convert("RGB").quantize(200).save(folder / "palette.png", transparency=bytes(range(200)))
    picture.convert("RGB").save(folder / "one colour.png", transparency=tuple(noise[0, 0, :3].tolist()))
    picture.convert("1").save(folder / "bits.png")
    picture.convert("CMYK").save(folder / "ink.jpg")


def test_photographs_are_what_the_processor_makes_of_their_files(tmp_path: Path) -> None:
    save_unlike_rgb(tmp_path)
    photographs = load_photographs(tmp_path)
    assert len(photographs.images) == len(list(tmp_path.iterdir()))
    processor = ImageProcessor({"do_resize": False, "do_center_crop": False})
    for photograph, pixels in zip(photographs.images, prepare(photographs.images, processor), strict=True):
        with Image.open(tmp_path / photograph.name) as served:
            assert np.array_equal(processor(served, return_tensors="np")["pixel_values"], pixels.numpy())


def test_photograph_is_not_turned_by_its_exif(tmp_path: Path) -> None:
    save_unlike_rgb(tmp_path)
    sizes = {photograph.name: photograph.image.size for photograph in load_photographs(tmp_path).images}
    assert sizes["turned.jpg"] == sizes["turned.png"] == (60, 40)


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    save(tmp_path / "clear.png", (0, 0, 0, 0), "RGBA")
    assert load_photographs(tmp_path).images[0].image.getextrema() == ((255, 255),) * 3


def save_deep(path: Path) -> None:
    Image.fromarray(np.arange(24, dtype=np.uint16).reshape(4, 6) * 2000).save(path)


def test_photograph_of_16_bits_is_skipped_with_the_reason(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for index in range(4):
        save_deep(folder / f"depth-{index}.png")
    photographs = load_photographs(folder)
    assert [p.name for p in photographs.images] == ["A.JPG", "b.png", "c.webp"]
    assert photographs.skipped == ("broken.png", *(f"depth-{index}.png" for index in range(4)))
    with caplog.at_level("INFO", logger="trtower_export"):
        say_skipped(photographs.first(2), LoggedProgress())
    damaged, deep = (record.getMessage() for record in caplog.records)
    assert damaged.endswith("skipped 1 as unreadable: broken.png")
    assert "skipped 4 because mode I" in deep
    assert "PIL.Image.fromarray((np.asarray(picture) / white * 255).clip(0, 255).astype(np.uint8))" in deep
    assert deep.endswith(": depth-0.png, depth-1.png, depth-2.png and 1 more")


def test_folder_of_photographs_of_16_bits_is_refused_with_the_reason(tmp_path: Path) -> None:
    save_deep(tmp_path / "depth.png")
    with pytest.raises(InputError, match=r"no readable image: found depth\.png, because mode I.* 8 bits per channel"):
        load_photographs(tmp_path)


def test_photograph_that_the_processor_refuses_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png", (9, 9, 9))
    Image.new("RGB", (1000, 1)).save(tmp_path / "strip.png")
    with pytest.raises(InputError, match=r"^strip\.png: images: 1000 x 1 pixels"):
        prepare(load_photographs(tmp_path).images, ImageProcessor({}))


def test_folder_without_a_photograph_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone does not exist; expected a folder"):
        load_photographs(tmp_path / "gone")
    with pytest.raises(InputError, match=r"notes\.txt is a file; expected a folder"):
        load_photographs(folder / "notes.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no image files; expected \.bmp, \.jpeg"):
        load_photographs(tmp_path / "empty")
    (tmp_path / "empty" / "x.png").write_bytes(b"x")
    with pytest.raises(InputError, match=r"no readable image: found x\.png"):
        load_photographs(tmp_path / "empty")


def test_a_dozen_real_photographs_need_no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    monkeypatch.setitem(sys.modules, "pooch", None)
    photographs = load_photographs(None)
    assert tuple(p.name for p in photographs.images) == SHIPPED
    assert len(SHIPPED) == 12
    assert SHIPPED[:2] == ("astronaut.png", "chelsea.png")
    assert photographs.skipped == ()
    assert all(np.asarray(p.image).std() > 10 for p in photographs.images)
    assert load_photographs(None, limit=2).images[1].name == "chelsea.png"


def test_missing_scikit_image_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[demo\]"):
        load_photographs(None)


@pytest.mark.parametrize("size", [14, 42, 336])
def test_drawn_images_match_their_kind(size: int) -> None:
    drawn = {image.name: image for image in draw_images(size)}
    pixels = {name: np.asarray(image.image) for name, image in drawn.items()}
    assert {name: image.kind for name, image in drawn.items()} == {
        "noise": "noise",
        "grey": "constant",
        "white": "saturated",
        "squares": "saturated",
    }
    assert {(image.image.mode, image.image.size) for image in drawn.values()} == {("RGB", (size, size))}
    assert set(np.unique(pixels["grey"])) == {128}
    assert set(np.unique(pixels["white"])) == {255}
    assert set(np.unique(pixels["squares"])) == {0, 255}
    assert len(np.unique(pixels["squares"].reshape(-1, 3), axis=0)) == 8  # every pure colour
    assert pixels["noise"].std() == pytest.approx(73.9, rel=0.1)  # the deviation of a uniform byte


def test_drawn_images_are_the_same_each_time() -> None:
    for one, other in zip(draw_images(28), draw_images(28), strict=True):
        assert one.image.tobytes() == other.image.tobytes()


def test_images_from_files_are_photographs(folder: Path) -> None:
    assert {photograph.kind for photograph in load_photographs(folder).images} == {PHOTOGRAPH}


def test_photographs_are_prepared_one_by_one_in_fp32(folder: Path) -> None:
    processor = ImageProcessor({"size": 14, "crop_size": 14})
    photographs = load_photographs(folder)
    prepared = prepare(photographs.images, processor)
    assert [(tuple(pixels.shape), str(pixels.dtype)) for pixels in prepared] == [((1, 3, 14, 14), "torch.float32")] * 3
    for photograph, pixels in zip(photographs.images, prepared, strict=True):
        assert np.array_equal(processor(photograph.image, return_tensors="np")["pixel_values"], pixels.numpy())


@pytest.mark.parametrize(
    ("damaged", "named"), [(1, "0.png"), (3, "0.png, 1.png, 2.png"), (5, "0.png, 1.png, 2.png and 2 more")]
)
def test_skipped_files_are_counted_and_the_first_three_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: int, named: str
) -> None:
    save(tmp_path / "fine.png", (9, 9, 9))
    with caplog.at_level("INFO", logger="trtower_export"):
        say_skipped(load_photographs(tmp_path), LoggedProgress())
        assert "skipped" not in caplog.text
        for index in range(damaged):
            (tmp_path / f"{index}.png").write_bytes(b"")
        say_skipped(load_photographs(tmp_path), LoggedProgress())
    assert f"skipped {damaged} as unreadable: {named}\n" in caplog.text


def test_name_that_is_no_text_in_this_locale_has_a_digest() -> None:
    image = Image.new("RGB", (2, 2))
    digests = {Photographs((Photograph(name, image),), {}).sha256 for name in ("a.png", "\udcfc.png")}
    assert len(digests) == 2
