"""`verify` proves an engine with the runtime alone, and finds a wrong one."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import BATCH
from tests.export.checking import Wrapped, damage
from trtower import CLIPVisionTower, VisionTower, build_vision_tower, verify_bundle
from trtower.bundle.bundle import Bundle
from trtower.bundle.certificate import CHECK, VERIFY
from trtower.bundle.manifest import GOLDEN, GRAPH, GRAPH_DATA
from trtower.bundle.staging import locked
from trtower.cli import run
from trtower.errors import BackendError, BundleError, ConfigError
from trtower.parity import verify as module
from trtower.parity.verify import verify
from trtower.runners.choose import candidates, choose
from trtower.spec import BatchProfile
from trtower_export.check.certify import check_bundle
from trtower_export.check.photographs import load_photographs
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.console import LoggedProgress
from trtower_export.pipeline import ExportOptions, export_tower

BACKEND = "onnxruntime-cpu"


@pytest.fixture
def copy(fp32_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fp32_bundle, tmp_path / "copy"))


@pytest.fixture
def wrong(copy: Path) -> Path:
    """Return a bundle whose graph computes something else, with hashes that fit."""
    damage(copy, "layers.1.mlp.fc1/MatMul")
    return copy


def check(folder: Path, checkpoints: dict[str, Path]) -> Bundle:
    checkpoint, photographs = open_checkpoint(str(checkpoints["clip"])), load_photographs(None, limit=1)
    return check_bundle(Bundle.open(folder), checkpoint, photographs, LoggedProgress(), quick=True, backend=BACKEND)


def spoil(monkeypatch: pytest.MonkeyPatch, after: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
    """Make `verify` run its bundles on a runner that changes results."""
    monkeypatch.setattr(module, "choose", lambda *arguments: Wrapped(choose(*arguments), after))


def test_sound_bundle_gets_a_certificate_that_services_accept(copy: Path) -> None:
    certificate = verify_bundle(Bundle.open(copy), backend=BACKEND).manifest.certificate
    assert certificate
    assert (certificate.passed, certificate.kind, certificate.backend) == (True, VERIFY, BACKEND)
    assert [each.batch for each in certificate.batches] == [BATCH.min, BATCH.opt, BATCH.max]
    assert {bound.images for bound in certificate.bounds} == {"photograph", "drawn"}
    assert certificate.executed == (GRAPH, GRAPH_DATA)
    assert {GOLDEN, "config.json", "preprocessor_config.json"} < certificate.files.keys()
    assert certificate.bundle.relative_error is not None
    assert certificate.bundle.relative_error < 1e-5
    assert VisionTower.load(copy, BACKEND, require_certificate=True).is_loaded


def test_certificate_is_void_once_the_golden_file_changes(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify_bundle(Bundle.open(copy), backend=BACKEND)
    with (copy / GOLDEN).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    with pytest.raises(BundleError, match=f"void because {GOLDEN} changed"):
        VisionTower.load(copy, BACKEND, require_certificate=True)


def test_wrong_graph_is_found(wrong: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(wrong), "--backend", BACKEND]) == 1
    out = capsys.readouterr().out
    assert "MISSED photograph token_cosine_min" in out
    assert "FAILED: the ONNX graph was run on onnxruntime" in out
    with pytest.raises(
        BundleError, match=r"its verification of .* missed token_cosine_min.*Certify what runs here: trtower verify"
    ):
        VisionTower.load(wrong, BACKEND, require_certificate=True)
    assert run(["inspect", str(wrong)]) == 0
    assert "FAILED the verification of" in capsys.readouterr().out


def test_graph_cut_one_layer_off_is_found(export: Callable[..., Path], tmp_path: Path) -> None:
    right, other = (export("clip", precision="fp32", flavour="none", select_layer=layer) for layer in (-2, -3))
    folder = Path(shutil.copytree(right, tmp_path / "bundle"))
    for name in (GRAPH, GRAPH_DATA):
        shutil.copyfile(other / name, folder / name)
    manifest = json.loads((folder / "tower.json").read_text())
    foreign = json.loads((other / "tower.json").read_text())
    manifest["files"] |= {name: foreign["files"][name] for name in (GRAPH, GRAPH_DATA)}
    (folder / "tower.json").write_text(json.dumps(manifest))
    assert not verify(Bundle.open(folder), backend=BACKEND).passed


@pytest.mark.parametrize("size", [BATCH.min, BATCH.opt, BATCH.max])
def test_engine_that_is_wrong_at_one_batch_size_is_found(
    copy: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    def swap_rows(pixel_values: torch.Tensor, hidden_states: torch.Tensor) -> None:
        if len(hidden_states) == size:
            hidden_states[0, 5] = -hidden_states[0, 5]

    spoil(monkeypatch, swap_rows)
    certificate = verify(Bundle.open(copy), backend=BACKEND)
    assert not certificate.passed
    errors = {each.batch: each.bundle.relative_error or 0.0 for each in certificate.batches}
    assert [batch for batch, error in errors.items() if error > 1e-3] == [size]


def test_features_that_are_not_finite_are_found(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda pixel_values, hidden_states: hidden_states[0, 0, :1].fill_(torch.nan))
    certificate = verify(Bundle.open(copy), backend=BACKEND)
    assert "non_finite" in certificate.missed
    assert certificate.bundle.non_finite > 0


def test_service_refuses_to_come_up_on_a_wrong_engine(wrong: Path, copy: Path) -> None:
    assert VisionTower.load(wrong, BACKEND).is_loaded
    refusal = r"is wrong on onnxruntime .*, so it is not served: MISSED .*trtower verify .* --backend onnxruntime-cpu"
    with pytest.raises(BackendError, match=refusal):
        VisionTower.load(wrong, BACKEND, verify=True)


def test_service_comes_up_on_a_sound_engine_and_writes_nothing(fp32_bundle: Path) -> None:
    tower = VisionTower.load(fp32_bundle, BACKEND, verify=True)
    assert tower(torch.zeros(1, 3, 42, 42)).shape == (1, 9, 64)
    assert not Bundle.open(fp32_bundle).manifest.certificates


def test_refused_engine_is_closed(wrong: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = []
    original = type(choose(Bundle.open(wrong), BACKEND)).close
    monkeypatch.setattr(
        "trtower.runners.onnxruntime.OnnxRuntimeRunner.close", lambda self: (closed.append(self), original(self))
    )
    with pytest.raises(BackendError, match="is wrong"):
        VisionTower.load(wrong, BACKEND, verify=True)
    assert len(closed) == 1


@pytest.mark.parametrize("profile", [(1, 1, 1), (2, 2, 2), (5, 6, 7)])
def test_every_profile_can_be_verified(checkpoints: dict[str, Path], tmp_path: Path, profile: tuple[int, ...]) -> None:
    fewest, tuned, most = profile
    profiles = (BatchProfile(min=fewest, opt=tuned, max=most),)
    options = ExportOptions(check=False, flavour="none", precision="fp32", profiles=profiles)
    bundle = export_tower(str(checkpoints["clip"]), tmp_path / "bundle", options)
    certificate = verify(bundle)
    assert certificate.passed
    assert [each.batch for each in certificate.batches] == sorted(set(profile))
    assert VisionTower.load(bundle.path, verify=True).is_loaded


def test_check_and_verification_keep_their_own_certificates(copy: Path, checkpoints: dict[str, Path]) -> None:
    check(copy, checkpoints)
    verify_bundle(Bundle.open(copy), backend=BACKEND)
    verify_bundle(Bundle.open(copy), backend=BACKEND)
    kinds = [each.kind for each in Bundle.open(copy).manifest.certificates]
    assert kinds == [CHECK, VERIFY]
    check(copy, checkpoints)
    assert [each.kind for each in Bundle.open(copy).manifest.certificates] == [VERIFY, CHECK]


def test_one_that_failed_decides(copy: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    check(copy, checkpoints)
    with monkeypatch.context() as patch:
        spoil(patch, lambda pixel_values, hidden_states: hidden_states.neg_())
        verify_bundle(Bundle.open(copy), backend=BACKEND)
    check(copy, checkpoints)
    with pytest.raises(BundleError, match="its verification of"):
        VisionTower.load(copy, BACKEND, require_certificate=True)
    verify_bundle(Bundle.open(copy), backend=BACKEND)
    assert VisionTower.load(copy, BACKEND, require_certificate=True).is_loaded


def test_coarse_backend_needs_a_check(spoilt: Path) -> None:
    coarse = "openvino-bf16"
    rows = {each.backend: each for each in candidates(Bundle.open(spoilt))}
    if rows[coarse].obstacle:
        pytest.skip(f"{coarse}: {rows[coarse].obstacle}")
    assert verify_bundle(Bundle.open(spoilt), backend=coarse).manifest.certificate
    reservation = {each.backend: each for each in candidates(Bundle.open(spoilt))}[coarse].reservation
    assert reservation
    assert reservation.endswith(f"has no valid certificate of a check on it: trtower check {spoilt} --backend {coarse}")
    assert choose(Bundle.open(spoilt)).backend != coarse


def test_json_is_the_certificate_and_progress_stays_out_of_it(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(copy), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["kind"] == VERIFY
    *batches, where = captured.err.splitlines()
    assert batches == ["batch 1 …", "batch 2 …", "batch 4 …"]
    assert where == f"the certificate is in {copy / 'tower.json'}"


ALONE = """
import sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "onnx", "onnxscript", "huggingface_hub", "trtower_export"):
            raise ImportError(f"{name} must not be needed")

