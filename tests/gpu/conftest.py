"""What the GPU tests share: one GPU, what runs a bundle there, and bundles that were built for it.

Every plan is built by the command in a process of its own, because Polygraphy's choice of TensorRT holds for the
whole process.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trtower.errors import MissingExtraError
from trtower.flavour import FLAVOURS, capability_obstacle, load_flavour
from trtower.tower.vision_tower import VisionTower
from trtower_export.check.photographs import Photographs, load_photographs

BATCH = ("--batch", "1,1,1", "--batch", "1,2,4")
"""Two profiles."""

PICTURES = 4
PICTURE_SIDE = 96

PROBE = """
import json, sys, torch
from trtower import Bundle, EngineOptions
from trtower.errors import BackendError
from trtower.runners.tensorrt import TensorRTRunner
bundle = Bundle.open(sys.argv[1])
given, made = (torch.rand(1, *each.shape[1:]) for each in (bundle.manifest.input, bundle.manifest.output))
images, features = (each.to("cuda", torch.float16) for each in (given, made))
try:
    runner = TensorRTRunner(bundle, bundle.manifest.plans[0], images.device, EngineOptions())
    runner.run(images, features)
    print(json.dumps({"outcome": "runs", "detail": f"finite: {bool(features.isfinite().all())}"}))
except BackendError as err:
    print(json.dumps({"outcome": "refused", "detail": str(err)}))
"""
"""Asks TensorRT-RTX itself: trtower would not hand it a plan that it knows to be of another GPU."""


@dataclass(frozen=True, kw_only=True)
class RtxOutcome:
    """What TensorRT-RTX did with a tiny tower on this GPU: "runs", "refused", or "died", and its own words.

    ``obstacle`` is what trtower says against it beforehand, None where it takes it to run.
    """

    gpu: str
    compute_capability: str
    version: str
    obstacle: str | None
    outcome: str
    detail: str


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    """Give the GPU, or skip with the reason why there is none."""
    if torch.version.cuda is None:
        pytest.skip(f"no GPU here: torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        pytest.skip(f"no GPU here: torch {torch.__version__} finds no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def capability(gpu: torch.device) -> str:
    return "{}.{}".format(*torch.cuda.get_device_capability(gpu))


@pytest.fixture(scope="session")
def built(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """Give bundles by family, precision and backend; each is exported once, unchecked, and must not be changed."""
    made: dict[tuple[str, str, str], Path] = {}

    def get(family: str, precision: str, backend: str) -> Path:
        flavour = backend if backend in FLAVOURS else "none"
        key = (family, precision, flavour)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("gpu") / f"tiny-{family}"
            options = ["--out", str(made[key]), "--precision", precision, "--flavour", flavour, *BATCH]
            arguments = ["export", str(checkpoints[family]), *options, "--no-check", "--debug"]
            command = [sys.executable, "-c", "from trtower.cli import main; main()", *arguments]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
        return made[key]

    return get


def skip_without(flavour: str) -> str:
    """Give the version of a flavour, or skip because it is not installed."""
    try:
        version: str = load_flavour(flavour).__version__
    except MissingExtraError as err:
        pytest.skip(str(err))
    return version


@pytest.fixture(scope="session")
def rtx_outcome(gpu: torch.device, capability: str, built: Callable[[str, str, str], Path]) -> RtxOutcome:
    """Try TensorRT-RTX once, in a process of its own, which an unsupported GPU may bring down."""
    version = skip_without("tensorrt-rtx")
    bundle = built("clip", "fp16", "tensorrt-rtx")
    done = subprocess.run([sys.executable, "-c", PROBE, str(bundle)], check=False, capture_output=True, text=True)
    said = {"outcome": "died", "detail": f"exit status {done.returncode}: {done.stderr[-2000:]}"}
    if done.returncode == 0:
        said = json.loads(done.stdout.splitlines()[-1])
    return RtxOutcome(
        gpu=torch.cuda.get_device_name(gpu),
        compute_capability=capability,
        version=version,
        obstacle=capability_obstacle("tensorrt-rtx", load_flavour("tensorrt-rtx"), (), capability),
        **said,
    )


@pytest.fixture(scope="session", params=(*FLAVOURS, "onnxruntime-cuda"))
def backend(request: pytest.FixtureRequest) -> str:
    """Give each backend that is installed and can run here."""
    name: str = request.param
    if name == "onnxruntime-cuda":
        onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime-gpu is not installed")
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip(f"onnxruntime {onnxruntime.__version__} has no CUDAExecutionProvider: onnxruntime-gpu has")
        return name
    skip_without(name)
    if name == "tensorrt-rtx":
        outcome: RtxOutcome = request.getfixturevalue("rtx_outcome")
        if outcome.outcome != "runs" and outcome.obstacle:
            pytest.skip(f"a plan of tensorrt-rtx {outcome.version} {outcome.obstacle}")
    return name


@pytest.fixture(scope="session")
def clip_tower(backend: str, built: Callable[[str, str, str], Path]) -> VisionTower:
    """FP16 CLIP on each backend, past its first calls: they load kernels and allocate."""
    tower = VisionTower.load(built("clip", "fp16", backend), backend=backend)
    side = tower.image_size
    for batch in range(1, tower.bundle.manifest.batch.max + 1):
        tower(torch.zeros(batch, 3, side, side, device=tower.device, dtype=tower.dtype))
    torch.cuda.synchronize()
    return tower


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Photographs:
    """Draw pictures with edges and shades, so that no package of photographs is needed."""
    folder = tmp_path_factory.mktemp("pictures")
    row, column = np.mgrid[:PICTURE_SIDE, :PICTURE_SIDE] / PICTURE_SIDE
    for index in range(PICTURES):
        noise = np.random.default_rng(index).random((PICTURE_SIDE, PICTURE_SIDE))
        disc = (row - 0.5) ** 2 + (column - 0.2 * index) ** 2 < 0.1
        channels = np.stack([(row + noise) / 2, column, disc * 1.0], axis=-1)
        Image.fromarray((255 * channels).astype(np.uint8)).save(folder / f"{index}.png")
    return load_photographs(folder)
