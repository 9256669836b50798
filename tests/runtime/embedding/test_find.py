"""Pictures are found in folders, by patterns and lists, in tar files and in Parquet, each once, by one name."""

import io
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pictures import encoded, fill, make_tar
from trtower.embedding.find import find_pictures
from trtower.embedding.picture import Picture, open_each
from trtower.errors import ConfigError, InputError

MOST = 10**6


def read(pictures: "list[Picture]") -> dict[str, bytes]:
    return {picture.name: load() for picture, load in open_each(pictures, MOST)}


def found(*places: str | Path, column: str | None = None) -> dict[str, bytes]:
    return read([*find_pictures(places, column).pictures])


def test_folder_is_searched_with_everything_below_it(tmp_path: Path) -> None:
    names = fill(tmp_path / "photos", range(6))
    assert found(tmp_path / "photos") == {name: encoded(int(name[-7:-4])) for name in names}
    assert [*found(tmp_path / "photos")] == names


def test_hidden_and_other_files_of_a_folder_are_passed_over_and_counted(photos: Path) -> None:
    (photos / ".cache").mkdir()
    (photos / ".cache" / "thumbnail.png").write_bytes(b"")
    (photos / ".hidden.png").write_bytes(b"")
    (photos / "a.heic").write_bytes(b"")
    (photos / "b.HEIC").write_bytes(b"")
    (photos / "README").write_bytes(b"")
    (photos / "capital.PNG").write_bytes(encoded(1))
    result = find_pictures([photos])
    assert len(result.pictures) == 11
    assert "2 .heic, 1 without ending" in result.remark


def test_links_are_followed_but_not_in_circles(photos: Path, tmp_path: Path) -> None:
    fill(tmp_path / "elsewhere", range(20, 21))
    (photos / "link").symlink_to(tmp_path / "elsewhere")
    (photos / "deep" / "circle").symlink_to(photos)
    assert "link/deep/er/020.png" in found(photos)
    assert len(found(photos)) == 11


def test_pattern_means_what_it_means_to_a_shell(photos: Path, here: Path) -> None:
    by_shell = [f"photos/{path.name}" for path in sorted(photos.glob("*.png"))]
    assert [*found("photos/*.png")] == by_shell == [*found(*by_shell)]
    assert next(iter(found("photos/**/*.png"))) == "photos/000.png"
    assert len(found("photos/**/*.png")) == 10


def test_file_whose_name_looks_like_a_pattern_is_itself(here: Path) -> None:
    (here / "a[1].png").write_bytes(encoded(1))
    assert found("a[1].png") == {"a[1].png": encoded(1)}


def test_list_names_pictures_from_where_it_lies(photos: Path, tmp_path: Path) -> None:
    (photos / "chosen.txt").write_text("003.png\n\n  deep/er/002.png  \r\n", encoding="utf-8")
    assert found(photos / "chosen.txt") == {"003.png": encoded(3), "deep/er/002.png": encoded(2)}


def test_list_may_come_from_standard_input(photos: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("photos/003.png\nphotos/000.png\n"))
    assert found("-") == {"photos/003.png": encoded(3), "photos/000.png": encoded(0)}


def test_tar_of_webdataset(here: Path) -> None:
    make_tar(here / "00000.tar", {"./b/1.jpg": b"one", "./b/1.json": b"{}", "2.PNG": b"two", "3.cls": b"7"})
    assert found("00000.tar") == {"00000.tar/b/1.jpg": b"one", "00000.tar/2.PNG": b"two"}


def write_parquet(path: Path, columns: dict[str, object], *, group: int = 3) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


@pytest.mark.parametrize("group", [1, 3, 100])
def test_rows_of_parquet(here: Path, group: int) -> None:
    contents = [bytes([row]) * 50 for row in range(40)]
    write_parquet(here / "data.parquet", {"caption": ["x"] * 40, "png": contents}, group=group)
    assert found("data.parquet") == {f"data.parquet#{row}": content for row, content in enumerate(contents)}
    pictures = find_pictures(["data.parquet"]).pictures
    some = [pictures[row] for row in (4, 5, 17, 39)]
    assert [*read(some).values()] == [contents[row] for row in (4, 5, 17, 39)]


def test_parquet_of_hugging_face_datasets(here: Path) -> None:
    rows = [{"bytes": b"one", "path": "1.jpg"}, {"bytes": None, "path": "2.jpg"}]
    write_parquet(here / "data.parquet", {"image": pa.array(rows), "label": [1, 2]})
    (first, load), (_, load_empty) = open_each(find_pictures(["data.parquet"]).pictures, MOST)
    assert (first.name, load()) == ("data.parquet#0", b"one")
    with pytest.raises(InputError, match="its row is empty"):
        load_empty()


