"""A new backend takes one file and one line: this file, and the line that the fixture `toy` puts into BACKENDS."""

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

import trtower
from tests.conftest import Bundles
from tests.runtime.installation.hugging_face import inputs, make
from tests.runtime.installation.test_hugging_face import EXACT, logits
from trtower import Bundle, VisionTower
from trtower.bundle.manifest import GRAPH, GRAPH_DATA
from trtower.cli import run
from trtower.errors import BackendError, ConfigError
from trtower.runners import choose
from trtower.runners.base import Backend, EngineOptions, OnStart
from trtower_export.bench.benchmark import BenchOptions
from trtower_export.bench.entrants import Arena, competitors, enter
from trtower_export.checkpoint.checkpoint import open_checkpoint

SAME_TOWER = 1e-5
"""Relative difference of two orders of summing in FP32 (4e-7 was measured). A tower one layer off errs by over 0.3."""

pytestmark = pytest.mark.usefixtures("one_thread")


class ToyRunner:
    """Runs the graph on numpy arrays, and counts the images."""

    computed = 0

    def __init__(self, bundle: Bundle) -> None:
        self._session = onnxruntime.InferenceSession(bundle.verify(GRAPH))
        self.backend, self.name = "toy", "toy 0.1"
        self.files: tuple[str, ...] = (GRAPH, GRAPH_DATA)
        self.device, self.dtype = torch.device("cpu"), getattr(torch, bundle.manifest.output.dtype)
        self.pixel_dtype = getattr(torch, bundle.manifest.input.dtype)

    def run(self, pixel_values: torch.Tensor, hidden_states: torch.Tensor, on_start: OnStart | None = None) -> None:
        if on_start:
            on_start(None)
        (result,) = self._session.run(None, {"pixel_values": pixel_values.numpy()})
        hidden_states.copy_(torch.from_numpy(result))
        ToyRunner.computed += len(pixel_values)

    def keep(self) -> None:
        pass

    def close(self) -> None:
        pass


class Toy(Backend):
    def obstacle(self, bundle: Bundle, file: str, device: torch.device) -> str | None:
        return "toys have no FP16" if bundle.manifest.precision == "fp16" else None

    def open(self, bundle: Bundle, file: str, device: torch.device, engine: EngineOptions) -> ToyRunner:
        return ToyRunner(bundle)


TOY = Toy(name="toy", product="Toy", package="toy", kind="cpu", arithmetic="fp32")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Add the toy as the best backend; return a function that counts the images it has computed."""
    monkeypatch.setattr(choose, "BACKENDS", (TOY, *choose.BACKENDS))
    monkeypatch.setattr(ToyRunner, "computed", 0)
    return lambda: ToyRunner.computed


@pytest.fixture
def bundle(fp32_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fp32_bundle, tmp_path / "bundle"))


def draw(tower: VisionTower) -> torch.Tensor:
    size = (3, 3, tower.image_size, tower.image_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def error(actual: Any, expected: Any) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("backend", ["toy", "auto"])
def test_tower_runs_on_it_if_it_is_named_or_the_best(bundle: Path, toy: Callable[[], int], backend: str) -> None:
    tower, expected = VisionTower.load(bundle, backend), VisionTower.load(bundle, "onnxruntime-cpu")
    assert tower.backend == "toy 0.1"
    assert error(tower(draw(tower)), expected(draw(tower))) <= SAME_TOWER
    assert toy() == 3


def test_error_for_an_unknown_backend_lists_it(bundle: Path, toy: Callable[[], int]) -> None:
    del toy
    with pytest.raises(ConfigError, match=r"unknown backend 'toi'; .*choose auto, toy, tensorrt, "):
        VisionTower.load(bundle, "toi")


def test_its_obstacle_is_reported_and_auto_passes_it_over(
    clip_bundle: Path, toy: Callable[[], int], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BackendError, match="toy: toys have no FP16"):
        VisionTower.load(clip_bundle, "toy")
    with caplog.at_level(logging.INFO, logger="trtower"):
        assert VisionTower.load(clip_bundle).backend != "toy 0.1"
    assert "passed over toy: toys have no FP16" in caplog.text
    assert toy() == 0


def test_auto_does_not_even_ask_what_is_worse_than_its_choice(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Bundle] = []
    monkeypatch.setattr(Toy, "obstacle", lambda _, bundle, *__: asked.append(bundle))
    monkeypatch.setattr(choose, "BACKENDS", (*choose.BACKENDS, TOY))
    VisionTower.load(bundle)
    assert not asked, "asking costs the import of a package"
    choose.candidates(Bundle.open(bundle))[-1].obstacle  # noqa: B018 - reading it asks
    assert asked


def test_auto_requires_a_check_if_it_is_coarse(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "BACKENDS", (replace(TOY, arithmetic="fp16"), *choose.BACKENDS))
    assert VisionTower.load(bundle).backend != "toy 0.1"
    (candidate, *_) = choose.candidates(Bundle.open(bundle))
    assert candidate.reservation == (
        "it computes in FP16, which is coarser than fp32, and the bundle has no valid certificate of a check "
        f"on it: trtower check {bundle} --backend toy"
    )


def test_inspect_shows_it(bundle: Path, toy: Callable[[], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(bundle)]) == 0
    assert "runs toy               on cpu, and auto picks it\n" in capsys.readouterr().out
    assert run(["inspect", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"][0] == {
        "backend": "toy",
        "file": GRAPH,
        "device": "cpu",
        "runs": True,
        "obstacle": None,
        "reservation": None,
        "auto": True,
    }
    assert toy() == 0


def test_loaded_model_computes_with_it(bundles: Bundles, toy: Callable[[], int]) -> None:
    model = make("llava")
    prompt = inputs(model, "llava", "one image")
    expected = logits(model, prompt)
    with trtower.install(model, bundles(), backend="toy") as installed:
        before = toy()
        assert (logits(model, prompt) - expected).abs().max() <= EXACT
        assert toy() > before
        assert installed.tower.backend == "toy 0.1"


def test_check_certifies_it(bundle: Path, toy: Callable[[], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", str(bundle), "--backend", "toy", "--json"]) == 0
    certificate = json.loads(capsys.readouterr().out)
    assert (certificate["passed"], certificate["backend"], certificate["runner"]) == (True, "toy", "toy 0.1")
    assert toy() > len(certificate["images"])
    assert Bundle.open(bundle).why_uncertified("toy", [GRAPH]) is None
    assert VisionTower.load(bundle, "toy", require_certificate=True).is_loaded


def test_benchmark_races_it(bundle: Path, checkpoints: dict[str, Path], toy: Callable[[], int]) -> None:
    assert "toy" in competitors()
    assert "toy" in BenchOptions().against
    arena = Arena.open(Bundle.open(bundle), open_checkpoint(str(checkpoints["clip"])), "onnxruntime-cpu")
    entrant = enter(arena, "toy")
    assert (entrant.runs_on, entrant.arithmetic, entrant.backend) == ("toy 0.1", "fp32", "toy")
    images = arena.draw(2)
    assert error(entrant.call(entrant.prepare(images)), arena.reference(images)) <= SAME_TOWER
    assert toy() == 2
