"""What the GPU tests share: one GPU, the backends that run there, and bundles built for it.

Each plan is built by the command in a separate process, because Polygraphy chooses its TensorRT once per process.
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
shapes = (each.shape[1:] for each in (bundle.manifest.input, bundle.manifest.output))
images, features = (torch.rand(1, *shape).to("cuda", torch.float16) for shape in shapes)
try:
    runner = TensorRTRunner(bundle, bundle.manifest.plans[0], images.device, EngineOptions())
    runner.run(images, features)
    print(json.dumps({"outcome": "runs", "detail": f"finite: {bool(features.isfinite().all())}"}))
except BackendError as err:
    print(json.dumps({"outcome": "refused", "detail": str(err)}))
"""
"""A program that tries TensorRT-RTX directly, because trtower refuses plans that it knows are for another GPU."""


@dataclass(frozen=True, kw_only=True)
class RtxOutcome:
    """What TensorRT-RTX did with a tiny tower on this GPU: an ``outcome`` "runs", "refused" or "died", with details.

    ``obstacle`` is what trtower predicts: why the plan cannot run, or None if it expects it to run.
    """

    gpu: str
    compute_capability: str
    version: str
    obstacle: str | None
    outcome: str
    detail: str


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    """Return the GPU, or skip with the reason why there is none."""
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
    """Return a function that exports a bundle by family, precision and backend.

    Each bundle is exported only once and not checked. Tests must not change it.
    """
    exported: dict[tuple[str, str, str], Path] = {}

    def get(family: str, precision: str, backend: str) -> Path:
        flavour = backend if backend in FLAVOURS else "none"
        key = (family, precision, flavour)
        if key not in exported:
            exported[key] = tmp_path_factory.mktemp("gpu") / f"tiny-{family}"
            options = ["--out", str(exported[key]), "--precision", precision, "--flavour", flavour, *BATCH]
            arguments = ["export", str(checkpoints[family]), *options, "--no-check", "--debug"]
            command = [sys.executable, "-c", "from trtower.cli import main; main()", *arguments]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
        return exported[key]

    return get


def skip_without(flavour: str) -> str:
    """Return the version of a flavour, or skip if it is not installed."""
    try:
        version: str = load_flavour(flavour).__version__
    except MissingExtraError as err:
        pytest.skip(str(err))
    return version


@pytest.fixture(scope="session")
def rtx_outcome(gpu: torch.device, capability: str, built: Callable[[str, str, str], Path]) -> RtxOutcome:
    """Try TensorRT-RTX once, in a separate process, because an unsupported GPU may crash it."""
    version = skip_without("tensorrt-rtx")
    bundle = built("clip", "fp16", "tensorrt-rtx")
    done = subprocess.run([sys.executable, "-c", PROBE, str(bundle)], check=False, capture_output=True, text=True)
    observed = {"outcome": "died", "detail": f"exit status {done.returncode}: {done.stderr[-2000:]}"}
    if done.returncode == 0:
        observed = json.loads(done.stdout.splitlines()[-1])
    return RtxOutcome(
        gpu=torch.cuda.get_device_name(gpu),
        compute_capability=capability,
        version=version,
        obstacle=capability_obstacle("tensorrt-rtx", load_flavour("tensorrt-rtx"), (), capability),
        **observed,
    )


@pytest.fixture(scope="session", params=(*FLAVOURS, "torch-cuda", "onnxruntime-cuda"))
def backend(request: pytest.FixtureRequest) -> str:
    """Return each backend that is installed and can run here."""
    name: str = request.param
    if name == "torch-cuda":
        pytest.importorskip("onnx", reason="onnx is not installed")
        return name
    if name == "onnxruntime-cuda":
        onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime-gpu is not installed")
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            pytest.skip(f"onnxruntime {onnxruntime.__version__} has no CUDAExecutionProvider: install onnxruntime-gpu")
        return name
    skip_without(name)
    if name == "tensorrt-rtx":
        outcome: RtxOutcome = request.getfixturevalue("rtx_outcome")
        if outcome.outcome != "runs" and outcome.obstacle:
            pytest.skip(f"a plan of tensorrt-rtx {outcome.version} {outcome.obstacle}")
    return name


@pytest.fixture(scope="session")
def clip_tower(backend: str, built: Callable[[str, str, str], Path]) -> VisionTower:
    """An FP16 CLIP tower on each backend, after its first calls, which load kernels and allocate memory."""
    tower = VisionTower.load(built("clip", "fp16", backend), backend=backend)
    side = tower.image_size
    for batch in range(1, tower.bundle.manifest.batch.max + 1):
        tower(torch.zeros(batch, 3, side, side, device=tower.device, dtype=tower.dtype))
    torch.cuda.synchronize()
    return tower


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Photographs:
    """Draw pictures with edges and shades, so that the tests need no package of photographs."""
    folder = tmp_path_factory.mktemp("pictures")
    row, column = np.mgrid[:PICTURE_SIDE, :PICTURE_SIDE] / PICTURE_SIDE
    for index in range(PICTURES):
        noise = np.random.default_rng(index).random((PICTURE_SIDE, PICTURE_SIDE))
        disc = (row - 0.5) ** 2 + (column - 0.2 * index) ** 2 < 0.1
        channels = np.stack([(row + noise) / 2, column, disc * 1.0], axis=-1)
        Image.fromarray((255 * channels).astype(np.uint8)).save(folder / f"{index}.png")
    return load_photographs(folder)