def test_parquet_with_paths(photos: Path) -> None:
    names = ["003.png", "deep/er/002.png", "003.png", None]
    write_parquet(photos / "data.parquet", {"file": names, "thumbnail": [b"", b"", b"", b""]})
    assert found(photos / "data.parquet", column="file") == {"003.png": encoded(3), "deep/er/002.png": encoded(2)}


def test_same_picture_twice_is_one(photos: Path, here: Path) -> None:
    assert len(found(photos, photos)) == 10
    assert len(found("photos/000.png", "photos/00*.png")) == 7


def test_two_pictures_of_one_name_are_refused(photos: Path, tmp_path: Path) -> None:
    fill(tmp_path / "others", range(1))
    with pytest.raises(ConfigError, match=r"two pictures are called 000.png, in .*photos.* and .*others"):
        find_pictures([photos, tmp_path / "others"])


def test_larger_content_than_allowed_is_not_read_whole(photos: Path, here: Path) -> None:
    make_tar(here / "0.tar", {"1.png": encoded(1)})
    write_parquet(here / "1.parquet", {"png": [encoded(1)]})
    for place in (photos / "001.png", "0.tar"):
        ((_, load),) = open_each(find_pictures([place]).pictures, 100)
        assert len(load()) == 101


def test_pipe_in_a_list_is_not_waited_for(here: Path) -> None:
    os.mkfifo(here / "pipe.png")
    (here / "list.txt").write_text("pipe.png", encoding="utf-8")
    ((_, load),) = open_each(find_pictures(["list.txt"]).pictures, MOST)
    with pytest.raises(InputError, match="not a file"):
        load()


def make_bad(here: Path) -> None:
    (here / "empty").mkdir()
    (here / "packed").mkdir()
    make_tar(here / "packed" / "0.tar", {"1.jpg": b""})
    make_tar(here / "no-pictures.tar", {"1.json": b"{}"})
    make_tar(here / "whole.tar", {"1.jpg": b"x" * 5000})
    (here / "cut2.tar").write_bytes((here / "whole.tar").read_bytes()[:2000])
    (here / "data.csv").write_text("a,b", encoding="utf-8")
    (here / "0.tar.gz").write_bytes(b"")
    (here / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (here / "nothing.txt").write_text("\n\n", encoding="utf-8")
    (here / "cut.parquet").write_bytes(b"PAR1xxxx")
    write_parquet(here / "text.parquet", {"caption": ["a"], "label": [1]})
    write_parquet(here / "two.parquet", {"left": [b"a"], "right": [b"b"]})
    os.mkfifo(here / "pipe.png")


@pytest.mark.parametrize(
    ("place", "column", "message"),
    [
        ("missing", None, "missing does not exist; expected a folder"),
        ("missing/*.jpg", None, r"nothing matches missing/\*\.jpg"),
        ("empty", None, r"empty holds no pictures\.$"),
        ("packed", None, r"packed holds no pictures\. .*1 \.tar\. To take the \.tar files, pass them by themselves"),
        ("no-pictures.tar", None, r"no-pictures\.tar holds no pictures"),
        ("cut2.tar", None, r"cut2\.tar is not a whole tar file"),
        ("0.tar.gz", None, r"neither a picture nor .*: decompress it"),
        ("data.csv", None, r"data\.csv is by its ending neither a picture nor \.txt, \.tar, \.parquet"),
        ("binary.txt", None, r"binary\.txt is not a list: it is not UTF-8"),
        ("nothing.txt", None, r"nothing\.txt holds no pictures"),
        ("pipe.png", None, "neither a file nor a folder"),
        ("s3://bucket/photos", None, "is an address: mount or download it"),
        ("cut.parquet", None, r"cut\.parquet is not a whole Parquet file"),
        ("text.parquet", None, r"no column of bytes; .* --column.*caption \(string\), label \(int64\)"),
        ("two.parquet", None, r"several columns of bytes; .* --column"),
        ("two.parquet", "image", r"two\.parquet has no column 'image'\. It has: left \(binary\), right"),
        ("text.parquet", "label", "that holds neither bytes nor paths, as column 'label'"),
    ],
)
def test_place_without_pictures_is_refused(here: Path, place: str, column: str | None, message: str) -> None:
    make_bad(here)
    with pytest.raises(ConfigError, match=message):
        find_pictures([place], column)


def test_no_place_is_refused() -> None:
    with pytest.raises(ConfigError, match="no pictures: pass a folder"):
        find_pictures([])
    with pytest.raises(ConfigError, match="holds a int; expected paths"):
        find_pictures([3])  # type: ignore[list-item]
