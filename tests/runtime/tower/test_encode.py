"""`encode` turns any pictures into the features that the image processor and a call would give, in order."""

import os
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from tests.conftest import BATCH
from tests.runtime.tower.test_image_processor import REFERENCES
from trtower import VisionTower
from trtower.errors import ConfigError, InputError
from trtower.spec import BatchProfile
from trtower.tower import prepare
from trtower_export.check.photographs import load_photographs
from trtower_export.pipeline import ExportOptions, export_tower


@pytest.fixture(scope="module")
def tower(fp32_bundle: Path) -> Iterator[VisionTower]:
    with VisionTower.load(fp32_bundle, "onnxruntime-cpu") as loaded:
        yield loaded


def photographs(count: int) -> list[Image.Image]:
    return [each.image for each in load_photographs(None, limit=count).images]


def one_by_one(tower: VisionTower, pictures: Any) -> torch.Tensor:
    prepared = [tower.image_processor(each, return_tensors="pt")["pixel_values"] for each in pictures]
    return torch.cat([tower(each) for each in prepared])


@pytest.mark.parametrize("threads", [None, 1, 3])
@pytest.mark.parametrize("batch_size", [None, 1, 3, 7, 50])
def test_features_come_in_the_order_of_the_pictures(
    tower: VisionTower, batch_size: int | None, threads: int | None
) -> None:
    pictures = photographs(12)
    features = tower.encode(pictures, batch_size=batch_size, threads=threads)
    torch.testing.assert_close(features, one_by_one(tower, pictures))


def test_every_form_of_a_picture_gives_the_same(tower: VisionTower, tmp_path: Path) -> None:
    (picture,) = photographs(1)
    path = tmp_path / "a picture.png"
    picture.save(path)
    array = np.asarray(picture)
    expected = one_by_one(tower, [picture])
    forms: list[Any] = [picture, path, str(path), array, array.transpose(2, 0, 1), torch.from_numpy(array.copy())]
    for form in forms:
        assert torch.equal(tower.encode(form), expected)
    assert torch.equal(tower.encode(array[::-1, ::-1][::-1, ::-1]), expected)  # with negative strides
    together = tower.encode(iter(forms))
    torch.testing.assert_close(together, expected.expand(len(forms), -1, -1))
    torch.testing.assert_close(tower.encode(np.stack([array, array])), expected.expand(2, -1, -1))


def test_pixels_are_those_of_transformers_own_processor(tower: VisionTower, tmp_path: Path) -> None:
    theirs = REFERENCES["CLIPImageProcessor"].from_pretrained(tower.bundle.path)
    photograph = photographs(1)[0].resize((90, 60))
    modes = {mode: photograph.convert(mode) for mode in ("L", "P", "CMYK", "1", "RGB")}
    for mode, picture in modes.items():
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        picture.save(path)
        with Image.open(path) as opened:
            expected = theirs(opened.convert("RGB"), return_tensors="pt")["pixel_values"]
        named = prepare.each_picture(path, tower.image_processor)
        (pixels,) = prepare.prepare_batches(named, tower.image_processor, 4, 1)
        assert torch.equal(pixels, expected), mode
        assert torch.equal(tower.encode(path), tower(pixels)), mode


def test_exif_orientation_is_ignored_as_documented(tower: VisionTower, tmp_path: Path) -> None:
    (picture,) = photographs(1)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(tower.encode(tmp_path / "turned.png"), tower.encode(picture))


def test_extreme_shapes_are_prepared_or_refused_by_name(tower: VisionTower) -> None:
    assert tower.encode(Image.new("RGB", (400, 2))).shape == (1, 9, 64)
    with pytest.raises(InputError, match=r"^pictures\[1\]: 100000 x 1 pixels; .*crop it$"):
        tower.encode([Image.new("RGB", (9, 9)), Image.new("RGB", (100_000, 1))])


def test_bytes_are_encoded_too(export: Any) -> None:
    floats, of_bytes = (
        VisionTower.load(export("clip", precision="fp32", flavour="none", **kind), "onnxruntime-cpu")
        for kind in ({}, {"pixels": "uint8", "layout": "nhwc"})
    )
    pictures = photographs(5)
    torch.testing.assert_close(of_bytes.encode(pictures), floats.encode(pictures))


