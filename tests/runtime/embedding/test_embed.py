"""Features of many pictures are those of each, whatever they come from, and survive whatever stops the process."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.numpy import load_file

from tests.conftest import CHOSEN_ON_A_CPU as BACKEND
from tests.conftest import Bundles, make_model
from tests.pictures import encoded, fill, make_tar, picture
from trtower import (
    BackendError,
    BuildError,
    BundleError,
    ConfigError,
    EmbedOptions,
    EmbedProgress,
    Features,
    InputError,
    VisionTower,
    embed_pictures,
)
from trtower.embedding.formats import FORMATS
from trtower.tower.prepare import in_order
from trtower_export.pipeline import ExportOptions, export_tower

SMALL: dict[str, Any] = {"pictures_per_file": 4, "batch_size": 2}


def embed(pictures: Any, bundle: Path, out: Path, **options: Any) -> Features:
    return embed_pictures(pictures, bundle, out, EmbedOptions(**SMALL | options))


def by_name(features: Features) -> dict[str, torch.Tensor]:
    names, values = features.load()
    assert len(set(names)) == len(names) == len(features)
    return dict(zip(names, values, strict=True))


def expect(bundle: Path, folder: Path, names: list[str], **options: Any) -> dict[str, torch.Tensor]:
    with VisionTower.load(bundle, backend=BACKEND, **options) as tower:
        return {name: tower.encode(folder / name)[0] for name in names}


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, features in expected.items():
        torch.testing.assert_close(found[name], features, atol=1e-5, rtol=1e-5)  # other batches, other rounding


# What is written


@pytest.mark.parametrize("format_", [*FORMATS])
def test_features_are_those_of_each_picture(certified: Path, photos: Path, tmp_path: Path, format_: str) -> None:
    features = embed(photos, certified, tmp_path / "out", format=format_)
    names = [f"{seed:03}.png" for seed in (0, 1, 3, 4, 6, 7, 9)] + [f"deep/er/{seed:03}.png" for seed in (2, 5, 8)]
    assert [*by_name(features)] == names
    compare(by_name(features), expect(certified, photos, names))
    assert [path.name for path in features.files] == [f"features-00000{index}.{format_}" for index in range(3)]
    rows = [*features]
    assert [len(each.names) for each in rows] == [4, 4, 2]
    assert [sha256 for each in rows for sha256 in each.sha256] == [
        hashlib.sha256((photos / name).read_bytes()).hexdigest() for name in names
    ]
    assert [size for each in rows for size in each.size] == [(photos / name).stat().st_size for name in names]
    assert features.left_out == []


def test_other_programs_read_parquet(certified: Path, photos: Path, tmp_path: Path) -> None:
    features = embed(photos, certified, tmp_path / "out", dtype="float16")
    table = pq.read_table(features.path)
    element = pa.field("element", pa.float16(), nullable=False)
    assert table.schema.field("features").type == pa.list_(element, 9 * 64)
    assert table.column_names == ["name", "sha256", "size", "features"]
    about = json.loads(pq.read_schema(features.files[0]).metadata[b"trtower"])
    flat = table.column("features").combine_chunks().flatten().to_numpy()
    values = flat.reshape(-1, *about["shape"])
    np.testing.assert_array_equal(values, features.load()[1].numpy())


def test_other_programs_read_safetensors(certified: Path, photos: Path, tmp_path: Path) -> None:
    features = embed(photos, certified, tmp_path / "out", format="safetensors")
    first = load_file(features.files[0])
    assert first.keys() == {"features"}
    np.testing.assert_array_equal(first["features"], features.load()[1][:4].numpy())


def test_every_file_says_what_made_it(certified: Path, photos: Path, tmp_path: Path) -> None:
    features = embed(photos, certified, tmp_path / "out")
    with VisionTower.load(certified) as tower:
        for rows in features:
            assert rows.about["tower_sha256"] == tower.bundle.manifest.tower_sha256
            assert rows.about["runner"] == tower.backend
            assert rows.about["certificate"] == {
                "kind": "verify", "passed": True, "backend": BACKEND, "runner": tower.backend, "gpu": None,
                "date": tower.bundle.manifest.certificates[0].date,
            }  # fmt: skip
    description = features.description
    assert (description.shape, description.layers, description.tokens) == ((9, 64), (3,), "patch")
    assert (description.complete, description.pictures, description.left_out) == (True, 10, 0)


def test_plans_and_certificates_do_not_make_another_tower(certified: Path, fp32_bundle: Path) -> None:
    def sha256(bundle: Path) -> str:
        return VisionTower(bundle).bundle.manifest.tower_sha256

    assert sha256(certified) == sha256(fp32_bundle)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtype_is_what_was_asked_for(certified: Path, photos: Path, tmp_path: Path, dtype: str) -> None:
    _, values = embed(photos, certified, tmp_path / "out", dtype=dtype).load()
    _, exact = embed(photos, certified, tmp_path / "exact").load()
    assert values.dtype == getattr(torch, dtype)
    assert torch.equal(values, exact.to(values.dtype))


def test_bfloat16_is_written_as_float32(bundles: Bundles, photos: Path, tmp_path: Path) -> None:
    bundle = bundles(precision="bf16")
    _, values = embed(photos, bundle, tmp_path / "out", allow_uncertified=True).load()
    assert values.dtype == torch.float32
    assert torch.equal(values, values.bfloat16().float())


def test_layers_and_tokens_can_be_chosen(bundles: Bundles, photos: Path, tmp_path: Path) -> None:
    bundle = bundles(layer=[-2, 1])
    options = {"select_layer": 1, "select_feature": "cls_patch"}
    features = embed(photos, bundle, tmp_path / "out", allow_uncertified=True, **options)
    assert (features.description.layers, features.description.tokens) == ((1,), "cls_patch")
    compare(by_name(features), expect(bundle, photos, [*by_name(features)], **options))


def test_bytes_and_embeddings(bundles: Bundles, photos: Path, tmp_path: Path) -> None:
    bundle = bundles(pixels="uint8", layout="nhwc")
    features = embed(photos, bundle, tmp_path / "out", allow_uncertified=True)
    compare(by_name(features), expect(bundle, photos, [*by_name(features)]))


def test_same_features_from_every_kind_of_place(certified: Path, tmp_path: Path, here: Path) -> None:
    fill(here / "photos", range(2))
    (here / "photos" / "list.txt").write_text("000.png\n001.png\n", encoding="utf-8")
    contents = [encoded(0), encoded(1)]
    make_tar(here / "photos.tar", {"0.png": contents[0], "1.png": contents[1]})
    pq.write_table(pa.table({"image": contents}), here / "photos.parquet")
    places = ["photos", "photos/*.png", "photos/list.txt", "photos.tar", "photos.parquet"]
    found = [embed(place, certified, here / f"out{index}").load()[1] for index, place in enumerate(places)]
    assert all(torch.equal(each, found[0]) for each in found)
    together = embed(places, certified, here / "together")
    assert torch.equal(together.load()[1][:4], torch.cat(found[:2]))


# Pictures that cannot be read


def spoil(photos: Path) -> dict[str, str]:
    """Add pictures that cannot be embedded; return why."""
    whole = encoded(1)
    (photos / "a-cut.png").write_bytes(whole[: len(whole) // 2])
    (photos / "b-empty.jpg").write_bytes(b"")
    (photos / "c-text.jpg").write_text("no picture", encoding="utf-8")
    Image.fromarray(np.zeros((40, 40), np.uint16)).save(photos / "d-deep.png")
    (photos / "e-gone.png").symlink_to(photos / "nowhere.png")
    Image.new("RGB", (400, 400)).save(photos / "f-many-pixels.png")
    picture(3, side=150).save(photos / "g-many-bytes.bmp")
    os.mkfifo(photos / "h-pipe.png")
    (photos / "i-folder.png").mkdir()
    return {
        "a-cut.png": "Pillow cannot decode it",
        "b-empty.jpg": "its file is empty",
        "c-text.jpg": "Pillow finds no picture in it",
        "d-deep.png": "nothing tells which value is white",
        "e-gone.png": "No such file",
        "f-many-pixels.png": "it has 0.16 megapixels, more than 0.09; see --max-mib and --max-megapixels",
        "g-many-bytes.bmp": "its file has more than 0.06 MiB; see --max-mib and --max-megapixels",
        "h-pipe.png": "it is not a file",
    }


@pytest.mark.parametrize("format_", [*FORMATS])
def test_unreadable_pictures_are_left_out_and_named(
    certified: Path, photos: Path, tmp_path: Path, format_: str
) -> None:
    expected = by_name(embed(photos, certified, tmp_path / "before", batch_size=1))
    reasons = spoil(photos)
    limits = {"max_pixels": 300 * 300, "max_bytes": 62915}
    features = embed(photos, certified, tmp_path / "out", format=format_, **limits)
    assert {each.name for each in features.left_out} == reasons.keys()
    for each in features.left_out:
        assert reasons[each.name].split("; ")[0] in each.reason
        assert "until this call" not in each.reason
    compare(by_name(features), expected)
    assert features.description.left_out == len(reasons)


def test_limits_can_be_raised(certified: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own would refuse
    assert len(embed(photos, certified, tmp_path / "out")) == 10
    assert Image.MAX_IMAGE_PIXELS == 100


def test_odd_names_are_stored(certified: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "a\u2028\nb.png").write_bytes(b"no")
    (photos / "c\u0085d é.png").write_bytes(encoded(30))
    features = embed(photos, certified, tmp_path / "out")
    assert [each.name for each in features.left_out] == ["a\u2028\nb.png"]
    assert "c\u0085d é.png" in features.load()[0]


def test_no_program_is_started_for_a_picture(certified: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    (left_out,) = embed(photos, certified, tmp_path / "out").left_out
    assert (left_out.name, left_out.reason) == ("eps.png", "Pillow finds no picture in it")


def test_limit_of_pillow_survives_two_at_once() -> None:
    from trtower.tower.encoded import no_limit_of_pillow

    before = Image.MAX_IMAGE_PIXELS
    first, second = no_limit_of_pillow(), no_limit_of_pillow()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert Image.MAX_IMAGE_PIXELS is None
    second.__exit__(None, None, None)
    assert before == Image.MAX_IMAGE_PIXELS


def test_pictures_of_which_none_can_be_read_are_an_error(certified: Path, here: Path) -> None:
    (here / "a.jpg").write_bytes(b"no")
    (here / "b.jpg").write_bytes(b"no")
    with pytest.raises(InputError, match=r"none of 2 pictures could be embedded; .*a\.jpg: Pillow finds no picture"):
        embed(["a.jpg", "b.jpg"], certified, here / "out")


def break_features(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Let the tower answer ``value`` for pictures whose first pixel is black."""
    run = VisionTower.run_prepared

    def wrong(tower: VisionTower, pixel_values: torch.Tensor) -> torch.Tensor:
        features = run(tower, pixel_values)
        features[pixel_values[:, 0, 0, 0] < -1.7] = value
        return features

    monkeypatch.setattr(VisionTower, "run_prepared", wrong)


