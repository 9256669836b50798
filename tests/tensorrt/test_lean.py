"""What TensorRT's real lean runtime does without a driver: each case is one error of ours, and no process dies.

Each runs in its own process, because the lean runtime ends it on a mistake. There torch claims to have a GPU.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from tests.tensorrt.modules import MODULES
from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import BuildSettings, PlanEntry
from trtower.flavour import PLATFORM

pytestmark = pytest.mark.skipif("tensorrt_lean" not in MODULES, reason="the lean runtime is in other environments")

COMPATIBLE, ORDINARY = BuildSettings(version_compatible=True), BuildSettings()
HERE = MODULES["tensorrt_lean"].__version__ if "tensorrt_lean" in MODULES else ""
PLAN = "plans/made-up.plan"

PRELUDE = """
import sys
from contextlib import nullcontext
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.current_device = lambda: 0
torch.cuda.get_device_capability = lambda *_: (8, 9)
torch.cuda.device = lambda _: nullcontext()
sys.modules["tensorrt_rtx"] = None  # not installed, whatever else this environment sees
from trtower import Bundle, EngineOptions, VisionTower
from trtower.cli import run
from trtower.errors import BackendError
from trtower.runners.choose import choose
from trtower.runners.runtimes import plan_verdicts
from trtower.runners.tensorrt import TensorRTRunner
device, bundle = torch.device("cuda", 0), Bundle.open(sys.argv[1])
plan = bundle.manifest.plans[0]
"""

WAYS = {
    "runner": "TensorRTRunner(bundle, plan, device, EngineOptions())",
    "choose": "choose(bundle, plan.flavour)",
    "load": "VisionTower.load(bundle.path, backend=plan.flavour)",
}
"""The ways to the runner, from the inside out."""


@pytest.fixture
def with_plan(bundles: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes a bundle with a plan that no TensorRT built."""

    def make(settings: BuildSettings, version: str = HERE, flavour: str = "tensorrt") -> Path:
        path = Path(shutil.copytree(bundles(precision="fp16"), tmp_path / "bundle"))
        (tmp_path / "plan").write_bytes(b"no plan, but nothing gets to read it")
        entry = PlanEntry(
            file=PLAN,
            flavour=flavour,
            version=version,
            platform=PLATFORM,
            compute_capabilities=("8.9",),
            settings=settings,
        )
        return Bundle.open(path).add_plan(entry, tmp_path / "plan").path

    return make


def execute(code: str, bundle: Path, *, full: bool = False) -> str:
    """Run code in its own process, with the lean runtime only or with the ``full`` TensorRT too; return its output."""
    hide = "" if full else 'import sys; sys.modules["tensorrt"] = None\n'
    script = f"{hide}{PRELUDE}{code}"
    done = subprocess.run([sys.executable, "-c", script, bundle], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}: {done.stderr[-2000:]}"
    return done.stdout


def errors_of(calls: Iterable[str], bundle: Path, *, full: bool = False) -> list[str]:
    """Return the BackendError that each call ends with, which has to be one line."""
    attempts = [f"try:\n    {call}\nexcept BackendError as err:\n    print(err)\n" for call in calls]
    said = execute("".join(attempts), bundle, full=full).splitlines()
    assert len(said) == len(attempts), said
    return said


@pytest.mark.parametrize("way", WAYS)
def test_driver_that_is_too_old_is_named(with_plan: Callable[..., Path], way: str) -> None:
    (said,) = errors_of([WAYS[way]], with_plan(COMPATIBLE))
    assert f"tensorrt-lean {HERE} could not start on cuda:0; its driver may be too old: " in said
    assert "error: 35" in said


def test_full_tensorrt_that_does_not_start_names_the_driver(with_plan: Callable[..., Path]) -> None:
    """Over the stub libraries, which return NULL instead of a runtime."""
    (said,) = errors_of([WAYS["runner"]], with_plan(COMPATIBLE), full=True)
    assert said.startswith(f"tensorrt {HERE} could not start on cuda:0; its driver may be too old: ")


@pytest.mark.parametrize(
    ("settings", "version", "flavour", "says"),
    [
        (
            COMPATIBLE,
            "10.15.1.29",
            "tensorrt",
            f"but this machine has tensorrt-lean {HERE}: pip install tensorrt-lean==10",
        ),
        (ORDINARY, HERE, "tensorrt", "tensorrt-lean runs only plans that were built with --version-compatible"),
        (ORDINARY, "1.7.1.116", "tensorrt-rtx", "needs the package tensorrt_rtx, which is not installed"),
    ],
    ids=["another version", "not version-compatible", "the other flavour"],
)
def test_plan_that_it_cannot_run_says_why(
    with_plan: Callable[..., Path], settings: BuildSettings, version: str, flavour: str, says: str
) -> None:
    bundle = with_plan(settings, version, flavour)
    listed = (
        "print(*plan_verdicts(plan, device).values(), sep='; ')\nassert run(['inspect', sys.argv[1], '--why']) == 0"
    )
    verdicts, _, inspected = execute(listed, bundle).partition("\n")
    assert says in verdicts
    assert says in " ".join(inspected.split())
    runner, *others = errors_of(WAYS.values(), bundle)
    assert f"was built by {flavour} {version}, but " in runner  # which nobody opens in spite of an obstacle
    assert all(says in said for said in others)


def test_plan_that_it_can_run_has_no_obstacle(with_plan: Callable[..., Path]) -> None:
    assert execute("print(set(plan_verdicts(plan, device).values()))", with_plan(COMPATIBLE)) == "{None}\n"
