"""A bundle appears whole or not at all, and the same input makes the same bytes."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from tests.conftest import BATCH, IMAGE_SIZE
from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import BUILD_NOTES, MANIFEST, SCHEMA
from trtower.cli import run
from trtower.errors import BuildError, BundleError, CheckpointError, ConfigError, MissingExtraError
from trtower.tower.image_processor import ImageProcessor
from trtower.tower.vision_tower import VisionTower
from trtower_export import pipeline
from trtower_export.checkpoint.checkpoint import Checkpoint, open_checkpoint
from trtower_export.checkpoint.preprocessor import fit_preprocessor
from trtower_export.console import LoggedProgress
from trtower_export.pipeline import ExportOptions, export_tower
from trtower_export.plan import build


@pytest.fixture
def clip(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["clip"]


def trtower_command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from trtower.cli import main; main()", *arguments]


def test_export_ends_with_a_certificate(clip: Path, tmp_path: Path) -> None:
    bundle = export_tower(str(clip), tmp_path / "b", ExportOptions(flavour="none"))
    assert bundle.manifest.certificate
    assert bundle.manifest.certificate.passed
    assert not bundle.manifest.source.random_weights
    assert bundle.manifest.source.checkpoint == str(clip.resolve())


def test_manifest_marks_a_rehearsal(clip: Path, tmp_path: Path) -> None:
    bundle = export_tower(str(clip), tmp_path / "b", ExportOptions(flavour="none", random_weights=True))
    assert bundle.manifest.source.random_weights
    assert bundle.manifest.certificate
    assert bundle.manifest.certificate.passed


def test_two_exports_in_two_processes_give_the_same_bytes(clip: Path, tmp_path: Path) -> None:
    here, there = (
        ["export", str(clip), "--out", str(tmp_path / name), "--no-check", "--no-store"] for name in ("a", "b")
    )
    assert run(here) == 0
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # on some processors sums depend on their number
    subprocess.run(trtower_command(*there), check=True, capture_output=True, env={**os.environ, **threads})
    a, b = (Bundle.open(tmp_path / name).manifest for name in ("a", "b"))
    (plan,) = a.plans
    assert a.files.keys() == b.files.keys()
    assert len(a.files) == 8
    assert all(a.files[name] == b.files[name] for name in a.files if name != plan.log)  # has times


def test_second_export_to_the_same_place_is_refused_before_any_work(
    clip: Path, spoilt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "staged", None)
    with pytest.raises(BundleError, match="Replace it with --overwrite"):
        export_tower(str(clip), spoilt, ExportOptions(flavour="none"))


def test_overwrite_replaces_the_bundle(clip: Path, spoilt: Path) -> None:
    options = ExportOptions(flavour="none", select_layer=-3, overwrite=True, check=False)
    assert export_tower(str(clip), spoilt, options).manifest.spec.layers == (2,)
    assert not Bundle.open(spoilt).manifest.plans
    assert sorted(p.name for p in spoilt.parent.iterdir()) == [".bundle.lock", "bundle"]


def test_layer_outside_the_tower_is_refused(clip: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"select_layer=-30 is outside this tower: 4 layers accept -5 to 4\."):
        export_tower(str(clip), tmp_path / "b", ExportOptions(select_layer=-30))


def test_unknown_precision_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown precision 'int3'; .* choose auto, fp16, bf16, fp32, fp8 or int8\."):
        ExportOptions(precision="int3")


def test_killed_export_leaves_no_bundle_and_the_next_succeeds(clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    command = ["export", str(clip), "--out", str(out), "--no-check", "--flavour", "none"]
    with subprocess.Popen(trtower_command(*command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / ".b.staging").exists():
            assert process.poll() is None, "the export ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert (tmp_path / ".b.staging").exists()
    assert run(command) == 0
    assert Bundle.open(out)
    assert not (tmp_path / ".b.staging").exists()


def test_disk_that_fills_while_the_graph_is_written_leaves_nothing(
    clip: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "check_space", lambda *_, **__: None)
    (small_disk / "in the way").write_bytes(bytes(900_000))
    with pytest.raises(BuildError, match="the disk filled up while"):
        export_tower(str(clip), small_disk / "b", ExportOptions(check=False))
    assert sorted(p.name for p in small_disk.iterdir()) == [".b.lock", "in the way"]


def test_disk_that_fills_while_the_plan_is_built_leaves_the_bundle_without_it(
    clip: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "check_space", lambda *_, **__: None)
    with pytest.raises(BuildError, match=r"the disk filled up while .*/b is complete and serves without a plan"):
        export_tower(str(clip), small_disk / "b", ExportOptions(check=False))
    assert_whole_without_a_plan(small_disk / "b")


RTX = ["--flavour", "tensorrt-rtx", "--compute-capability"]
ACCEPTED = ["--accept-known-fault", "dinov3-on-10.3"]


@pytest.mark.parametrize(
    ("asked", "needed", "there"),
    [
        (["--store"], RTX[:2], False),
        (["--no-store", *RTX, "8.9", *RTX[2:], "12.0", *ACCEPTED], [*RTX, "8.9", *RTX[2:], "12.0", *ACCEPTED], True),
        (["--no-store", "--target", "l4"], [*RTX, "8.9"], True),
    ],
)
def test_plan_that_cannot_be_built_leaves_the_bundle_and_names_the_command_that_builds_it(
    clip: Path,
    spoilt: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: list[str],
    needed: list[str],
    *,
    there: bool,
) -> None:
    out = spoilt if there else spoilt.parent / "another one"
    monkeypatch.setenv("XDG_CACHE_HOME", str(spoilt.parent / "cache"))
    refusal = BuildError("tensorrt-rtx could not build tower.onnx: out of words.")
    with monkeypatch.context() as patch:
        patch.setattr(build, "build_plan", lambda *_, **__: (_ for _ in ()).throw(refusal))
        assert run(["export", str(clip), "--out", str(out), "--overwrite", *asked]) == 1
    printed = capsys.readouterr()
    error, _, command = printed.err.splitlines()[-1].rpartition(" To add a plan later: trtower ")
    assert error.startswith("error: tensorrt-rtx could not build tower.onnx: out of words. ")
    assert f"{out} is complete and serves without a plan, but was not checked" in error
    assert_whole_without_a_plan(out)
    assert VisionTower.load(out).is_loaded
    assert shlex.split(command) == ["build", str(out), *needed]
    assert run(shlex.split(command)) == 0
    (plan,) = Bundle.open(out).manifest.plans
    assert plan.compute_capabilities == tuple(each for each in needed if each in {"8.9", "12.0"})


def assert_whole_without_a_plan(out: Path) -> None:
    bundle = Bundle.open(out)
    assert not bundle.manifest.plans
    assert not bundle.manifest.certificates
    assert not bundle.altered()
    assert sorted(p.name for p in out.parent.iterdir() if p.name.startswith(f".{out.name}.")) == [f".{out.name}.lock"]
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {MANIFEST, BUILD_NOTES, *bundle.manifest.files}


def test_interrupt_during_the_build_leaves_the_bundle_without_a_plan(clip: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    script = """
import os, signal
from trtower.cli import main
from trtower_export.plan import polygraphy
check = polygraphy._check_network
def interrupt(*arguments, **options):
    os.kill(os.getpid(), signal.SIGINT)
    check(*arguments, **options)