@pytest.mark.parametrize(
    ("value", "dtype", "reason"),
    [
        (float("nan"), "float32", "its features are not finite; see trtower doctor"),
        (float("-inf"), "float16", "its features are not finite; see trtower doctor"),
        (7e4, "float16", "its features exceed float16; see --dtype"),
        (7e4, "float32", None),
    ],
)
def test_features_that_are_no_numbers_are_not_written(
    certified: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    value: float,
    dtype: str,
    reason: str,
) -> None:
    Image.new("RGB", (60, 60)).save(photos / "000.png")
    break_features(monkeypatch, value)
    features = embed(photos, certified, tmp_path / "out", dtype=dtype)
    if reason is None:
        assert (by_name(features)["000.png"] == value).all()
    else:
        assert [(each.name, each.reason) for each in features.left_out] == [("000.png", reason)]
        assert len(features) == 9
        assert features.load()[1].isfinite().all()


# Going on


def contents(features: Features) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in features.files}


def test_second_run_computes_nothing(
    certified: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(embed(photos, certified, tmp_path / "out"))
    monkeypatch.setattr(VisionTower, "load_model", lambda *arguments: pytest.fail("loaded"))
    assert contents(embed(photos, certified, tmp_path / "out")) == before


def test_new_pictures_are_added(certified: Path, photos: Path, tmp_path: Path) -> None:
    before = contents(embed(photos, certified, tmp_path / "out"))
    fill(photos, range(10, 12))
    features = embed(photos, certified, tmp_path / "out")
    assert contents(features).items() > before.items()
    assert len(features.files) == 4
    compare(by_name(features), expect(certified, photos, [*by_name(features)]))
    assert len(features) == 12


def test_lost_file_is_made_again_as_it_was(certified: Path, photos: Path, tmp_path: Path) -> None:
    features = embed(photos, certified, tmp_path / "out")
    before = contents(features)
    features.files[1].unlink()
    assert contents(embed(photos, certified, tmp_path / "out")) == before


KILLED = """
import sys, time
from trtower import EmbedOptions, embed_pictures
import torch
torch.set_num_threads(1)
options = EmbedOptions(pictures_per_file=4, batch_size=2, format=sys.argv[4])
embed_pictures(*sys.argv[1:4], options, on_progress=lambda progress: time.sleep(0.02))
"""


def kill_when(condition: Callable[[], bool], *arguments: object) -> int:
    """Embed in another process; kill it as soon as the condition holds. Return its exit code, 0 if it was faster."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, *map(str, arguments)])
    while process.poll() is None:
        if condition():
            process.send_signal(signal.SIGKILL)
        time.sleep(0.001)
    return process.returncode


SLOWLY = [pytest.param(format_, marks=[pytest.mark.slow] if format_ != "parquet" else []) for format_ in FORMATS]


@pytest.mark.parametrize("format_", SLOWLY)
def test_killed_process_loses_and_doubles_nothing(certified: Path, tmp_path: Path, format_: str) -> None:
    fill(tmp_path / "photos", range(60))
    (tmp_path / "photos" / "bad.png").write_bytes(b"no picture")
    whole = embed(tmp_path / "photos", certified, tmp_path / "whole", format=format_)
    out = tmp_path / "out"

    def files() -> int:
        return len([*out.glob("features-*")])

    def writes() -> bool:
        return files() > 2 and any(out.glob(".features-*.staging"))

    conditions = [lambda: (out / "_embedding.json").exists(), lambda: files() >= 2, writes, lambda: files() >= 11]
    killed = [kill_when(condition, tmp_path / "photos", certified, out, format_) for condition in conditions]
    assert -signal.SIGKILL in killed
    assert files() < 16 or killed[-1] == 0
    features = embed(tmp_path / "photos", certified, out, format=format_)
    assert contents(features) == contents(whole)
    assert len(features) == 60
    assert [each.name for each in features.left_out] == ["bad.png"]
    assert not [*out.glob(".*.staging")]


def test_left_out_pictures_are_tried_again_if_asked_or_changed(certified: Path, photos: Path, tmp_path: Path) -> None:
    (photos / "bad.png").write_bytes(b"no")
    good = tmp_path / "good.png"
    good.write_bytes(encoded(50))
    features = embed(photos, certified, tmp_path / "out")
    assert len(features.left_out) == 1
    assert len(embed(photos, certified, tmp_path / "out").files) == len(features.files)
    assert len(embed(photos, certified, tmp_path / "out", retry=True).left_out) == 1
    shutil.copy(good, photos / "bad.png")
    features = embed(photos, certified, tmp_path / "out")
    assert features.left_out == []
    assert len(features) == 11


def test_changed_picture_is_refused(certified: Path, photos: Path, tmp_path: Path) -> None:
    embed(photos, certified, tmp_path / "out")
    (photos / "003.png").write_bytes(encoded(3))  # the same bytes, written again
    embed(photos, certified, tmp_path / "out")
    (photos / "003.png").write_bytes(encoded(77))
    with pytest.raises(ConfigError, match=r"has features of 003\.png, but .*003\.png holds another picture now"):
        embed(photos, certified, tmp_path / "out")


def test_other_folder_with_the_same_names_is_refused(certified: Path, photos: Path, tmp_path: Path) -> None:
    fill(tmp_path / "others", range(10, 20))
    for seed in range(10, 20):
        for path in (tmp_path / "others").rglob(f"{seed:03}.png"):
            path.rename(path.with_name(f"{seed - 10:03}.png"))
    embed(photos, certified, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"has features of 000\.png, but .*others/000\.png holds another picture"):
        embed(tmp_path / "others", certified, tmp_path / "out")


def test_folder_that_took_the_place_of_another_is_refused(certified: Path, photos: Path, tmp_path: Path) -> None:
    fill(tmp_path / "others", range(10, 20))
    for path in [*(tmp_path / "others").rglob("*.png")]:
        path.rename(path.with_name(f"{int(path.stem) - 10:03}.png"))
    (tmp_path / "current").symlink_to(photos)
    embed(photos, certified, tmp_path / "out")
    embed(tmp_path / "current", certified, tmp_path / "linked")
    photos.rename(tmp_path / "before")
    (tmp_path / "others").rename(photos)
    for place, out in ((photos, "out"), (tmp_path / "current", "linked")):
        with pytest.raises(ConfigError, match="holds another picture now"):
            embed(place, certified, tmp_path / out)


def test_other_column_is_refused(certified: Path, here: Path) -> None:
    contents = {"left": [encoded(0), encoded(1)], "right": [encoded(2), encoded(3)]}
    pq.write_table(pa.table(contents), here / "data.parquet")
    embed("data.parquet", certified, here / "out", column="left")
    with pytest.raises(ConfigError, match=r"has features of data\.parquet#0, but .* holds another picture now"):
        embed("data.parquet", certified, here / "out", column="right")


def test_name_in_two_lists_is_one_picture_or_refused(certified: Path, photos: Path, here: Path) -> None:
    fill(here / "others", range(21, 23))
    for path, names in ((photos, "000.png"), (here / "others", "021.png")):
        (path / "list.txt").write_text(names, encoding="utf-8")
        embed(path / "list.txt", certified, here / "out")
    (here / "others" / "022.png").rename(here / "others" / "000.png")
    (here / "others" / "list.txt").write_text("021.png\n000.png", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"has features of 000\.png"):
        embed(here / "others" / "list.txt", certified, here / "out")


def test_touched_picture_is_compared_whole(certified: Path, photos: Path, tmp_path: Path) -> None:
    embed(photos, certified, tmp_path / "out")
    (photos / "003.png").touch()
    assert len(embed(photos, certified, tmp_path / "out", max_bytes=100)) == 10


def test_removed_pictures_keep_their_features(certified: Path, photos: Path, tmp_path: Path) -> None:
    embed(photos, certified, tmp_path / "out")
    (photos / "003.png").unlink()
    assert len(embed(photos, certified, tmp_path / "out")) == 10


def test_same_pictures_in_another_place_are_the_same(certified: Path, photos: Path, tmp_path: Path) -> None:
    before = contents(embed(photos, certified, tmp_path / "out"))
    moved = photos.rename(tmp_path / "moved")
    assert contents(embed(moved, certified, tmp_path / "out")) == before


# What is refused


def test_features_of_two_towers_are_not_mixed(certified: Path, bundles: Bundles, photos: Path, tmp_path: Path) -> None:
    before = contents(embed(photos, certified, tmp_path / "out"))
    with pytest.raises(ConfigError, match=r"holds features of another tower, .*\(.*fp32\), not of .*\(.*fp16\)"):
        embed(photos, bundles(precision="fp16"), tmp_path / "out", allow_uncertified=True)
    assert contents(Features.open(tmp_path / "out")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "with dtype float32, not float16"),
        ({"format": "safetensors"}, "with format parquet, not safetensors"),
        ({"select_feature": "cls_patch"}, "with shape 9x64, not 10x64"),
    ],
)
def test_other_options_are_not_mixed(
    certified: Path, photos: Path, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    embed(photos, certified, tmp_path / "out")
    with pytest.raises(ConfigError, match=message):
        embed(photos, certified, tmp_path / "out", **options)


def test_other_layer_of_the_same_shape_is_not_mixed(bundles: Bundles, photos: Path, tmp_path: Path) -> None:
    bundle = bundles(layer=[-2, 1])
    embed(photos, bundle, tmp_path / "out", select_layer=-2, allow_uncertified=True)
    with pytest.raises(ConfigError, match="with layers 3, not 1"):
        embed(photos, bundle, tmp_path / "out", select_layer=1, allow_uncertified=True)


def test_other_backend_is_taken_only_if_it_is_named(certified: Path, photos: Path, tmp_path: Path) -> None:
    embed(photos, certified, tmp_path / "out", backend="onnxruntime-cpu")
    fill(photos, range(10, 12))
    with pytest.raises(ConfigError, match=r"begun on onnxruntime-cpu, .* here is openvino.* --backend openvino"):
        embed(photos, certified, tmp_path / "out")
    features = embed(photos, certified, tmp_path / "out", backend="openvino")
    assert [rows.about["backend"] for rows in features] == ["onnxruntime-cpu"] * 3 + ["openvino"]


def test_folder_of_others_is_not_touched(certified: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds 000\.png and no _embedding\.json, so it was not touched"):
        embed(photos, certified, photos)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"cannot write into .*file: File exists"):
        embed(photos, certified, tmp_path / "file")
    with pytest.raises(ConfigError, match="expected the path of a folder"):
        embed_pictures(photos, certified, "")
    assert not (photos / "_embedding.json").exists()


def test_damaged_file_is_named(certified: Path, photos: Path, tmp_path: Path) -> None:
    features = embed(photos, certified, tmp_path / "out")
    before = contents(features)
    features.files[1].write_bytes(features.files[1].read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"features-000001\.parquet is damaged .*: remove it"):
        embed(photos, certified, tmp_path / "out")
    features.files[1].unlink()
    assert contents(embed(photos, certified, tmp_path / "out")) == before


def test_file_of_another_run_is_refused(certified: Path, bundles: Bundles, photos: Path, tmp_path: Path) -> None:
    features = embed(photos, certified, tmp_path / "out")
    shutil.copy(features.files[0], features.path / "features-000000 (copy).parquet")
    assert len(embed(photos, certified, tmp_path / "out").files) == 3
    shutil.copy(features.files[0], features.path / "features-000007.parquet")
    with pytest.raises(ConfigError, match=r"000007\.parquet has features of 000\.png, and so has an earlier file"):
        embed(photos, certified, tmp_path / "out")
    other = embed(photos, bundles(layer=1), tmp_path / "other", allow_uncertified=True)
    shutil.copy(other.files[0], features.path / "features-000007.parquet")
    with pytest.raises(ConfigError, match=r"000007\.parquet is of another run, with another layers"):
        embed(photos, certified, tmp_path / "out")


@pytest.mark.parametrize("format_", [*FORMATS])
def test_flipped_bit_in_features_is_found(certified: Path, photos: Path, tmp_path: Path, format_: str) -> None:
    features = embed(photos, certified, tmp_path / "out", format=format_)
    (value,) = features.load()[1][-1, -1, -1:].numpy()
    content = bytearray(features.files[-1].read_bytes())
    place = content.rindex(value.tobytes())
    content[place] ^= 1
    features.files[-1].write_bytes(content)
    with pytest.raises(ConfigError, match=r"features-000002\..* is damaged"):
        features.load()


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"schema": 99}'])
def test_damaged_description_is_named(certified: Path, photos: Path, tmp_path: Path, text: str) -> None:
    features = embed(photos, certified, tmp_path / "out")
    (features.path / "_embedding.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"embedding\.json (is damaged|has schema 99)"):
        embed(photos, certified, tmp_path / "out")


def test_two_processes_do_not_write_together(certified: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with FileLock(tmp_path / "out" / ".lock"), pytest.raises(ConfigError, match="another process is writing into"):
        embed(photos, certified, tmp_path / "out")


def test_uncertified_bundle_is_refused(fp32_bundle: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not certified"):
        embed(photos, fp32_bundle, tmp_path / "out")
    assert len(embed(photos, fp32_bundle, tmp_path / "out", allow_uncertified=True)) == 10


def test_rehearsal_is_refused_with_what_to_do(here: Path, photos: Path) -> None:
    options = ExportOptions(random_weights=True, flavour="none", check=False, precision="fp32")
    make_model("clip").save_pretrained("small")
    bundle = export_tower("small", here / "bundle", options).path
    with pytest.raises(BundleError, match=r"rehearsal.*\. Export the checkpoint itself, .*; or embed with --allow-unc"):
        embed(photos, bundle, here / "out")


def test_backend_that_cannot_run_is_refused(certified: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no requested backend can run"):
        embed(photos, certified, tmp_path / "out", backend="tensorrt")


def test_full_disk_leaves_complete_files(certified: Path, tmp_path: Path, small_disk: Path) -> None:
    fill(tmp_path / "photos", range(600))
    with pytest.raises(BuildError, match="the disk filled up while writing"):
        embed(tmp_path / "photos", certified, small_disk / "out", pictures_per_file=50)
    features = Features.open(small_disk / "out")
    assert not features.description.complete
    assert features.left_out == []
    assert len(features) == 50 * len(features.files) > 0
    assert not [*features.path.glob(".*.staging")]
    assert sum(len(rows.names) for rows in features) == 50 * len(features.files)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "arrow"}, "unknown format 'arrow'; choose parquet or safetensors"),
        ({"dtype": "bfloat16"}, "unknown dtype 'bfloat16'"),
        ({"batch_size": 0}, "batch_size=0; expected a number of at least 1"),
        ({"pictures_per_file": 1.5}, r"pictures_per_file=1\.5; expected"),
        ({"max_pixels": -1}, "max_pixels=-1"),
        ({"workers": 2}, "workers is for Ray only"),
        ({"ray": "local", "device": "cuda:1"}, "device is not for Ray"),
    ],
)
def test_invalid_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EmbedOptions(**options)


# How it runs


def test_progress_is_told(certified: Path, photos: Path, tmp_path: Path) -> None:
    told: list[EmbedProgress] = []
    embed_pictures(photos, certified, tmp_path / "out", EmbedOptions(**SMALL), on_progress=told.append)
    assert [each.done for each in told] == [*range(11)]
    assert {(each.total, each.before) for each in told} == {(10, 0)}
    assert told[0].seconds_left is None
    assert told[-1].seconds_left == 0
    assert told[-1].rate > 0
    fill(photos, range(10, 12))
    told.clear()
    embed_pictures(photos, certified, tmp_path / "out", EmbedOptions(**SMALL), on_progress=told.append)
    assert (told[0].total, told[0].before) == (2, 10)


def test_batches_end_with_a_file(
    certified: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    run = VisionTower.run_prepared

    def count(tower: VisionTower, pixel_values: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pixel_values))
        return run(tower, pixel_values)

    monkeypatch.setattr(VisionTower, "run_prepared", count)
    embed(photos, certified, tmp_path / "out", batch_size=3)
    assert sizes == [3, 1, 3, 1, 2]


def test_only_so_many_pictures_are_in_memory() -> None:
    drawn = 0

    def items() -> Any:
        nonlocal drawn
        for index in range(100):
            drawn += 1
            yield index

    results = in_order(lambda index: index * 2, items(), threads=3, ahead=5)
    for index, result in enumerate(results):
        assert result == 2 * index
        assert drawn <= index + 8
    assert drawn == 100


def test_file_has_as_many_pictures_as_fit() -> None:
    options = EmbedOptions()
    assert options.files_of((768,), 2, 8) == 1024
    assert options.files_of((576, 1024), 2, 8) == 224
    assert options.files_of((4096, 65536), 4, 8) == 8
    assert EmbedOptions(pictures_per_file=7).files_of((768,), 2, 8) == 7


def test_what_fails_in_the_middle_ends_every_thread(
    certified: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(progress: EmbedProgress) -> None:
        if progress.done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed_pictures(photos, certified, tmp_path / "out", EmbedOptions(**SMALL), on_progress=fail)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("trtower-")]
    assert len(embed(photos, certified, tmp_path / "out")) == 10
