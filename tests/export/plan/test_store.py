"""A plan is built once on a machine, and no damage in the store gets into a bundle."""

import errno
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock

from tests.export.checking import make_hashes_fit
from trtower import Bundle
from trtower.bundle.manifest import BUILD_NOTES, GRAPH, GRAPH_DATA, MANIFEST, BuildSettings
from trtower.bundle.staging import write_manifest
from trtower.cli import run
from trtower.errors import BackendError, BuildError, BundleError, ConfigError
from trtower.flavour import load_flavour
from trtower.spec import BatchProfile
from trtower_export.console import LoggedProgress, Step
from trtower_export.pipeline import ExportOptions, export_tower
from trtower_export.plan import build as module
from trtower_export.plan import choice
from trtower_export.plan.build import add_plan
from trtower_export.plan.choice import choose_plan
from trtower_export.plan.polygraphy import _settings, build_plan

BUILD = "import sys; from trtower.cli import run; sys.exit(run(['build', *sys.argv[1:]]))"
PATIENCE_S = 60


class Recorder(LoggedProgress):
    """Records messages and the titles of steps."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.steps: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        self.steps.append(title)
        yield Step()


@pytest.fixture
def bare(export: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies a bundle without a plan."""
    return lambda name: Path(shutil.copytree(export("clip", flavour="none"), tmp_path / name))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def build(bundle: Path, store: Path | None, **options: Any) -> Recorder:
    recorder = Recorder()
    options = {"compute_capabilities": ()} | options
    add_plan(Bundle.open(bundle), "tensorrt-rtx", progress=recorder, store=store, **options)
    return recorder


def plans(store: Path) -> list[Path]:
    return sorted(path for path in store.iterdir() if path.is_dir())


def test_same_graph_is_built_once_whatever_the_bundle_is_called(bare: Callable[[str], Path], store: Path) -> None:
    first, second = bare("a"), bare("b")
    assert build(first, store).steps == ["Build the tensorrt-rtx plan"]
    recorder = build(second, store)
    assert recorder.steps == []
    assert any("was built here on" in said for said in recorder.said)
    one, other = (Bundle.open(path) for path in (first, second))
    assert one.manifest.plans == other.manifest.plans
    (plan,) = one.manifest.plans
    assert one.read(plan.file) == other.read(plan.file)
    assert len(plans(store)) == 1