polygraphy._check_network = interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
main()
"""
    command = [sys.executable, "-c", script, "export", str(clip), "--out", str(out), "--no-store"]
    done = subprocess.run([*command, "--flavour", "tensorrt-rtx"], check=False, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == "error: interrupted"
    assert f"{out} is complete, and serves without a plan; building its plan" in done.stderr
    assert_whole_without_a_plan(out)


def test_disk_that_is_too_small_is_refused_at_once(clip: Path, small_disk: Path) -> None:
    with pytest.raises(BuildError, match=r"has 1 MiB free; this bundle needs about \d+ MiB"):
        export_tower(str(clip), small_disk / "b", ExportOptions(check=False))


def test_file_limit_is_reported_like_a_full_disk(clip: Path, tmp_path: Path) -> None:
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "from trtower.cli import main; main()"
    )
    command = [sys.executable, "-c", script, "export", str(clip), "--out", str(tmp_path / "b"), "--flavour", "none"]
    done = subprocess.run([*command, "--no-check"], check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: the disk filled up while")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "b").exists()


def test_manifest_holds_the_options(clip_bundle: Path) -> None:
    manifest = json.loads((clip_bundle / MANIFEST).read_text())
    assert manifest["schema"] == SCHEMA
    assert manifest["profiles"] == [{"min": BATCH.min, "opt": BATCH.opt, "max": BATCH.max}]
    assert manifest["input"] == {
        "name": "pixel_values",
        "dtype": "float16",
        "shape": ["batch", 3, IMAGE_SIZE, IMAGE_SIZE],
    }
    assert manifest["output"]["shape"] == ["batch", 10, 64]


@pytest.mark.parametrize(
    ("written", "fitted"),
    [
        # DINOv2: 256 -> crop 224 becomes 592 -> crop 518, the same share of the image.
        (
            {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
            {"size": {"shortest_edge": 592}, "crop_size": {"height": 518, "width": 518}},
        ),
        ({"size": 224, "crop_size": 224}, {"size": {"shortest_edge": 518}, "crop_size": {"height": 518, "width": 518}}),
        (
            {"size": {"height": 224, "width": 224}, "do_center_crop": False},
            {"size": {"height": 518, "width": 518}, "do_center_crop": False},
        ),
    ],
)
def test_preprocessor_is_fitted_to_the_engine(written: dict[str, object], fitted: dict[str, object]) -> None:
    assert fit_preprocessor(prepared(written), 518, LoggedProgress()) == {**fitted, "do_resize": True}


def prepared(written: dict[str, object]) -> Checkpoint:
    checkpoint = open_checkpoint("dinov2-small", random_weights=True)
    return replace(checkpoint, layout=replace(checkpoint.layout, preprocessor=written))


def test_preprocessor_that_fits_is_unchanged() -> None:
    checkpoint = open_checkpoint("clip-vit-large-patch14-336", random_weights=True)
    assert fit_preprocessor(checkpoint, 336, LoggedProgress()) is checkpoint.layout.preprocessor


@pytest.mark.parametrize(
    "kind",
    [
        "LlavaNextImageProcessor",
        "LlavaOnevisionImageProcessorFast",
        "GotOcr2ImageProcessorFast",
        "Siglip2ImageProcessorFast",
        "DINOv3ViTImageProcessorFast",
        "Gemma3ImageProcessor",
        "Idefics3ImageProcessor",
        "SmolVLMImageProcessorFast",
    ],
)
def test_processor_of_many_tiles_makes_one(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    written = transformers_processor(kind)
    with caplog.at_level("INFO"):
        fitted = fit_preprocessor(prepared(written), 56, LoggedProgress())
    assert f"{kind.removesuffix('Fast')}: the bundle's image_processor makes one 56 x 56 tile" in caplog.text
    photograph = Image.effect_mandelbrot((80, 80), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    pixel_values = ImageProcessor(fitted).preprocess(photograph, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 56, 56)
    assert fitted["image_mean"] == written["image_mean"]


def test_tile_of_a_whole_picture_equals_llava_next() -> None:
    name = (
        "LlavaNextImageProcessorPil"
        if hasattr(transformers, "LlavaNextImageProcessorPil")
        else "LlavaNextImageProcessor"
    )
    theirs = getattr(transformers, name)(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=[[56, 112]]
    )
    picture = Image.effect_mandelbrot((120, 60), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    expected = theirs(picture, return_tensors="pt")["pixel_values"][0, 0]
    written = {**theirs.to_dict(), "image_processor_type": "LlavaNextImageProcessor"}
    ours = ImageProcessor(fit_preprocessor(prepared(written), 56, LoggedProgress()))
    assert torch.equal(ours.preprocess(picture, return_tensors="pt")["pixel_values"][0], expected)


@pytest.mark.parametrize("kind", ["Idefics3ImageProcessor", "SmolVLMImageProcessor"])
def test_tile_of_a_whole_picture_equals_that_of_idefics3(kind: str) -> None:
    """Their processor first resizes a picture until its longest edge fits; of this square it does not have to."""
    processor = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    theirs = processor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    picture = Image.effect_mandelbrot((112, 112), (-2, -1.5, 1, 1.5), 50).convert("RGB")
    *_, expected = theirs(picture, return_tensors="pt")["pixel_values"][0]  # four tiles, then the whole picture
    written = {**theirs.to_dict(), "image_processor_type": kind}
    ours = ImageProcessor(fit_preprocessor(prepared(written), 56, LoggedProgress()))
    assert torch.equal(ours.preprocess(picture, return_tensors="pt")["pixel_values"][0], expected)


def test_processor_without_its_own_mean_is_refused() -> None:
    written = {"image_processor_type": "GotOcr2ImageProcessor", "resample": 3}
    with pytest.raises(CheckpointError, match="leaves image_mean, image_std to the defaults of GotOcr2ImageProcessor"):
        fit_preprocessor(prepared(written), 56, LoggedProgress())


def transformers_processor(kind: str) -> dict[str, object]:
    """Return the keys of such a processor that concern pixels, and one key that only it has."""
    size = {"height": 56, "width": 56}
    if kind.startswith("LlavaNext"):
        size = {"shortest_edge": 56}
    written = {"image_processor_type": kind, "size": size, "do_resize": True, "resample": 3, "do_pad": True}
    written |= {"image_grid_pinpoints": [[56, 112]], "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.5, 0.5]}
    return written | ({"crop_size": {"height": 56, "width": 56}} if kind.startswith("LlavaNext") else {})


def test_assumed_preprocessor_is_reported(clip: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        fit_preprocessor(open_checkpoint(str(clip)), IMAGE_SIZE, LoggedProgress())
    assert "the checkpoint has no preprocessor_config.json" in caplog.text


def test_preprocessor_that_no_tower_could_use_is_refused_before_any_work(clip: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip, tmp_path / "c"))
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    with pytest.raises(ConfigError, match="ViTImageProcessor"):
        export_tower(str(folder), tmp_path / "b", ExportOptions(flavour="none", check=False))
    assert not (tmp_path / ".b.lock").exists()


def test_images_that_nothing_would_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="--images is only for the check, which --no-check skips; precision fp16 needs no images"
    ):
        ExportOptions(images=tmp_path / "nowhere", check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU nothing is emulated")
def test_check_that_could_not_run_is_refused_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"checking FP16 without a GPU .*needs the package onnxruntime"):
        export_tower("nowhere", options=ExportOptions(flavour="none"))
    for options in (ExportOptions(flavour="none", check=False), ExportOptions(flavour="none", precision="bf16")):
        with pytest.raises(CheckpointError, match="nowhere"):
            export_tower("nowhere", options=options)
    monkeypatch.setattr("trtower_export.check.samples.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"checking BF16 without a GPU .*needs the package onnxruntime"):
        export_tower("nowhere", options=ExportOptions(flavour="none", precision="bf16"))
