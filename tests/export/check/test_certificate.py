"""A certificate covers every batch and every kind of image, and names what it does not cover."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import BATCH, WIDTH
from tests.export.checking import check, wrap_runner
from trtower.bundle.bundle import Bundle
from trtower.bundle.certificate import Certificate
from trtower.bundle.manifest import CONFIG, FUSED_GRAPH, GRAPH, GRAPH_DATA, PREPROCESSOR
from trtower.cli import run
from trtower.errors import BundleError
from trtower.inspection import as_text, inspect_bundle
from trtower.runners.base import run_batch
from trtower.spec import BatchProfile
from trtower.tower.image_processor import ImageProcessor
from trtower_export.check import certify
from trtower_export.check.certify import batches_of
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.graph.reference import UncutTower
from trtower_export.pipeline import ExportOptions, export_tower

if TYPE_CHECKING:
    from trtower_export.check.evidence import ImageEvidence

WRONG = 0.01
"""Relative error: FP32 makes 1e-6 here; one image with reversed tokens makes 0.3 over all images."""

BATCHES = [1, 2, 4, 5]
"""The batches of conftest's profile 1 2 4; 5 images take a call of 4 and a call of 1."""


@pytest.fixture
def clip(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["clip"]


def turn_around(hidden_states: torch.Tensor) -> None:
    """Reverse the tokens: finite, of the right size, and wrong."""
    hidden_states.copy_(hidden_states.flip(-2))


def wrong_batches(certificate: Certificate) -> list[int]:
    return [each.batch for each in certificate.batches if each.bundle.relative_error > WRONG]


def missed(certificate: Certificate) -> set[str]:
    return {bound.images for bound in certificate.bounds if not bound.holds}


@pytest.mark.parametrize(
    ("profile", "batches"), [(BATCH, BATCHES), ((1, 1, 1), [1, 2]), ((3, 3, 4), [3, 4, 5]), ((2, 8, 8), [2, 8, 9])]
)
def test_minimum_optimum_maximum_and_one_more_are_checked(
    profile: BatchProfile | tuple[int, int, int], batches: list[int]
) -> None:
    if isinstance(profile, tuple):
        profile = BatchProfile(min=profile[0], opt=profile[1], max=profile[2])
    assert batches_of([profile]) == batches


def test_every_profile_is_checked() -> None:
    assert batches_of([BatchProfile(min=1, opt=1, max=1), BatchProfile(min=1, opt=8, max=32)]) == [1, 8, 32, 33]


def test_every_image_is_run_in_every_batch_of_the_profile_and_in_pieces(
    monkeypatch: pytest.MonkeyPatch, fp32_bundle: Path, clip: Path
) -> None:
    by_batch: dict[int, set[bytes]] = {}
    calls: list[int] = []

    def watch(*arguments: Any) -> torch.Tensor:
        pixel_values = arguments[-1]
        assert isinstance(pixel_values, torch.Tensor)
        by_batch.setdefault(len(pixel_values), set()).update(image.numpy().tobytes() for image in pixel_values)
        return run_batch(*arguments)

    monkeypatch.setattr("trtower.parity.runs.run_batch", watch)
    wrap_runner(monkeypatch, lambda pixel_values, _: calls.append(len(pixel_values)))
    certificate = check(fp32_bundle, clip)
    assert certificate.passed
    assert [each.batch for each in certificate.batches] == sorted(by_batch) == BATCHES
    assert {batch: len(images) for batch, images in by_batch.items()} == dict.fromkeys(BATCHES, 2 + 4)
    assert set(calls) == {1, 2, 4}
    assert calls[-2:] == [4, 1]


@pytest.mark.parametrize(("size", "wrong"), [(1, [1, 5]), (2, [2]), (4, [4, 5])])
def test_engine_that_is_wrong_at_one_size_of_batch_fails_and_the_batch_is_named(
    monkeypatch: pytest.MonkeyPatch, fp32_bundle: Path, clip: Path, size: int, wrong: list[int]
) -> None:
    wrap_runner(monkeypatch, lambda pixel_values, output: turn_around(output) if len(pixel_values) == size else None)
    certificate = check(fp32_bundle, clip)
    assert not certificate.passed
    assert wrong_batches(certificate) == wrong
    assert missed(certificate) == {"photograph", "drawn"}


def test_split_batch_that_is_wrong_only_in_its_second_call_fails(
    monkeypatch: pytest.MonkeyPatch, fp32_bundle: Path, clip: Path
) -> None:
    before = [0]

    def spoil(pixel_values: torch.Tensor, hidden_states: torch.Tensor) -> None:
        if (before[-1], len(pixel_values)) == (4, 1):
            turn_around(hidden_states)
        before.append(len(pixel_values))

    wrap_runner(monkeypatch, spoil)
    certificate = check(fp32_bundle, clip)
    assert not certificate.passed
    assert wrong_batches(certificate) == [5]


def test_bound_measures_the_worst_batch(monkeypatch: pytest.MonkeyPatch, fp32_bundle: Path, clip: Path) -> None:
    wrap_runner(monkeypatch, lambda pixel_values, output: turn_around(output) if len(pixel_values) == 2 else None)
    certificate = check(fp32_bundle, clip)
    (worst,) = (each.bundle for each in certificate.batches if each.batch == 2)
    measured: dict[tuple[str, str], Any] = {
        (bound.figure, bound.images): bound.measured for bound in certificate.bounds
    }
    cosines = [measured["token_cosine_min", images] for images in ("photograph", "drawn")]
    assert min(cosines) == worst.token_cosine_min
    errors = [measured["relative_error", images] for images in ("photograph", "drawn")]
    assert min(errors) < worst.relative_error < max(errors)  # the batch covers both kinds together
    assert worst.relative_error > 1.9 * certificate.bundle.relative_error  # four batches, three sound


def saturated(bundle: Path) -> Callable[[torch.Tensor], bool]:
    """Return a function that tells whether a preprocessed image consists only of 0 and 255."""
    processor = ImageProcessor.from_file(bundle / PREPROCESSOR)
    black, white = (
        (torch.full((3,), level) - torch.tensor(processor.image_mean)) / torch.tensor(processor.image_std)
        for level in (0.0, 1.0)
    )

    def is_saturated(image: torch.Tensor) -> bool:
        extremes = [torch.isclose(image, level[:, None, None], atol=1e-3) for level in (black, white)]
        return bool((extremes[0] | extremes[1]).all())

    return is_saturated


@pytest.mark.parametrize(("spoilt", "kind"), [(True, "drawn"), (False, "photograph")])
def test_bundle_that_is_wrong_on_one_kind_of_image_misses_only_the_bounds_of_that_kind(
    monkeypatch: pytest.MonkeyPatch, fp32_bundle: Path, clip: Path, spoilt: bool, kind: str
) -> None:
    """Either saturated images are wrong, or everything that looks like a photograph: not saturated, grey or noise."""
    is_saturated = saturated(fp32_bundle)

    def spoil(pixel_values: torch.Tensor, hidden_states: torch.Tensor) -> None:
        for image, tokens in zip(pixel_values, hidden_states, strict=True):
            neighbours = float((image[:, 1:] - image[:, :-1]).abs().mean() / image.std().clamp_min(1e-6))
            photograph = not is_saturated(image) and 0 < neighbours < 0.8  # noise has 1.1
            if is_saturated(image) if spoilt else photograph:
                turn_around(tokens)

    wrap_runner(monkeypatch, spoil)
    certificate = check(fp32_bundle, clip)
    assert not certificate.passed
    assert missed(certificate) == {kind}
    wrong = {image.kind for image in certificate.images if image.bundle.relative_error > WRONG}
    assert wrong == ({"saturated"} if spoilt else {"photograph"})
    quick = check(fp32_bundle, clip, quick=True)
    assert quick.passed is spoilt  # a quick check runs no drawn image


def test_photographs_and_drawn_images_have_bounds_of_their_own(fp32_bundle: Path, clip: Path) -> None:
    certificate = check(fp32_bundle, clip)
    kinds = [image.kind for image in certificate.images]
    assert kinds == ["photograph", "photograph", "noise", "constant", "saturated", "saturated"]
    figures = [bound.figure for bound in certificate.bounds if bound.images == "drawn"]
    assert figures == [bound.figure for bound in certificate.bounds if bound.images == "photograph"]
    assert len(certificate.bounds) == 2 * len(figures) == 2 * 4


def test_quick_check_runs_only_photographs_and_only_the_smallest_batch(fp32_bundle: Path, clip: Path) -> None:
    certificate = check(fp32_bundle, clip, quick=True)
    assert [each.batch for each in certificate.batches] == [1]
    assert {image.kind for image in certificate.images} == {"photograph"}
    assert {bound.images for bound in certificate.bounds} == {"photograph"}


def test_evidence_is_reported_for_every_image(export: Callable[..., Path], clip: Path) -> None:
    evidence: list[ImageEvidence] = []
    certificate = check(export("clip", flavour="none"), clip, on_image=evidence.append)
    assert [(each.name, each.kind) for each in evidence] == [(image.name, image.kind) for image in certificate.images]
    for each in evidence:
        assert each.pixel_values.shape == (3, 42, 42)
        assert each.reference.shape == each.bundle.shape == each.torch.shape == (10, 64)
        assert {tensor.dtype for tensor in (each.pixel_values, each.reference, each.bundle, each.torch)} == {
            torch.float32
        }
        assert torch.equal(each.pixel_values, each.pixel_values.half().float())
        assert 0 < float((each.bundle - each.reference).norm() / each.reference.norm()) < WRONG
        assert not torch.equal(each.bundle, each.torch)


def test_certificate_depends_on_what_was_run_and_on_both_configs(
    export: Callable[..., Path], clip: Path, clip_bundle: Path
) -> None:
    certificate = check(clip_bundle, clip, photographs=1, quick=True)
    manifest = Bundle.open(clip_bundle).manifest
    assert certificate.executed == (GRAPH, GRAPH_DATA)
    assert set(certificate.files) == {GRAPH, FUSED_GRAPH, GRAPH_DATA, CONFIG, PREPROCESSOR}
    assert all(manifest.files[name].sha256 == sha256 for name, sha256 in certificate.files.items())


def pictures(folder: Path, *, readable: int, damaged: int = 0) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(readable):
        small = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"picture-{index}.png")
    for index in range(damaged):
        (folder / f"damaged-{index}.jpg").write_bytes(b"no image")
    return folder


