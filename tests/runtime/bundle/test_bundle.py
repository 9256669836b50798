"""A bundle is complete or absent, and nothing in it is used before it was hashed."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import onnx
import pytest

from trtower.bundle import files
from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import BUILD_NOTES, FUSED_GRAPH, GRAPH, GRAPH_DATA, MANIFEST, SCHEMA, Manifest
from trtower.bundle.staging import describe, locked, staged
from trtower.errors import BackendError, BundleError
from trtower.tower.vision_tower import VisionTower


def edit(bundle: Path, **changes: object) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps({**data, **changes}))


def test_manifest_survives_writing_and_reading(clip_bundle: Path) -> None:
    manifest = Bundle.open(clip_bundle).manifest
    assert Manifest.from_json(manifest.to_json()) == manifest


def test_error_names_a_bundle_nearby(spoilt: Path) -> None:
    spoilt.rename(spoilt.parent / "clip.rehearsal")
    with pytest.raises(BundleError, match=rf"does not exist\. There is {spoilt.parent / 'clip.rehearsal'}"):
        Bundle.open(spoilt.parent / "clip")
    with pytest.raises(BundleError, match=r"it has no tower\.json, but contains the bundle clip\.rehearsal\."):
        Bundle.open(spoilt.parent)


def test_name_without_its_folder_finds_the_bundle(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = spoilt.parent / "engines"
    engines.mkdir()
    spoilt.rename(engines / "our [clip]")
    monkeypatch.chdir(engines.parent)
    with pytest.raises(BundleError, match=r"There is engines/our \[clip\]\.$"):
        Bundle.open("our [clip]")


def test_folder_without_manifest_is_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not a bundle: it has no tower\.json.*trtower export"):
        Bundle.open(tmp_path)


def test_mapped_file_is_compared_while_it_is_used(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, inside = Bundle.open(spoilt), threading.Event()

    def hash_late(content: bytes) -> Any:
        assert inside.wait(10), "the block does not run while the file is hashed"
        return hashlib.sha256(content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "hashlib", SimpleNamespace(sha256=hash_late))
        with bundle.mapped(GRAPH_DATA):
            inside.set()
    with bundle.mapped(GRAPH_DATA) as content:
        assert bytes(content[:8]) == (spoilt / GRAPH_DATA).read_bytes()[:8]
    content[:8] = bytes(8)  # changes only what is mapped
    assert not bundle.altered()
    with (spoilt / GRAPH_DATA).open("r+b") as stream:
        stream.write(b"altered!")
    with pytest.raises(BundleError, match=r"tower\.onnx\.data was altered"), bundle.mapped(GRAPH_DATA):
        pass
    with pytest.raises(BundleError, match=r"tower\.onnx\.data was altered"), bundle.mapped(GRAPH_DATA):
        raise ValueError("what altered weights led to")
    with (
        pytest.raises(BundleError, match=r"tower\.onnx\.data was altered"),
        bundle.steady(GRAPH, numbers=GRAPH_DATA),
    ):
        raise ValueError("what altered weights led to")


def test_graph_is_compared_before_anything_parses_it(spoilt: Path) -> None:
    bundle = Bundle.open(spoilt)
    with (spoilt / GRAPH).open("r+b") as stream:
        stream.write(b"altered!")
    with (
        pytest.raises(BundleError, match=r"tower\.onnx was altered"),
        bundle.steady(GRAPH, numbers=GRAPH_DATA),
    ):
        pytest.fail("the block runs")


def test_error_says_what_the_path_is_instead_of_a_bundle(
    clip_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    for path, words in (
        (clip_bundle / "tower.onnx", f"tower.onnx is not a bundle: it is a file in the bundle {clip_bundle}."),
        (tmp_path / "config.json", "config.json is not a bundle: it is a file, not a folder."),
        (tmp_path, f"it has no tower.json. `trtower export {tmp_path}` makes a bundle from it."),
        (Path("acme/eyes-7b"), "`trtower export acme/eyes-7b` makes one from that checkpoint on the hub."),
        (Path("engines/eyes-7b"), "`trtower export CHECKPOINT` makes one."),
        (Path("engines/of/eyes-7b"), "`trtower export CHECKPOINT` makes one."),
    ):
        with pytest.raises(BundleError, match=re.escape(words)):
            Bundle.open(path)


def test_newer_schema_asks_for_a_newer_trtower(spoilt: Path) -> None:
    edit(spoilt, schema=SCHEMA + 1)
    with pytest.raises(BundleError, match="Install a newer trtower"):
        Bundle.open(spoilt)


def test_unknown_key_is_refused(spoilt: Path) -> None:
    edit(spoilt, colour="blue")
    with pytest.raises(BundleError, match="unknown colour"):
        Bundle.open(spoilt)


def test_value_of_another_type_is_named(spoilt: Path) -> None:
    edit(spoilt, precision=16)
    with pytest.raises(BundleError, match=r"tower\.json\.precision is 16; expected str"):
        Bundle.open(spoilt)


def test_missing_file_is_named(spoilt: Path) -> None:
    (spoilt / GRAPH_DATA).unlink()
    with pytest.raises(BundleError, match=r"tower\.onnx\.data is missing"):
        Bundle.open(spoilt)


def test_plan_cut_short_is_refused(spoilt: Path) -> None:
    plan = next((spoilt / "plans").glob("*.plan"))
    with plan.open("r+b") as stream:
        stream.truncate(plan.stat().st_size - 1)
    with pytest.raises(BundleError, match=r"\.plan has \d+ bytes"):
        Bundle.open(spoilt)


def test_flipped_byte_in_the_weights_is_found_before_they_are_run(spoilt: Path) -> None:
    flip(spoilt / GRAPH_DATA)
    with pytest.raises(BundleError, match=r"tower\.onnx\.data was altered"):
        VisionTower.load(spoilt)


def test_flipped_byte_in_a_plan_is_found(spoilt: Path) -> None:
    plan = next((spoilt / "plans").glob("*.plan"))
    flip(plan)
    with pytest.raises(BundleError, match="was altered"):
        Bundle.open(spoilt).read(f"plans/{plan.name}")


@pytest.mark.parametrize("name", ["../../x", "/etc/hostname", "plans/../../x"])
def test_path_that_leaves_the_bundle_is_refused(spoilt: Path, name: str) -> None:
    (spoilt.parent / "x").write_bytes(b"")
    manifest = json.loads((spoilt / MANIFEST).read_text())
    edit(spoilt, files={**manifest["files"], name: {"sha256": "0" * 64, "size": 0}})
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle.open(spoilt)


def test_link_that_leaves_the_bundle_is_refused(spoilt: Path) -> None:
    outside = spoilt.parent / "outside.data"
    (spoilt / GRAPH_DATA).rename(outside)
    (spoilt / GRAPH_DATA).symlink_to(outside)
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle.open(spoilt)


def test_plan_that_the_manifest_does_not_list_is_refused(spoilt: Path) -> None:
    manifest = json.loads((spoilt / MANIFEST).read_text())
    plan = manifest["plans"][0]["file"]
    edit(spoilt, files={name: entry for name, entry in manifest["files"].items() if name != plan})
    with pytest.raises(BundleError, match="so it cannot be verified"):
        Bundle.open(spoilt)


@pytest.mark.parametrize(("backend", "graph"), [("onnxruntime-cpu", FUSED_GRAPH), ("openvino", GRAPH)])
def test_graph_cannot_read_a_file_that_is_not_in_the_manifest(spoilt: Path, backend: str, graph: str) -> None:
    model = onnx.load(spoilt / graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "evil.bin"
    (spoilt / "evil.bin").write_bytes((spoilt / GRAPH_DATA).read_bytes())
    (spoilt / graph).write_bytes(model.SerializeToString())
    manifest = json.loads((spoilt / MANIFEST).read_text())
    entry = describe(spoilt / graph)
    edit(spoilt, files={**manifest["files"], graph: {"sha256": entry.sha256, "size": entry.size}})
    with pytest.raises((BackendError, BundleError), match=r"evil\.bin|reads weights that are not in tower\.onnx\.data"):
        VisionTower.load(spoilt, backend)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp64"},
        {"schema": 0},
        {"name": None},
        {"profiles": [{"min": 2, "opt": 1, "max": 1}]},
        {"profiles": []},
        {"profiles": [{"min": 1, "opt": 1, "max": 1}, {"min": 3, "opt": 3, "max": 4}]},
        {"precision": "bf16"},
    ],
)
def test_manifest_that_contradicts_itself_is_refused(spoilt: Path, changes: dict[str, object]) -> None:
    edit(spoilt, **changes)
    with pytest.raises(BundleError):
        Bundle.open(spoilt)


def test_rebuilt_plan_never_takes_the_name_of_the_old_one(spoilt: Path) -> None:
    bundle = Bundle.open(spoilt)
    (old,) = bundle.manifest.plans
    (spoilt / "staged").write_bytes(b"another plan for the same target")
    after = bundle.add_plan(old, spoilt / "staged")
    (new,) = after.manifest.plans
    assert new.file != old.file
    assert after.read(new.file) == b"another plan for the same target"
    assert not (spoilt / old.file).exists()
    assert Bundle.open(spoilt).manifest == after.manifest


def test_lock_is_the_same_for_every_spelling_of_a_path(spoilt: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(spoilt)
    with locked(spoilt), pytest.raises(BundleError, match="another process"), locked(tmp_path / "link"):
        pass


def test_read_only_disk_is_not_taken_for_another_writer(small_disk: Path) -> None:
    (small_disk / "b").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)  # noqa: S607
    with pytest.raises(BundleError, match=rf"{small_disk} cannot be written: "), locked(small_disk / "b"):
        pass


def test_failure_leaves_nothing(tmp_path: Path) -> None:
    def fail_half_way(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError

    with pytest.raises(RuntimeError), staged(tmp_path / "b", overwrite=False) as folder:
        fail_half_way(folder)
    assert [p.name for p in tmp_path.iterdir()] == [".b.lock"]


def test_failed_overwrite_keeps_the_old_bundle(spoilt: Path) -> None:
    before = (spoilt / MANIFEST).read_bytes()
    with pytest.raises(RuntimeError), staged(spoilt, overwrite=True):
        raise RuntimeError
    assert (spoilt / MANIFEST).read_bytes() == before


def test_overwrite_never_removes_anything_but_a_bundle(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("")
    with pytest.raises(BundleError, match="is not a bundle, so it was not touched"), staged(precious, overwrite=True):
        pass
    assert (precious / "thesis.tex").exists()


def test_old_bundle_is_restored_if_the_new_one_cannot_be_renamed(spoilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".staging"):
            raise PermissionError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(PermissionError), staged(spoilt, overwrite=True):
        pass
    assert Bundle.open(spoilt)


def test_killed_writer_leaves_no_bundle_and_no_lock(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from trtower.bundle.staging import staged
        with staged(Path({str(tmp_path / "b")!r}), overwrite=False) as folder:
            (folder / "half").write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    died = subprocess.run([sys.executable, "-c", script], check=False)
    assert died.returncode == -signal.SIGKILL
    assert not (tmp_path / "b").exists()
    with staged(tmp_path / "b", overwrite=False) as folder:
        assert os.listdir(folder) == []  # noqa: PTH208 - the dead writer's file is gone
    assert (tmp_path / "b").is_dir()


def test_writer_killed_between_the_renames_costs_nothing(spoilt: Path) -> None:
    spoilt.rename(spoilt.with_name(".bundle.old"))
    with pytest.raises(BundleError, match="Replace it with --overwrite"), staged(spoilt, overwrite=False):
        pass
    assert Bundle.open(spoilt)


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    locking = f"with locked(Path({str(tmp_path / 'b')!r})): pass"
    script = f"from pathlib import Path\nfrom trtower.bundle.staging import locked\n{locking}"
    with locked(tmp_path / "b"):
        second = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert "another process is writing" in second.stderr


def flip(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.seek(path.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


def test_bundle_without_manifest_is_a_broken_copy(spoilt: Path) -> None:
    (spoilt / "tower.json").unlink()
    with pytest.raises(BundleError, match=r"it has a tower\.onnx, but no tower\.json\. Copy the bundle again\.$"):
        Bundle.open(spoilt)


def test_misspelt_bundle_is_answered_with_the_nearest(spoilt: Path) -> None:
    with pytest.raises(BundleError, match=rf"does not exist\. There is {spoilt}\.$"):
        Bundle.open(spoilt.with_name(spoilt.name + "x"))


def test_folder_that_cannot_be_written_is_not_taken_for_another_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise filelock.Timeout("as filelock does where it cannot make the file")

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    with (
        pytest.raises(BundleError, match=f"{tmp_path} cannot be written: choose another folder"),
        locked(tmp_path / "b"),
    ):
        pass


def test_notes_for_people_may_change(spoilt: Path, tmp_path: Path) -> None:
    (spoilt / BUILD_NOTES).write_text("built on the device on Monday\n", encoding="utf-8")
    bundle = Bundle.open(spoilt)
    assert not bundle.altered()
    copy = bundle.copy_to(tmp_path / "copy")
    assert (copy.path / BUILD_NOTES).read_text(encoding="utf-8") == "built on the device on Monday\n"
    (spoilt / BUILD_NOTES).unlink()
    assert bundle.copy_to(copy.path).path == copy.path  # the same tower: nothing is copied, nothing is foreign
