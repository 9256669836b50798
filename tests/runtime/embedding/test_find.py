"""Pictures are found in folders, by patterns and lists, in tar files and in Parquet, each once, by one name."""

import io
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pictures import encoded, fill, make_tar
from trtower.embedding import find as module
from trtower.embedding.find import find_pictures
from trtower.embedding.picture import Picture, open_each
from trtower.errors import ConfigError, InputError

MOST = 10**6


def readers(pictures: Sequence[Picture], most: int = MOST) -> list[tuple[Picture, Callable[[], bytes]]]:
    each = open_each(((None, picture) for picture in pictures), most)
    return [(picture, lambda load=load: load()[0]) for _, picture, load in each]  # type: ignore[misc]


def read(pictures: Sequence[Picture]) -> dict[str, bytes]:
    return {picture.name: load() for picture, load in readers(pictures)}


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
    (first, load), (_, load_empty) = readers(find_pictures(["data.parquet"]).pictures)
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
        ((_, load),) = readers(find_pictures([place]).pictures, 100)
        assert len(load()) == 101


def test_pipe_in_a_list_is_not_waited_for(here: Path) -> None:
    os.mkfifo(here / "pipe.png")
    (here / "list.txt").write_text("pipe.png", encoding="utf-8")
    ((_, load),) = readers(find_pictures(["list.txt"]).pictures)
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
    (here / "foot.parquet").write_bytes(b"PAR1" + b"\xff" * 40 + b"\x20\0\0\0PAR1")
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
        ("foot.parquet", None, r"foot\.parquet is not a whole Parquet file"),
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


def test_rows_of_two_parquet_files_are_not_mixed_up(here: Path) -> None:
    write_parquet(here / "a.parquet", {"png": [b"a0", b"a1"]})
    write_parquet(here / "b.parquet", {"png": [b"b0", b"b1"]})
    expected = {"a.parquet#0": b"a0", "a.parquet#1": b"a1", "b.parquet#0": b"b0", "b.parquet#1": b"b1"}
    assert found("a.parquet", "b.parquet") == expected
    assert found("*.parquet") == expected


def test_one_parquet_file_by_two_names(here: Path) -> None:
    path = write_parquet(here / "a.parquet", {"png": [b"0", b"1", b"2"]})
    assert [*found("a.parquet", path).values()] == [b"0", b"1", b"2"] * 2


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int32(), pa.binary())])
def test_other_types_of_bytes(kind: pa.DataType) -> None:
    schema = pa.schema([("png", kind), ("image", pa.struct([("bytes", pa.string())]))])
    assert module._choose_column("file", schema, None) == ("png", "bytes")


def test_damaged_page_is_named(here: Path) -> None:
    path = write_parquet(here / "a.parquet", {"png": [bytes([row]) * 5000 for row in range(8)]}, group=4)
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content[start : start + 10] = b"\xff" * 10
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.parquet is damaged in its row group 1, rows 4 to 7 "):
        found("a.parquet")


def test_row_that_is_gone_is_left_out(here: Path) -> None:
    write_parquet(here / "a.parquet", {"png": [b"0", b"1"]})
    pictures = find_pictures(["a.parquet"]).pictures
    write_parquet(here / "a.parquet", {"png": [b"0"]})
    _, (_, load) = readers(pictures)
    with pytest.raises(InputError, match="its row is empty"):
        load()


def broken_tars(here: Path) -> dict[str, bytes]:
    whole = make_tar(here / "whole.tar", {f"{index}.png": b"x" * 1000 for index in range(3)}).read_bytes()
    second = 512 + 1024
    return {
        "header": whole[: second + 3] + b"\xff" * 20 + whole[second + 23 :],
        "cut before a header": whole[:second],
        "cut in a header": whole[: second + 100],
        "cut before the end": whole[: 3 * second],
        "two": whole + whole,
    }


@pytest.mark.parametrize("kind", ["header", "cut before a header", "cut in a header", "cut before the end", "two"])
def test_tar_that_ends_too_early_is_refused(here: Path, kind: str) -> None:
    (here / "broken.tar").write_bytes(broken_tars(here)[kind])
    with pytest.raises(ConfigError, match=r"broken\.tar is not a whole tar file"):
        find_pictures(["broken.tar"])
    assert len(found("whole.tar")) == 3


def test_hard_links_in_a_tar_are_pictures_and_others_are_counted(here: Path) -> None:
    fill(here / "photos", range(1))
    (here / "photos" / "hard.png").hardlink_to(here / "photos" / "000.png")
    (here / "photos" / "soft.png").symlink_to("000.png")
    with tarfile.open(here / "a.tar", "w") as archive:
        archive.add(here / "photos", "")
    result = find_pictures(["a.tar"])
    assert read(result.pictures) == {"a.tar/000.png": encoded(0), "a.tar/hard.png": encoded(0)}
    assert "1 .png that are links or sparse in a tar file" in result.remark


def test_folder_that_cannot_be_read_is_refused(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("er"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ConfigError, match=r"deep/er cannot be read \(Permission denied\)"):
        find_pictures([photos])


def test_pattern_ends_in_spite_of_circles(here: Path) -> None:
    fill(here / "photos", range(2))
    for name in ("one", "two"):
        (here / "photos" / name).symlink_to(here / "photos")
    assert [*found("photos/**/*.png")] == ["photos/000.png", "photos/001.png"]
    assert [*found("photos")] == ["000.png", "001.png"]


def test_link_does_not_rename_what_it_leads_to(here: Path) -> None:
    fill(here / "photos" / "z" / "sub", range(1))
    (here / "photos" / "a_link").symlink_to("z/sub")
    assert [*found("photos")] == ["a_link/000.png", "z/sub/000.png"]


def test_hidden_names_match_only_if_asked(here: Path) -> None:
    fill(here / "photos" / ".hidden", range(1))
    fill(here / "photos" / "shown", range(1))
    assert [*found("photos/*/*.png")] == ["photos/shown/000.png"]
    assert [*found("photos/.hidden/*.png")] == ["photos/.hidden/000.png"]


def test_name_that_is_not_text_is_refused(here: Path) -> None:
    (here / "photos").mkdir()
    (here / os.fsdecode(b"photos/\xff.png")).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"the name '\\udcff\.png' is not UTF-8.* rename it"):
        find_pictures(["photos"])


def test_odd_lines_of_a_list(here: Path) -> None:
    (here / "list.txt").write_text("\ufeffa.png\nb\u2028c.png\nd\0.png\n", encoding="utf-8")
    pictures = find_pictures(["list.txt"]).pictures
    assert [picture.name for picture in pictures] == ["a.png", "b\u2028c.png", "d\0.png"]
    assert pictures[2].stamp() == ""
    with pytest.raises(ValueError, match="null byte"):
        readers(pictures)[2][1]()


def test_stamp_changes_with_whatever_is_at_the_path(photos: Path, tmp_path: Path) -> None:
    (picture,) = find_pictures([photos / "000.png"]).pictures
    stamps = {picture.stamp()}
    shutil.copytree(photos, tmp_path / "copy")
    photos.rename(tmp_path / "away")
    (tmp_path / "copy").rename(photos)
    stamps.add(picture.stamp())
    photos.rename(tmp_path / "aside")
    photos.symlink_to(tmp_path / "away")
    stamps.add(picture.stamp())
    assert len(stamps) == 2  # the last is the first again
    (photos / "000.png").write_bytes(b"")
    assert picture.stamp() not in stamps
    (photos / "000.png").unlink()
    assert picture.stamp() == ""