@pytest.fixture
def checkable(export: Callable[..., Path], tmp_path: Path) -> Path:
    """Return an FP16 bundle without a plan that the test may write into."""
    return Path(shutil.copytree(export("clip", flavour="none"), tmp_path / "checked"))


def test_altered_plan_is_refused_and_not_listed_as_built(spoilt: Path, clip: Path, tmp_path: Path) -> None:
    (plan,) = (spoilt / "plans").glob("*.plan")
    assert run(["check", str(spoilt), "--images", str(pictures(tmp_path / "pictures", readable=1))]) == 0
    assert "NOT run" in as_text(inspect_bundle(Bundle.open(spoilt)))
    content = bytearray(plan.read_bytes())
    content[len(content) // 2] ^= 1
    plan.write_bytes(content)
    with pytest.raises(BundleError, match=f"{plan.name} was altered: copy the bundle again, or rebuild the plan"):
        check(spoilt, clip, quick=True)
    assert "NOT run" not in as_text(inspect_bundle(Bundle.open(spoilt)))


def test_skipped_images_are_named_and_counted(
    checkable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures(tmp_path / "pictures", readable=2, damaged=4)
    assert run(["check", str(checkable), "--images", str(folder)]) == 0
    assert (
        "  skipped 4 as unreadable: damaged-0.jpg, damaged-1.jpg, damaged-2.jpg and 1 more\n" in capsys.readouterr().err
    )
    certificate = Bundle.open(checkable).manifest.certificate
    assert certificate
    assert certificate.skipped == tuple(f"damaged-{index}.jpg" for index in range(4))
    assert [image.name for image in certificate.images[:-4]] == ["picture-0.png", "picture-1.png"]


@pytest.mark.parametrize("command", ["check", "export", "doctor"])
def test_folder_of_unreadable_images_is_one_line_of_error(
    checkable: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    folder = pictures(tmp_path / "pictures", readable=0, damaged=2)
    options = ["--out", str(tmp_path / "b"), "--precision", "auto"] if command == "export" else []
    source = checkable if command == "check" else clip
    assert run([command, str(source), "--images", str(folder), *options]) == 1
    *steps, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {folder} has no readable image: found damaged-0.jpg, damaged-1.jpg")
    assert not any("error" in step for step in steps)
    assert Bundle.open(checkable).manifest.certificate is None


@pytest.fixture
def infinite(clip: Path, tmp_path: Path) -> Path:
    """Return a checkpoint whose third layer computes infinity in FP32."""
    folder = Path(shutil.copytree(clip, tmp_path / "infinite"))
    model = open_checkpoint(str(folder)).load_model()
    layers = getattr(model, "vision_model", model).encoder.layers
    with torch.no_grad():
        layers[2].mlp.fc1.weight.mul_(1e38)
        layers[2].mlp.fc2.weight.mul_(1e3)
    model.save_pretrained(folder)
    return folder


def test_checkpoint_that_is_not_finite_in_fp32_is_sent_to_the_doctor_in_one_line(
    infinite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ExportOptions(flavour="none", check=False, precision="fp32", profiles=(BATCH,))
    with monkeypatch.context() as patch:  # as if the golden images were finite
        patch.setattr(UncutTower, "states", lambda *_: [torch.ones(1, 10, WIDTH)] * 10)
        bundle = export_tower(str(infinite), tmp_path / "b", options)
    folder = pictures(tmp_path / "pictures", readable=1)
    assert run(["check", str(bundle.path), "--images", str(folder)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        f"error: {infinite} is not finite in FP32 on picture-0.png, so nothing can be compared with it: "
        f"run trtower doctor {infinite} to find the operation."
    )
    assert Bundle.open(bundle.path).manifest.certificate is None
    assert run(["doctor", str(infinite), "--images", str(folder)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "not finite even in FP32: layers.2.mlp." in line


def test_check_without_a_gpu_says_so(checkable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pictures(tmp_path / "pictures", readable=1)
    assert run(["check", str(checkable), "--images", str(folder)]) == 0
    table = capsys.readouterr().out
    certificate = Bundle.open(checkable).manifest.certificate
    assert certificate
    assert certificate.gpu is None
    said = f"the ONNX graph was run on {certificate.runner}, without a GPU"
    assert f"passed: {said}" in table
    for batch in BATCHES:
        assert f"\nbatch {batch} " in table
    assert run(["inspect", str(checkable)]) == 0
    text = capsys.readouterr().out
    assert f"passed the check of {certificate.date}, 5 images, 1, 2, 4, 5 at once: {said}" in text


def test_by_layer_prints_the_layers_and_adds_them_to_the_json(
    checkable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["check", str(checkable), "--images", str(pictures(tmp_path / "pictures", readable=1))]
    assert run([*arguments, "--by-layer"]) == 0
    table = capsys.readouterr().out
    header = next(line for line in table.splitlines() if "hidden state" in line)
    assert " ".join(header.split()) == "hidden state cosine min rel. error PyTorch's error worst image worst token"
    rows = table.splitlines()[table.splitlines().index(header) + 1 :][:4]
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3"]
    assert "no layer's error jumps" in table
    assert run([*arguments, "--by-layer", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [layer["layer"] for layer in data["layers"]] == [0, 1, 2, 3]
    assert {layer["worst_image"] for layer in data["layers"]} <= {image["name"] for image in data["images"]}
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == []


def test_check_writes_a_report(checkable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder, report = pictures(tmp_path / "pictures", readable=3), tmp_path / "deep" / "report"
    assert run(["check", str(checkable), "--images", str(folder), "--report", str(report)]) == 0
    captured = capsys.readouterr()
    assert captured.out.endswith(f"{report / 'report.html'}\n")
    assert "hidden state" in captured.out
    page = (report / "report.html").read_text(encoding="utf-8")
    for word in ("picture-0.png", "squares", "not run on a GPU", Bundle.open(checkable).manifest.name):
        assert word in page
    drawn = sorted(report.glob("*.png"))
    assert len(drawn) >= 4
    for path in drawn:
        with Image.open(path) as image:
            image.verify()
    assert Bundle.open(checkable).manifest.certificate.layers


def test_report_that_cannot_be_written_is_refused_before_the_check(
    checkable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    taken = tmp_path / "taken"
    taken.write_text("mine")
    monkeypatch.setattr(certify, "check_bundle", lambda *_, **__: pytest.fail("the check was started"))
    assert run(["check", str(checkable), "--report", str(taken)]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line == f"error: {taken} is a file or inside one, but a report needs a folder: name another."
    assert taken.read_text() == "mine"