@pytest.mark.parametrize("difference", ["capabilities", "settings", "graph", "weights", "profiles", "version"])
def test_what_differs_is_built_anew(
    bare: Callable[[str], Path],
    export: Callable[..., Path],
    store: Path,
    difference: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build(bare("a"), store)
    other = bare("b")
    options: dict[str, Any] = {}
    if difference == "capabilities":
        options = {"compute_capabilities": ("8.9",)}
    elif difference == "settings":
        options = {"settings": BuildSettings(optimization_level=1)}
    elif difference == "graph":
        other = Path(shutil.copytree(export("dinov2", flavour="none"), other.with_name("c")))
    elif difference == "weights":
        with (other / GRAPH_DATA).open("r+b") as stream:
            stream.write(b"\0\0")  # one number
        make_hashes_fit(other, GRAPH_DATA)
    elif difference == "profiles":
        profiles = (BatchProfile(min=1, opt=1, max=1), *Bundle.open(other).manifest.profiles)
        write_manifest(other, replace(Bundle.open(other).manifest, profiles=profiles))
    else:
        monkeypatch.setattr(load_flavour("tensorrt-rtx"), "__version__", "1.7.2")
    assert build(other, store, **options).steps
    assert len(plans(store)) == 2


def test_log_of_the_build_is_kept_with_the_plan(bare: Callable[[str], Path], store: Path) -> None:
    for name in ("a", "b"):
        bundle = bare(name)
        build(bundle, store)
        opened = Bundle.open(bundle)
        (plan,) = opened.manifest.plans
        log = opened.read(plan.log).decode()
        assert plan.log.endswith(".any.log")
        assert "Profile 0" in log
        assert "Finished engine building" in log
        assert "STRONGLY_TYPED" in log
        assert "TF32" not in re.sub("Tactic.*", "", log)  # TF32 would cut FP32 values to FP16's ten bits


@pytest.mark.parametrize("damage", ["plan", "entry.json", "log"])
def test_damaged_plan_in_the_store_is_deleted_with_a_message(
    bare: Callable[[str], Path], store: Path, damage: str
) -> None:
    build(bare("a"), store)
    (place,) = plans(store)
    victim = place / damage
    victim.write_bytes(victim.read_bytes()[:-9] + b"!")
    recorder = build(bare("b"), store)
    assert recorder.steps == ["Build the tensorrt-rtx plan"]
    assert any("is incomplete or altered: it is deleted" in said for said in recorder.said)
    assert (place / damage).stat().st_size > 0


@pytest.mark.parametrize("written", ["null", "[]", "{}", '{"plan": 1}', "\xff"])
def test_invalid_entry_is_deleted(bare: Callable[[str], Path], store: Path, written: str) -> None:
    build(bare("a"), store)
    (place,) = plans(store)
    (place / "entry.json").write_text(written, encoding="latin-1")
    assert build(bare("b"), store).steps == ["Build the tensorrt-rtx plan"]
    shutil.rmtree(place)
    place.write_text("a file in its place")
    assert build(bare("c"), store).steps == ["Build the tensorrt-rtx plan"]
    assert build(bare("d"), store).steps == []


def test_bundles_share_no_file_with_each_other_or_with_the_store(bare: Callable[[str], Path], store: Path) -> None:
    for name in ("a", "b"):
        build(bare(name), store)
    (place,) = plans(store)
    files = [*place.iterdir(), *(place.parent.parent / "a" / "plans").iterdir()]
    assert {path.stat().st_nlink for path in files} == {1}
    assert len(files) == 5


@pytest.mark.parametrize("kept", [True, False])
def test_plan_of_a_graph_that_is_replaced_meanwhile_gets_into_no_store_and_no_bundle(
    bare: Callable[[str], Path],
    export: Callable[..., Path],
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    kept: bool,
) -> None:
    bundle = bare("a")

    def build_another(*args: Any, **options: Any) -> Any:
        replace_bundle(bundle, export("clip", precision="bf16", flavour="none"))
        return build_plan(*args, **options)

    monkeypatch.setattr(
        module,
        "build_plan",
        lambda *args, **options: build_another(*args, **options | {"dtype": "bfloat16"}),
    )
    with pytest.raises(BundleError, match=r"tower\.onnx was replaced while it was being loaded"):
        build(bundle, store if kept else None)
    assert not kept or not plans(store)
    assert not Bundle.open(bundle).manifest.plans
    assert not list(bundle.glob(".staging-*"))


def test_plan_is_not_added_to_a_bundle_that_was_exported_again_meanwhile(
    bare: Callable[[str], Path], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, other = bare("a"), bare("other")
    with (other / GRAPH_DATA).open("r+b") as stream:
        stream.write(b"\0\0")  # the same graph, and one other number
    make_hashes_fit(other, GRAPH_DATA)
    obtain = module.obtain_plan

    def obtain_late(*args: Any) -> Any:
        found = obtain(*args)
        replace_bundle(bundle, other)
        return found

    monkeypatch.setattr(module, "obtain_plan", obtain_late)
    with pytest.raises(BundleError, match="was exported or built again, so this plan is out of date"):
        build(bundle, store)
    assert Bundle.open(bundle).manifest == Bundle.open(other).manifest


def test_altered_graph_is_refused_though_its_plan_is_in_the_store(bare: Callable[[str], Path], store: Path) -> None:
    build(bare("a"), store)
    other = bare("b")
    with (other / GRAPH_DATA).open("r+b") as stream:
        stream.write(b"\1\1")
    with pytest.raises(BundleError, match="altered"):
        build(other, store)


def replace_bundle(bundle: Path, other: Path) -> None:
    """Replace a bundle's files by those of another bundle, as rsync does."""
    for path in sorted(other.rglob("*")):
        target = bundle / path.relative_to(other)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        else:
            Path(shutil.copyfile(path, target.with_suffix(".new"))).replace(target)


def test_plans_folder_that_leads_out_of_the_bundle_is_refused(bare: Callable[[str], Path], store: Path) -> None:
    bundle = bare("a")
    outside = bundle.parent / "outside"
    outside.mkdir()
    (bundle / "plans").symlink_to(outside)
    with pytest.raises(BundleError, match="plans leads out of the bundle; no plan was added"):
        build(bundle, store)
    assert not any(outside.iterdir())
    assert Bundle.open(bundle).manifest.plans == ()


def test_bundle_that_cannot_be_written_is_refused_before_anything_is_built(
    bare: Callable[[str], Path], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bare("a")
    for sealed in (bundle, bundle.parent):
        monkeypatch.setattr("os.access", lambda path, _, sealed=sealed: path != sealed)
        with pytest.raises(BuildError, match=r"is read-only, and adding a plan to .* writes there"):
            build(bundle, store)
    assert not store.exists()
    link = bundle.parent.parent / f"{bundle.parent.name}-link"
    link.symlink_to(bundle)
    monkeypatch.setattr("os.access", lambda path, _: path != link.parent)
    assert build(link, store).steps


def test_plan_that_a_bundle_loses_stays_in_the_store(bare: Callable[[str], Path], store: Path) -> None:
    bundle = bare("a")
    build(bundle, store)
    shutil.rmtree(bundle)
    assert build(bare("b"), store).steps == []


def test_processes_that_want_the_same_plan_build_it_once(
    bare: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # its own store: the session's may hold this plan already
    folders = [bare("a"), bare("b"), bare("c")]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD, str(folder), "--compute-capability", "8.6"],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for folder in folders
    ]
    said = [process.communicate(timeout=PATIENCE_S)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    assert sum("Build the tensorrt-rtx plan" in each for each in said) == 1
    assert sum("was built here on" in each for each in said) == 2
    assert not any("[I]" in each for each in said)  # such lines go only to the log of the build


def test_verbose_shows_the_log_of_a_build(bare: Callable[[str], Path]) -> None:
    command = [sys.executable, "-c", BUILD.replace("'build'", "'--verbose', 'build'"), str(bare("a")), "--no-store"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "Finished engine building" in done.stderr


def test_two_processes_add_to_one_bundle(bare: Callable[[str], Path], store: Path) -> None:
    del store
    bundle = bare("a")
    running = [
        subprocess.Popen([sys.executable, "-c", BUILD, str(bundle), "--compute-capability", capability])
        for capability in ("8.9", "12.0")
    ]
    assert [process.wait(PATIENCE_S) for process in running] == [0, 0]
    capabilities = {plan.compute_capabilities for plan in Bundle.open(bundle).manifest.plans}
    assert capabilities == {("8.9",), ("12.0",)}
    assert not Bundle.open(bundle).altered()


def test_lock_of_a_process_that_died_blocks_nobody(bare: Callable[[str], Path], store: Path) -> None:
    build(bare("a"), store)
    (lock,) = store.glob("*.lock")
    shutil.rmtree(lock.with_suffix(""))
    staging = lock.with_suffix(".staging")
    staging.mkdir()
    (staging / "half").write_text("of a build that was killed")
    hold = f"from filelock import FileLock; FileLock({str(lock)!r}).acquire(); print('held', flush=True); input()"
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE_S)
    assert lock.exists()
    assert build(bare("b"), store).steps == ["Build the tensorrt-rtx plan"]
    assert not staging.exists()


def test_waiting_for_another_process_is_reported(bare: Callable[[str], Path], store: Path) -> None:
    build(bare("a"), store)
    (path,) = store.glob("*.lock")
    recorder = Recorder()
    lock = FileLock(path, thread_local=False)
    lock.acquire()

    def say(message: str) -> None:
        recorder.said.append(message)
        if "waiting for it" in message:
            lock.release()

    recorder.say = say  # type: ignore[method-assign]
    start = time.monotonic()
    add_plan(Bundle.open(bare("b")), "tensorrt-rtx", (), recorder, store=store)
    assert any("another process is building this plan" in said for said in recorder.said)
    assert time.monotonic() - start < PATIENCE_S


def test_error_on_unwritable_store_suggests_building_without_one(bare: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BuildError, match=r"cannot be written: .* Build with --no-store"):
        build(bare("a"), tmp_path / "file" / "store")
    assert build(bare("b"), None).steps


def test_disk_that_fills_during_a_build_leaves_bundle_and_store_as_they_were(
    bare: Callable[[str], Path], small_disk: Path
) -> None:
    bundle = bare("a")
    before = (bundle / MANIFEST).read_bytes()
    with pytest.raises(BuildError, match="the disk filled up while"):
        build(bundle, small_disk / "store")
    assert (bundle / MANIFEST).read_bytes() == before
    assert not plans(small_disk / "store")
    on_small_disk = Path(shutil.copytree(bundle, small_disk / "b"))
    with pytest.raises(BuildError, match="the disk filled up while"):
        build(on_small_disk, bundle.parent / "store")
    assert (on_small_disk / MANIFEST).read_bytes() == before
    assert not Bundle.open(on_small_disk).altered()
    assert {path.name for path in on_small_disk.iterdir()} <= {*(p.name for p in bundle.iterdir()), "plans"}


def test_export_uses_a_plan_from_the_store(checkpoints: dict[str, Path], tmp_path: Path, store: Path) -> None:
    options = ExportOptions(check=False, store=store)
    recorders = [Recorder(), Recorder()]
    for name, recorder in zip(("a", "b"), recorders, strict=True):
        export_tower(str(checkpoints["clip"]), tmp_path / name, options, recorder)
    assert ["Build the tensorrt-rtx plan" in recorder.steps for recorder in recorders] == [True, False]
    manifests = [Bundle.open(tmp_path / name).manifest for name in ("a", "b")]
    files = [{name: entry for name, entry in each.files.items() if name != BUILD_NOTES} for each in manifests]
    assert files[0] == files[1]  # BUILD.md has the bundle's name in its commands
    assert manifests[0].plans[0].log in manifests[0].files


def test_plan_with_other_settings_replaces_the_first(bare: Callable[[str], Path], store: Path) -> None:
    bundle = bare("a")
    build(bundle, store)
    build(bundle, store, settings=BuildSettings(workspace_mib=512, optimization_level=2))
    opened = Bundle.open(bundle)
    (plan,) = opened.manifest.plans
    assert plan.settings == BuildSettings(workspace_mib=512, optimization_level=2)
    assert {path.name for path in (bundle / "plans").iterdir()} == {Path(plan.file).name, Path(plan.log).name}
    assert not opened.altered()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workspace_mib": 0}, "--workspace-mib is 0; expected 1 to 16777216"),
        ({"workspace_mib": 10**14}, "expected 1 to 16777216"),
        ({"optimization_level": 6}, "--optimization-level is 6; expected 0 to 5"),
    ],
)
def test_invalid_setting_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildSettings(**settings)


def test_hardware_compatible_is_for_the_flavour_that_has_it() -> None:
    with pytest.raises(ConfigError, match="--hardware-compatible needs flavour tensorrt"):
        choose_plan("tensorrt-rtx", (), "fp16", BuildSettings(hardware_compatible=True))


def test_version_compatible_is_for_the_flavour_that_has_a_lean_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--version-compatible needs flavour tensorrt: TensorRT-RTX has no lean"):
        choose_plan("tensorrt-rtx", (), "fp16", BuildSettings(version_compatible=True))
    monkeypatch.setattr(choice, "load_flavour", lambda _: SimpleNamespace(__version__="11.4.0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(choice, "capability_of", lambda *_: "9.0")
    with pytest.raises(ConfigError, match="--version-compatible and --strip exclude each other"):
        choose_plan("tensorrt", (), "fp16", BuildSettings(version_compatible=True, stripped=True))


def test_plan_without_weights_is_refused_at_once_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="--strip needs a GPU to build a plan without its weights"):
        choose_plan("tensorrt-rtx", (), "fp16", BuildSettings(stripped=True))


def test_settings_reach_tensorrt() -> None:
    tensorrt = pytest.importorskip("tensorrt_rtx")
    settings = BuildSettings(workspace_mib=3, optimization_level=0, hardware_compatible=True, stripped=True)
    assert _settings(settings, tensorrt) == {
        "memory_pool_limits": {tensorrt.MemoryPoolType.WORKSPACE: 3 << 20},
        "builder_optimization_level": 0,
        "hardware_compatibility_level": tensorrt.HardwareCompatibilityLevel.AMPERE_PLUS,
        "version_compatible": False,
        "exclude_lean_runtime": False,
        "strip_plan": True,
        "refittable": True,
    }
    compatible = _settings(BuildSettings(version_compatible=True), tensorrt)
    assert compatible["version_compatible"]
    assert compatible["exclude_lean_runtime"]
    assert not any(_settings(BuildSettings(), tensorrt).values())  # TensorRT's defaults


def test_hardware_compatible_plan_is_bound_to_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "load_flavour", lambda _: SimpleNamespace(__version__="11.4.0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    found = [
        choose_plan("tensorrt", (), "fp16", BuildSettings(hardware_compatible=compatible))[0]
        for compatible in (True, False)
    ]
    assert [target.compute_capabilities for target in found if target] == [(), ("8.9",)]
    with pytest.raises(ConfigError, match="--hardware-compatible needs flavour tensorrt and no --compute-capability"):
        choose_plan("tensorrt", ("8.9",), "fp16", BuildSettings(hardware_compatible=True))


def test_replacing_a_plan_is_reported(
    bare: Callable[[str], Path], store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = bare("a")
    build(bundle, store, settings=BuildSettings(optimization_level=1))
    said = build(bundle, store).said
    assert said[-1] == "the new plan replaces the one that was built at optimization level 1"
    assert not any("replaces" in each for each in build(bundle, store).said)
    assert run(["inspect", str(bundle)]) == 0
    assert "built with TensorRT's own settings" in capsys.readouterr().out


def test_failed_build_is_one_line_on_the_terminal(bare: Callable[[str], Path]) -> None:
    bundle = bare("a")
    graph = (bundle / GRAPH).read_bytes()
    (bundle / GRAPH).write_bytes(graph.replace(b"LayerNormalization", b"LayerNormalizatioN"))
    make_hashes_fit(bundle, GRAPH)
    done = subprocess.run([sys.executable, "-c", BUILD, str(bundle), "--no-store"], capture_output=True, text=True)
    assert done.returncode == 1
    assert [line for line in done.stderr.splitlines() if "LayerNormalizatioN" in line] == [done.stderr.splitlines()[-1]]
    assert done.stderr.splitlines()[-1].startswith("error: tensorrt-rtx")


def test_error_on_a_lock_that_cannot_be_taken_suggests_building_without_a_store(
    bare: Callable[[str], Path], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("filelock.BaseFileLock.acquire", refuse)
    with pytest.raises(BuildError, match=r"cannot be written: Permission denied. Build with --no-store"):
        build(bare("a"), store)