sys.meta_path.insert(0, Refuse())
import trtower
bundle = trtower.verify_bundle(trtower.Bundle.open(sys.argv[1]), backend="onnxruntime-cpu")
assert bundle.manifest.certificate.passed
trtower.VisionTower.load(sys.argv[1], "onnxruntime-cpu", verify=True, require_certificate=True)
"""


def test_it_needs_the_runtime_alone(copy: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ALONE, copy], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_read_only_bundle_says_so_before_anything_runs(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtower.bundle.staging.os.access", lambda folder, mode: False)
    monkeypatch.setattr(module, "choose", lambda *_: pytest.fail("it ran first"))
    with pytest.raises(BundleError, match=r"is read-only.*verify a writable copy, or load it with verify=True"):
        verify_bundle(Bundle.open(copy))


def test_any_altered_file_is_refused(spoilt: Path) -> None:
    plan = Bundle.open(spoilt).manifest.plans[0].file
    with (spoilt / plan).open("r+b") as file:
        file.write(b"!")
    with pytest.raises(BundleError, match="was altered"):
        verify(Bundle.open(spoilt), backend=BACKEND)


def test_figures_are_printed_even_if_another_process_keeps_writing(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "WAIT_S", 0.1)
    with locked(copy):
        assert run(["verify", str(copy), "--backend", BACKEND]) == 1
    captured = capsys.readouterr()
    assert "passed: the ONNX graph was run" in captured.out
    assert "error: another process is writing" in captured.err


def test_another_writer_is_waited_for_and_named(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WAIT_S", 0.1)
    with locked(copy), pytest.raises(BundleError, match="another process is writing"):
        verify_bundle(Bundle.open(copy), backend=BACKEND)


def test_unknown_backend_is_named(copy: Path) -> None:
    with pytest.raises(ConfigError, match="backend"):
        verify(Bundle.open(copy), backend="onnx")


def test_options_reach_every_class_of_tower(wrong: Path) -> None:
    config: Any = SimpleNamespace(mm_vision_select_layer=-2, mm_vision_tower=str(wrong))
    with pytest.raises(BackendError, match="is wrong"):
        CLIPVisionTower(wrong, config, backend=BACKEND, verify=True)
    with pytest.raises(BackendError, match="is wrong"):
        build_vision_tower(config, backend=BACKEND, verify=True)
