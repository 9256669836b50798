"""A certificate vouches only for the files that were checked, and for what was run."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

from tests.export.checking import make_hashes_fit
from trtower import CLIPVisionTower, VisionTower, build_vision_tower
from trtower.bundle.bundle import Bundle
from trtower.bundle.certificate import Certificate
from trtower.bundle.manifest import CONFIG, GRAPH, GRAPH_DATA, MANIFEST, PREPROCESSOR, Manifest, PlanEntry
from trtower.bundle.staging import describe, write_manifest
from trtower.cli import run
from trtower.errors import BundleError
from trtower.inspection import inspect_bundle
from trtower.runners.onnxruntime import OnnxRuntimeRunner
from trtower_export.check.certify import check_bundle
from trtower_export.check.photographs import load_photographs
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.console import LoggedProgress

BACKEND = "onnxruntime-cpu"
PLAN_BACKEND = "tensorrt-rtx"
DEPENDS = (GRAPH, GRAPH_DATA, CONFIG, PREPROCESSOR)


@pytest.fixture(scope="module")
def passed(fp32_bundle: Path, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle whose check has passed; do not change it."""
    folder = Path(shutil.copytree(fp32_bundle, tmp_path_factory.mktemp("certified") / "bundle"))
    photographs = load_photographs(None, limit=1)
    checkpoint = open_checkpoint(str(checkpoints["clip"]))
    checked = check_bundle(Bundle.open(folder), checkpoint, photographs, LoggedProgress(), quick=True, backend=BACKEND)
    assert checked.manifest.certificate
    assert checked.manifest.certificate.passed
    return folder


@pytest.fixture
def certified(passed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(passed, tmp_path / "certified"))


def change_manifest(folder: Path, **changes: Any) -> Manifest:
    manifest = replace(Bundle.open(folder).manifest, **changes)
    write_manifest(folder, manifest)
    return manifest


def change_certificate(folder: Path, **changes: Any) -> Certificate:
    certificate = Bundle.open(folder).manifest.certificate
    assert certificate
    changed = change_manifest(folder, certificates=(replace(certificate, **changes),)).certificate
    assert changed
    return changed


def change_file(folder: Path, name: str) -> None:
    """Change a file's bytes, but not their meaning."""
    if name == GRAPH:
        model = onnx.load(folder / name, load_external_data=False)
        model.producer_version += "x"
        (folder / name).write_bytes(model.SerializeToString())
    else:
        with (folder / name).open("ab") as stream:
            stream.write(b"\n")


def load(folder: Path) -> VisionTower:
    return VisionTower.load(folder, BACKEND, require_certificate=True)


def refusal(folder: Path) -> str:
    """Return why a bundle is refused if a certificate is required; without that it must load."""
    assert VisionTower.load(folder).is_loaded
    with pytest.raises(BundleError) as failure:
        load(folder)
    message = str(failure.value)
    manifest = Bundle.open(folder).manifest
    next_step = f"Certify what runs here: trtower verify {folder} --backend {BACKEND}"
    if manifest.source.random_weights:
        next_step = "Export the checkpoint itself."
    elif not all(each.passed for each in manifest.certificates):
        next_step = f"See where it errs: trtower check {folder} --backend {BACKEND} --report DIR"
    head, tail = f"{folder} is not certified: ", f". {next_step}"
    assert message.startswith(head)
    assert message.endswith(tail)
    assert "\n" not in message
    return message[len(head) : -len(tail)]