def test_features_are_in_the_towers_dtype(clip_bundle: Path) -> None:
    assert VisionTower.load(clip_bundle, "onnxruntime-cpu").encode(photographs(2)).dtype == torch.float16


def test_fewer_pictures_than_the_smallest_batch(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    profiles = (BatchProfile(min=3, opt=4, max=5),)
    options = ExportOptions(check=False, flavour="none", precision="fp32", profiles=profiles)
    tower = VisionTower.load(export_tower(str(checkpoints["clip"]), tmp_path / "bundle", options).path)
    assert tower.encode(photographs(1)).shape == (1, 9, 64)
    assert tower.encode(photographs(6)).shape == (6, 9, 64)


def test_memory_is_bounded(tower: VisionTower) -> None:
    """Pictures are taken from an iterator only as batches need them."""
    taken, ran = [0], list[int]()
    tower.on_batch = lambda report: ran.append(taken[0])

    def endless() -> Iterator[Image.Image]:
        for _ in range(40):
            taken[0] += 1
            yield Image.new("RGB", (10, 10))

    try:
        assert tower.encode(endless(), batch_size=4, threads=2).shape[0] == 40
    finally:
        tower.on_batch = None
    assert ran[0] <= 4 + 2 + 4
    assert all(later - earlier <= 4 for earlier, later in pairwise(ran))


@pytest.mark.parametrize("where", [0, 7, 19])
def test_damaged_picture_is_named_and_threads_end(tower: VisionTower, tmp_path: Path, where: int) -> None:
    paths = []
    for index, picture in enumerate(photographs(10) * 2):
        paths.append(tmp_path / f"{index}.png")
        picture.save(paths[-1])
    paths[where].write_bytes(paths[where].read_bytes()[:1000])
    with pytest.raises(
        InputError, match=rf"^pictures\[{where}\], {paths[where]}: (Pillow cannot decode it|it cannot be opened)"
    ):
        tower.encode(paths)
    assert not [each for each in threading.enumerate() if each.name.startswith("trtower-prepare")]
    assert tower.encode(paths[where - 1]).shape == (1, 9, 64)


@pytest.mark.parametrize(
    ("pictures", "problem"),
    [
        ([], "pictures is empty; expected at least one"),
        (iter(()), "pictures is empty"),
        (None, r"pictures is of type NoneType; expected a path"),
        (
            [[np.zeros((4, 4, 3), np.float32)]],
            r"pictures\[0\]\[0\] has dtype float32; expected uint8.*tower\(pixel_values\)",
        ),
        (torch.zeros(1, 3, 4, 4), r"pictures has dtype torch\.float32; expected uint8"),
        (np.zeros((9, 9), np.uint8), r"^pictures has shape \(9, 9\); expected .* Grey is \(H, W, 1\)"),
        (b"bytes of a file", "pictures is of type bytes"),
        ({"top": 1}, r"^pictures\['top'\] is of type int"),
        (Image.new("I;16", (9, 9)), r"pictures: mode I;16 does not have 8 bits"),
    ],
    ids=range(9),
)
def test_what_is_no_picture_is_refused_in_one_line(tower: VisionTower, pictures: Any, problem: str) -> None:
    with pytest.raises(InputError, match=problem) as failure:
        tower.encode(pictures)
    assert "\n" not in str(failure.value)


def test_files_that_are_no_pictures_are_named(tower: VisionTower, tmp_path: Path) -> None:
    video, folder = tmp_path / "film.mp4", tmp_path / "folder"
    video.write_bytes(b"\x00\x00\x00\x18ftypmp42" + os.urandom(100))
    folder.mkdir()
    for path, problem in (
        (video, "Pillow finds no picture in it. Of a video, decode the frames"),
        (folder, "it is a folder; pass its files"),
        (tmp_path / "absent.png", "it cannot be opened: No such file or directory"),
        (tmp_path / "*.jpg", "it cannot be opened: No such file or directory; of a pattern, pass the files: sorted("),
    ):
        with pytest.raises(InputError) as failure:
            tower.encode([path])
        assert str(failure.value).startswith(f"pictures[0], {path}: {problem}")


def test_iterators_may_reuse_their_objects(tower: VisionTower, tmp_path: Path) -> None:
    def frames() -> Iterator[np.ndarray[Any, Any]]:
        buffer = np.empty((30, 40, 3), np.uint8)
        for shade in range(16):
            buffer[:] = shade * 16
            yield buffer

    separate = [np.full((30, 40, 3), shade * 16, np.uint8) for shade in range(16)]
    for threads in (1, 4):
        torch.testing.assert_close(tower.encode(frames(), threads=threads), tower.encode(separate))
    pictures = photographs(6)
    pictures[0].resize((64, 64)).save(
        tmp_path / "film.webp", save_all=True, append_images=[each.resize((64, 64)) for each in pictures[1:]]
    )
    with Image.open(tmp_path / "film.webp") as film:
        expected = tower.encode([frame.copy() for frame in ImageSequence.Iterator(film)])
        film.seek(0)
        torch.testing.assert_close(tower.encode(ImageSequence.Iterator(film), threads=4), expected)


def test_pictures_that_are_not_loaded_yet(tower: VisionTower, tmp_path: Path) -> None:
    paths = []
    for index, picture in enumerate(photographs(6)):
        paths.append(tmp_path / f"{index}.jpg")
        picture.save(paths[-1])

    def opened() -> Iterator[Image.Image]:
        for path in paths:
            with Image.open(path) as picture:
                yield picture

    expected = tower.encode(paths)
    torch.testing.assert_close(tower.encode(opened(), threads=4), expected)
    lazy = Image.open(paths[0])
    torch.testing.assert_close(tower.encode([lazy] * 8, threads=4), expected[:1].expand(8, -1, -1))
    closed = Image.open(paths[1])
    closed.close()
    with pytest.raises(InputError, match=r"^pictures\[1\]: Pillow cannot decode it"):
        tower.encode([paths[0], closed])


@pytest.mark.parametrize(
    "pictures", [np.zeros((0, 9, 9, 3), np.uint8), [[]], [[], iter(())], torch.zeros(0, 9, 9, 3).byte()]
)
def test_nothing_inside_is_nothing(tower: VisionTower, pictures: Any) -> None:
    with pytest.raises(InputError, match="pictures is empty; expected at least one"):
        tower.encode(pictures)


@pytest.mark.parametrize("text", ["a" * 5000, "folder/" + "*" * 300, ""])
def test_content_passed_for_a_path_is_refused_in_a_short_line(tower: VisionTower, text: str) -> None:
    with pytest.raises(InputError) as failure:
        tower.encode([text])
    assert len(str(failure.value)) < 900


def test_paths_may_be_bytes(tower: VisionTower, tmp_path: Path) -> None:
    photographs(1)[0].save(tmp_path / "a.png")
    with os.scandir(os.fsencode(tmp_path)) as found:
        entries: Any = found
        assert tower.encode(entries).shape == (1, 9, 64)


def test_channels_that_could_be_at_either_end(tower: VisionTower) -> None:
    with pytest.raises(InputError, match=r"^pictures has shape \(3, 50, 3\), whose channels could be first or last"):
        tower.encode(np.zeros((3, 50, 3), np.uint8))


def test_processor_that_was_changed_to_several_shapes(fp32_bundle: Path) -> None:
    other = VisionTower.load(fp32_bundle, "onnxruntime-cpu")
    other.image_processor.do_center_crop = False
    with pytest.raises(InputError, match=r"pictures come out as .* and .*do_center_crop=True"):
        other.encode([Image.new("RGB", (50, 90)), Image.new("RGB", (90, 50))], batch_size=2)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": True}, {"threads": 0}, {"threads": "2"}])
def test_other_numbers_are_refused(tower: VisionTower, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        tower.encode(photographs(1), **options)


def test_default_batch_is_the_one_that_plans_are_tuned_for(tower: VisionTower) -> None:
    sizes: list[int] = []
    tower.on_batch = lambda report: sizes.append(report.batch)
    try:
        tower.encode(photographs(5))
    finally:
        tower.on_batch = None
    assert sizes == [BATCH.opt, BATCH.opt, 1]
