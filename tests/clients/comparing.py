"""Compare what a model computes with its eager tower and with a bundle, and record the differences."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "clients.json"

PACKAGES = ("transformers", "torch", "accelerate", "peft", "tokenizers", "numpy", "pillow", "onnxruntime")

FEATURE_TOLERANCE = 2 * 2**-10
"""Relative to the largest feature: two units in FP16's last place. Tower and bundle run in FP32, but clients round
features to FP16."""

HALF_TOLERANCE = 8 * 2**-10
"""The same if the eager tower or projector runs in FP16, and so rounds after each of its operations."""

LOGIT_TOLERANCE = 0.02
"""Relative to the largest logit: the effect of such a difference in features on a language model in FP16."""

Observation = Mapping[str, Tensor]
"""What a model computed, by name: pixels, features and logits in floating point, tokens as integers."""


class Report:
    """Prints a line per comparison, and writes all of them as JSON in `finish`."""

    def __init__(self, client: str, clone: Path, feature_tolerance: float = FEATURE_TOLERANCE) -> None:
        self.client = client
        self.tolerances = {"features": feature_tolerance, "projected": HALF_TOLERANCE, "logits": LOGIT_TOLERANCE}
        self.commit = _git(clone, "rev-parse", "--short", "HEAD")
        self.versions = {"python": platform.python_version(), **_versions()}
        self.stubs: list[str] = []
        self.results: dict[str, str] = {}
        self.failed: list[str] = []
        self._say(f"{client} at {self.commit}")
        self._say(", ".join(f"{name} {version}" for name, version in self.versions.items()))

    def note_stubs(self, stubs: list[str]) -> None:
        """Print and record what the stubs replaced."""
        self.stubs = stubs
        self._say("stubbed: " + ("; ".join(stubs) or "nothing"))

    def compare(self, title: str, eager: Observation, other: Observation, *, exact: bool = False) -> None:
        """Print a line for each value that both models have; with ``exact`` all must be identical, in one line."""
        if exact:
            same = eager.keys() == other.keys() and all(torch.equal(eager[name], other[name]) for name in eager)
            said = "all" if same else "not all"
            self._line(title, f"{said} {len(eager)} the same bit for bit", passed=same)
            if same:
                return
        if eager.keys() != other.keys():
            self._line(title, f"{sorted(eager)} against {sorted(other)}", passed=False)
        for name in [name for name in eager if name in other]:
            self._compare_one(f"{title}: {name}", eager[name], other[name])

    @contextmanager
    def attempt(self, title: str) -> Iterator[None]:
        """If the block fails, print a line and continue after it."""
        try:
            yield
        except Exception as err:  # noqa: BLE001 - any error of a client is a result
            traceback.print_exc()
            torch.set_default_dtype(torch.float32)  # after an error transformers before 4.40 leaves the model's dtype
            self._line(title, f"{type(err).__name__}: {' '.join(str(err).split())[:400]}", passed=False)

    def three_ways(
        self,
        title: str,
        observe: Callable[[Any], Observation],
        eager: Callable[[], Any],
        built: Callable[[], Any],
        install: Callable[[Any], Any],
    ) -> None:
        """Compare a client's own model with one that has trtower's tower, and with itself after installing a bundle."""
        with self.attempt(f"{title}, eager"):
            loaded = eager()
            observed = observe(loaded)
            self._check_pictures_differ(title, observed)
            with self.attempt(f"{title}, built"):
                self.compare(f"{title}, built", observed, observe(built()))
            self._install(title, observe, loaded, observed, install)

    def with_projector(
        self,
        title: str,
        observe: Callable[[Any], Observation],
        eager: Callable[[], Any],
        install: Callable[[Any], Any],
    ) -> None:
        """Compare a client's own model with itself after installing a bundle of its tower and projector."""
        title = f"{title}, with its projector"
        with self.attempt(f"{title}, eager"):
            loaded = eager()
            self._install(title, observe, loaded, observe(loaded), install)

    def _install(
        self,
        title: str,
        observe: Callable[[Any], Observation],
        loaded: Any,
        observed: Observation,
        install: Callable[[Any], Any],
    ) -> None:
        """Compare a model with what was ``observed`` of it, after installing a bundle and after taking it out."""
        with self.attempt(f"{title}, installed"):
            installation = install(loaded)
            self.compare(f"{title}, installed", observed, observe(loaded))
            installation.uninstall()
            self.compare(f"{title}, uninstalled", observed, observe(loaded), exact=True)

    def check(self, title: str, actual: object, expected: object) -> None:
        """Print a line for a value that must equal what is expected."""
        same = actual == expected
        self._line(title, f"{actual}" if same else f"{actual}, not {expected}", passed=same)

    def expect_error(self, title: str, call: Any, error: type[Exception]) -> None:
        """Print a line for a call that must raise an error."""
        try:
            call()
        except error as err:
            torch.set_default_dtype(torch.float32)
            self._line(title, f"{type(err).__name__}: {' '.join(str(err).split())}", passed=True)
        else:
            self._line(title, f"no {error.__name__} was raised", passed=False)

    def _check_pictures_differ(self, title: str, observed: Observation) -> None:
        """Print whether the features of two pictures differ clearly; if not, equal features would prove nothing."""
        pairs = {
            name: some[:2].double() for name, some in observed.items() if name.startswith("features") and len(some) > 1
        }
        near = [name for name, (a, b) in pairs.items() if (a - b).abs().max() <= 0.1 * a.abs().max()]
        self._line(f"{title}: pictures are told apart", f"not by {near}" if near else "they are", passed=not near)

    def _compare_one(self, title: str, expected: Tensor, actual: Tensor) -> None:
        if expected.shape != actual.shape or expected.dtype != actual.dtype:
            text = f"{tuple(actual.shape)} {actual.dtype}, not {tuple(expected.shape)} {expected.dtype}"
            self._line(title, text, passed=False)
            return
        difference = (expected.double() - actual.double()).abs().max().item()
        largest = expected.double().abs().max().item()
        kind = title.rpartition(": ")[2].split()[0]
        limit = self.tolerances.get(kind, 0.0) * largest
        text = f"largest difference {difference:.3g} of {largest:.3g}"
        self._line(title, text, passed=difference <= limit)

    def _line(self, title: str, text: str, *, passed: bool) -> None:
        self._say(f"{'PASS' if passed else 'FAIL'}  {title}: {text}")
        self.results[title] = text
        self.failed += [] if passed else [title]

    def _say(self, text: str) -> None:
        print(f"[{self.client}] {text}", flush=True)  # noqa: T201

    def finish(self) -> None:
        """Write the JSON, and exit with 1 if anything failed."""
        self._say(f"{len(self.results) - len(self.failed)} passed, {len(self.failed)} failed")
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        results[self.client] = {
            "date": date.today().isoformat(),
            "commit": self.commit,
            "hardware": f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
            "versions": self.versions,
            "stubbed": self.stubs,
            "failed": self.failed,
            "found": self.results,
        }
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        sys.exit(bool(self.failed))


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git(clone: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", clone, *words], capture_output=True, text=True, check=True).stdout.strip()  # noqa: S607