def inspected(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert run(["inspect", str(folder)]) == int(bool(Bundle.open(folder, whole=False).altered()))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  certificate  "))
    return line.removeprefix("  certificate  ")


def test_bundle_that_passed_loads(certified: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tower = load(certified)
    assert tower(torch.zeros(1, 3, 42, 42)).shape == (1, 9, 64)
    assert inspected(certified, capsys).startswith(f"of {BACKEND} passed the check of ")
    assert inspect_bundle(Bundle.open(certified)).certificates[0].void == []


def test_bundle_without_certificate_is_refused(fp32_bundle: Path) -> None:
    assert refusal(fp32_bundle) == "it has no certificate"


def test_bundle_that_failed_is_refused_with_what_it_missed(certified: Path) -> None:
    certificate = Bundle.open(certified).manifest.certificate
    assert certificate
    bounds = tuple(
        replace(bound, holds=bound.figure not in ("token_cosine_min", "token_error_p999"))
        for bound in certificate.bounds
    )
    drawn = tuple(replace(bound, images="drawn") for bound in bounds)
    change_certificate(certified, passed=False, bounds=(*bounds, *drawn))
    assert refusal(certified) == f"its check of {certificate.date} missed token_cosine_min, token_error_p999"


def test_rehearsal_is_refused(certified: Path) -> None:
    manifest = Bundle.open(certified).manifest
    change_manifest(certified, source=replace(manifest.source, random_weights=True))
    assert refusal(certified) == "it is a rehearsal, with random weights"


@pytest.mark.parametrize("name", DEPENDS)
def test_replaced_file_makes_the_certificate_void(
    certified: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest lists the new file, as after another export into the same folder."""
    change_file(certified, name)
    make_hashes_fit(certified, name)
    assert refusal(certified) == f"its certificate is void because {name} changed after the check"
    assert inspected(certified, capsys) == (
        f"of {BACKEND} is void: {name} changed after the check: trtower check {certified} --backend {BACKEND}"
    )
    assert inspect_bundle(Bundle.open(certified)).certificates[0].void == [name]


@pytest.mark.parametrize("name", DEPENDS)
def test_altered_file_makes_the_certificate_void(
    certified: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest lists another sha256, so the file is not even loaded."""
    content = bytearray((certified / name).read_bytes())
    content[len(content) // 2] ^= 1
    (certified / name).write_bytes(content)
    assert (
        inspected(certified, capsys) == f"of {BACKEND} is void: {name} changed after the check"
    )  # a check would not help
    with pytest.raises(BundleError, match=f"{name} was altered"):
        load(certified)


def test_file_removed_from_the_manifest_makes_the_certificate_void(certified: Path) -> None:
    certificate = Bundle.open(certified).manifest.certificate
    assert certificate
    change_certificate(certified, files={**certificate.files, "plans/gone.plan": "0" * 64})
    assert refusal(certified) == "its certificate is void because plans/gone.plan changed after the check"


def add_plan(folder: Path) -> str:
    """Add a plan that cannot run on this machine."""
    name = "plans/other.plan"
    (folder / "plans").mkdir()
    (folder / name).write_bytes(b"a plan")
    plan = PlanEntry(file=name, flavour="tensorrt-rtx", version="0", platform="none", compute_capabilities=())
    files = {**Bundle.open(folder).manifest.files, name: describe(folder / name)}
    change_manifest(folder, files=files, plans=(plan,))
    return name


def certify_plan(folder: Path, plan: str) -> None:
    """Turn the certificate into that of a plan."""
    manifest = Bundle.open(folder).manifest
    files = {**manifest.certificate.files, plan: manifest.files[plan].sha256}
    change_certificate(folder, ran="plan", backend=PLAN_BACKEND, executed=(plan,), files=files)


def test_certificate_of_a_replaced_plan_goes_with_it(certified: Path, tmp_path: Path) -> None:
    certify_plan(certified, add_plan(certified))
    bundle = Bundle.open(certified)
    assert bundle.manifest.certificates
    (tmp_path / "staged").write_bytes(b"a plan that was built again")
    assert bundle.add_plan(bundle.manifest.plans[0], tmp_path / "staged").manifest.certificates == ()


def test_check_of_a_plan_does_not_certify_the_graph(certified: Path) -> None:
    plan = add_plan(certified)
    certify_plan(certified, plan)
    assert refusal(certified) == f"{GRAPH} on {BACKEND} was not checked, only {plan} on {PLAN_BACKEND}"


def test_check_of_one_backend_does_not_certify_another(certified: Path) -> None:
    checked = change_certificate(certified, backend="onnxruntime-cuda")
    assert refusal(certified) == f"{GRAPH} on {BACKEND} was not checked, only {GRAPH} on onnxruntime-cuda"
    both = Bundle.open(certified).add_certificate(replace(checked, backend=BACKEND))
    assert [each.backend for each in both.manifest.certificates] == ["onnxruntime-cuda", BACKEND]
    assert load(certified).is_loaded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"executed": ()}, "executed"),
        ({"executed": ("tower.plan",)}, "executed"),
        ({"files": {}}, "executed"),
        ({"passed": False}, "says passed=False, but its bounds do not"),
        ({"bounds": ()}, "says passed=True, but its bounds do not"),
    ],
)
def test_certificate_that_contradicts_itself_is_refused(
    certified: Path, changes: dict[str, object], message: str
) -> None:
    text = (certified / MANIFEST).read_text()
    data = json.loads(text)
    data["certificates"][0] |= changes
    (certified / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=message):
        Bundle.open(certified)
    data = json.loads(text)
    data["certificates"] *= 2
    (certified / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(BundleError, match="two of the same kind for the same files on the same backend and GPU"):
        Bundle.open(certified)


def test_refused_runner_is_closed(certified: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_certificate(certified, backend="onnxruntime-cuda")
    closed: list[object] = []
    monkeypatch.setattr(OnnxRuntimeRunner, "close", lambda runner: closed.append(runner))
    refusal(certified)
    assert len(closed) == 1


def test_check_replaces_the_previous_one_of_the_same_backend(certified: Path) -> None:
    before = Bundle.open(certified).manifest.certificate
    assert before
    bundle = Bundle.open(certified).add_certificate(replace(before, date="2027-01-01"))
    assert [each.date for each in bundle.manifest.certificates] == ["2027-01-01"]


def test_check_of_the_graph_does_not_certify_a_plan(certified: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = add_plan(certified)
    bundle = Bundle.open(certified)
    reason = f"{plan} on {PLAN_BACKEND} was not checked, only {GRAPH} on {BACKEND}"
    assert bundle.why_uncertified(PLAN_BACKEND, (plan,)) == reason
    assert load(certified).is_loaded  # on the graph
    assert run(["inspect", str(certified)]) == 0
    assert f"NOT run      {plan}: built, but not checked on a GPU" in capsys.readouterr().out


def test_altered_graph_voids_the_check_of_a_plan_built_from_it(certified: Path) -> None:
    plan = add_plan(certified)
    certify_plan(certified, plan)
    assert Bundle.open(certified).why_uncertified(PLAN_BACKEND, (plan,)) is None
    content = bytearray((certified / GRAPH_DATA).read_bytes())
    content[-1] ^= 1
    (certified / GRAPH_DATA).write_bytes(content)
    reason = f"its certificate is void because {GRAPH_DATA} changed after the check"
    assert Bundle.open(certified).why_uncertified(PLAN_BACKEND, (plan,)) == reason


def test_file_that_vanished_voids_the_certificate(certified: Path) -> None:
    bundle = Bundle.open(certified)
    (certified / CONFIG).unlink()
    reason = f"its certificate is void because {CONFIG} changed after the check"
    assert bundle.why_uncertified(BACKEND, (GRAPH, GRAPH_DATA)) == reason


@pytest.mark.parametrize("make", [CLIPVisionTower, lambda path, args, **o: build_vision_tower(args, **o)])
def test_llavas_tower_accepts_require_certificate(
    certified: Path, fp32_bundle: Path, make: Callable[..., CLIPVisionTower]
) -> None:
    def config(path: Path) -> SimpleNamespace:
        return SimpleNamespace(mm_vision_tower=str(path), mm_vision_select_layer=-2)

    assert make(str(certified), config(certified), require_certificate=True).is_loaded
    assert make(str(fp32_bundle), config(fp32_bundle)).is_loaded
    with pytest.raises(BundleError, match="is not certified: it has no certificate"):
        make(str(fp32_bundle), config(fp32_bundle), require_certificate=True)


def test_requirement_holds_for_delayed_loading(fp32_bundle: Path) -> None:
    args = SimpleNamespace(mm_vision_select_layer=-2)
    tower = CLIPVisionTower(str(fp32_bundle), args, delay_load=True, require_certificate=True)
    with pytest.raises(BundleError, match="is not certified: it has no certificate"):
        tower.load_model()
    assert not tower.is_loaded


def test_certificate_with_a_missing_key_is_refused(certified: Path) -> None:
    manifest = json.loads((certified / MANIFEST).read_text())
    del manifest["certificates"][0]["executed"]
    (certified / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"tower\.json\.certificates\[0\] does not match schema \d: missing executed"):
        load(certified)


def test_certificate_of_files_that_changed_is_refused(certified: Path) -> None:
    opened = Bundle.open(certified)
    config = certified / CONFIG
    config.write_text(config.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    files = {**opened.manifest.files, CONFIG: describe(config)}
    write_manifest(certified, replace(opened.manifest, files=files))
    assert opened.manifest.certificate
    with pytest.raises(BundleError, match="was exported or built again, so this certificate is out of date"):
        opened.add_certificate(opened.manifest.certificate)
