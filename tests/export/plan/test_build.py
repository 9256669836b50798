"""Build plans with the real TensorRT-RTX, which needs no GPU for that."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import GRAPH
from trtower.errors import BackendError, BuildError
from trtower.spec import MIB, BatchProfile
from trtower_export.console import LoggedProgress, Step
from trtower_export.plan import polygraphy
from trtower_export.plan.build import add_plan
from trtower_export.plan.choice import PlanChoice
from trtower_export.plan.polygraphy import PLAN, build_plan


class Recorder(Step):
    def __init__(self) -> None:
        self.updates: list[tuple[float, str]] = []

    def update(self, fraction: float, note: str) -> None:
        self.updates.append((fraction, note))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_plan_holds_the_weights_in_the_requested_precision(export: Callable[..., Path], precision: str) -> None:
    bundle = export("clip", precision=precision)
    plan = next((bundle / "plans").glob("*.plan")).read_bytes()
    weights = [
        numpy_helper.to_array(t).tobytes() for t in onnx.load(bundle / GRAPH).graph.initializer if len(t.dims) == 2
    ]
    # TensorRT concatenates q, k and v and keeps the attention output, fc1 and fc2 as they are.
    assert sum(weight in plan for weight in weights if len(weight) > 4096) >= 3 * 3


def test_plan_in_another_precision_is_refused() -> None:
    weights = 100 * MIB
    polygraphy._check_size(weights + 6 * MIB, weights, "float16")
    for wrong in (weights // 2, weights * 2):
        with pytest.raises(BuildError, match="did not keep the precision"):
            polygraphy._check_size(wrong, weights, "float16")


def test_network_in_another_precision_is_refused(fp32_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(fp32_bundle)
    spec, profiles = bundle.manifest.spec, bundle.manifest.profiles
    with pytest.raises(BuildError, match="weights in float16"):
        build_plan(
            fp32_bundle / GRAPH, PlanChoice(flavour="tensorrt-rtx"), spec.input("fp16"), profiles, tmp_path, Recorder()
        )


def test_build_reports_its_progress_to_the_end(spoilt: Path, tmp_path: Path) -> None:
    manifest, recorder = Bundle.open(spoilt).manifest, Recorder()
    build_plan(
        spoilt / GRAPH, PlanChoice(flavour="tensorrt-rtx"), manifest.input, manifest.profiles, tmp_path, recorder
    )
    fractions = [fraction for fraction, _ in recorder.updates]
    assert len(fractions) > 50
    assert all(0 <= fraction <= 1 for fraction in fractions)
    assert fractions == sorted(fractions)
    assert fractions[-1] > 0.8


def test_two_builds_give_the_same_bytes(spoilt: Path, tmp_path: Path) -> None:
    manifest = Bundle.open(spoilt).manifest
    build_plan(
        spoilt / GRAPH, PlanChoice(flavour="tensorrt-rtx"), manifest.input, manifest.profiles, tmp_path, Recorder()
    )
    assert (tmp_path / PLAN).read_bytes() == (spoilt / manifest.plans[0].file).read_bytes()


def test_interrupt_ends_a_build(spoilt: Path, tmp_path: Path) -> None:
    """Run in its own process: pytest-xdist may run tests outside the main thread, where no interrupt arrives."""
    out = tmp_path / "out"
    out.mkdir()
    script = f"""
import os, signal
from pathlib import Path
from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import GRAPH
from trtower_export.plan.polygraphy import build_plan
from trtower_export.plan.choice import PlanChoice
class Impatient:
    def update(self, fraction, note):
        os.kill(os.getpid(), signal.SIGINT)
bundle = Bundle.open({str(spoilt)!r})
tensor, profiles = bundle.manifest.input, bundle.manifest.profiles
try:
    target, out = PlanChoice(flavour="tensorrt-rtx"), Path({str(out)!r})
    build_plan(bundle.path / GRAPH, target, tensor, profiles, out, Impatient())
except KeyboardInterrupt:
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.stdout == "interrupted\n", done.stderr
    assert not (out / PLAN).exists()


def test_refusal_quotes_tensorrt(spoilt: Path, tmp_path: Path) -> None:
    model = onnx.load(spoilt / GRAPH)
    model.graph.node[0].op_type = "NoSuchOperation"
    onnx.save(model, tmp_path / GRAPH, save_as_external_data=True, location="tower.onnx.data", size_threshold=0)
    manifest = Bundle.open(spoilt).manifest
    with pytest.raises(BuildError, match=r"could not build tower\.onnx: .*NoSuchOperation"):
        build_plan(
            tmp_path / GRAPH,
            PlanChoice(flavour="tensorrt-rtx"),
            manifest.input,
            manifest.profiles,
            tmp_path,
            Recorder(),
        )


@pytest.mark.parametrize(
    ("reason", "error", "says"),
    [
        ("pybind11::init(): factory function returned nullptr", BackendError, "driver may be too old: pybind11"),
        ("a bug, which shows its traceback", TypeError, "^a bug"),
    ],
)
def test_builder_that_does_not_start_names_the_driver(
    spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str, error: type[Exception], says: str
) -> None:
    """tests/tensorrt sees the first reason from data-centre TensorRT itself."""

    def fail(_: object) -> None:
        raise TypeError(reason)

    monkeypatch.setattr(pytest.importorskip("tensorrt_rtx"), "Builder", fail)
    manifest, choice = Bundle.open(spoilt).manifest, PlanChoice(flavour="tensorrt-rtx")
    with pytest.raises(error, match=says):
        build_plan(spoilt / GRAPH, choice, manifest.input, manifest.profiles, tmp_path, Recorder())


def test_build_adds_a_plan_that_the_bundle_verifies(export: Callable[..., Path], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(export("clip", flavour="none"), tmp_path / "b"))
    assert not Bundle.open(bundle).manifest.plans
    first = add_plan(Bundle.open(bundle), "tensorrt-rtx", ("8.9", "12.0"), LoggedProgress())
    assert first.name.endswith(".sm89+sm120.plan")
    add_plan(Bundle.open(bundle), "auto", (), LoggedProgress())
    plans = Bundle.open(bundle).manifest.plans
    assert [plan.compute_capabilities for plan in plans] == [("8.9", "12.0"), ()]
    for plan in plans:
        assert Bundle.open(bundle).read(plan.file)
    assert not list(bundle.glob(".staging-*"))


def test_build_needs_neither_transformers_nor_onnx(export: Callable[..., Path], tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(export("clip", flavour="none"), tmp_path / "b"))
    script = f"""
import sys
for name in ("transformers", "onnx", "onnxscript", "onnxruntime", "safetensors"):
    sys.modules[name] = None
from trtower.cli import run
sys.exit(run(["build", {str(bundle)!r}]))
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert Bundle.open(bundle).manifest.plans


def test_data_centre_path_builds_with_rtx_under_its_name(
    export: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data-centre TensorRT is not available in tests: its code path runs on a renamed TensorRT-RTX and a fake GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bundle = Path(shutil.copytree(export("clip", flavour="none"), tmp_path / "b"))
    script = f"""
import sys, tensorrt_rtx, torch
tensorrt_rtx.__version__ = "11.4.0"
sys.modules["tensorrt"] = tensorrt_rtx  # a fake: this never runs data-centre TensorRT
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (8, 9)
torch.cuda.get_device_name = lambda *_: "Fake GPU"
from trtower.cli import run
sys.exit(run(["build", {str(bundle)!r}, "--flavour", "tensorrt", "--compute-capability", "8.9"]))
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (plan,) = Bundle.open(bundle).manifest.plans
    assert (plan.flavour, plan.compute_capabilities) == ("tensorrt", ("8.9",))
    assert plan.file.endswith(".sm89.plan")
    store = Path(os.environ["XDG_CACHE_HOME"]) / "trtower" / "plans"
    (timed,) = (path for path in store.iterdir() if path.suffix == ".timing")
    assert timed.name == "tensorrt-11.4.0.Fake-GPU.timing"
    assert timed.stat().st_size


def test_plan_of_several_profiles_is_built(export: Callable[..., Path]) -> None:
    """Only a GPU can show that both profiles are in it: see tests/gpu."""
    profiles = (BatchProfile(min=1, opt=1, max=1), BatchProfile(min=1, opt=4, max=8))
    manifest = Bundle.open(export("clip", profiles=profiles)).manifest
    assert manifest.profiles == profiles
    assert manifest.batch == BatchProfile(min=1, opt=4, max=8)
    (plan,) = manifest.plans
    single = Bundle.open(export("clip")).manifest
    assert manifest.files[plan.file].sha256 != single.files[single.plans[0].file].sha256
