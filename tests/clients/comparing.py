"""Compare what a model computes with its eager tower and with a bundle, and write the differences down."""

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
"""Of the largest feature: two units in FP16's last place. Tower and bundle run in FP32, and clients round to FP16."""

HALF_TOLERANCE = 8 * 2**-10
"""The same where the eager tower runs in FP16, and rounds after each operation of its 4 to 14 layers."""

LOGIT_TOLERANCE = 0.02
"""Of the largest logit: what the language model in FP16 makes of such features."""

Observation = Mapping[str, Tensor]
"""What was seen of a model, by name: pixels, features and logits in floating point, tokens as integers."""


class Report:
    """Prints a line per comparison, and writes all of them as JSON when it is left."""

    def __init__(self, client: str, clone: Path, feature_tolerance: float = FEATURE_TOLERANCE) -> None:
        self.client = client
        self.tolerances = {"features": feature_tolerance, "logits": LOGIT_TOLERANCE}
        self.commit = _git(clone, "rev-parse", "--short", "HEAD")
        self.versions = {"python": platform.python_version(), **_versions()}
        self.stubs: list[str] = []
        self.found: dict[str, str] = {}
        self.failed: list[str] = []
        self._say(f"{client} at {self.commit}")
        self._say(", ".join(f"{name} {version}" for name, version in self.versions.items()))

    def note_stubs(self, stubs: list[str]) -> None:
        """Say what of the client's surroundings was replaced."""
        self.stubs = stubs
        self._say("stubbed: " + ("; ".join(stubs) or "nothing"))

    def compare(self, title: str, eager: Observation, other: Observation, *, exact: bool = False) -> None:
        """Print a line for each thing that was seen of both models, or one line if all of it is the same."""
        if exact and eager.keys() == other.keys() and all(torch.equal(eager[name], other[name]) for name in eager):
            self._line(title, f"all {len(eager)} the same bit for bit", passed=True)
            return
        if eager.keys() != other.keys():
            self._line(title, f"{sorted(eager)} against {sorted(other)}", passed=False)
        for name in [name for name in eager if name in other]:
            self._compare_one(f"{title}: {name}", eager[name], other[name])

    @contextmanager
    def attempt(self, title: str) -> Iterator[None]:
        """Print a line if what is done within fails, and go on with what comes after."""
        try:
            yield
        except Exception as err:  # noqa: BLE001 - whatever a client raises is a result
            traceback.print_exc()
            torch.set_default_dtype(torch.float32)  # transformers before 4.40 leaves it at the model's
            self._line(title, f"{type(err).__name__}: {' '.join(str(err).split())[:400]}", passed=False)

    def three_ways(
        self,
        title: str,
        observe: Callable[[Any], Observation],
        eager: Callable[[], Any],
        built: Callable[[], Any],
        install: Callable[[Any], Any],
    ) -> None:
        """Compare a model as its client loads it with one that has trtower's tower, and with a bundle installed."""
        with self.attempt(f"{title}, eager"):
            loaded = eager()
            seen = observe(loaded)
            self._check_sight(title, seen)
            with self.attempt(f"{title}, built"):
                self.compare(f"{title}, built", seen, observe(built()))
            with self.attempt(f"{title}, installed"):
                installation = install(loaded)
                self.compare(f"{title}, installed", seen, observe(loaded))
                installation.uninstall()
                self.compare(f"{title}, uninstalled", seen, observe(loaded), exact=True)

    def check(self, title: str, found: object, expected: object) -> None:
        """Print a line for one thing that must be what is expected."""
        same = found == expected
        self._line(title, f"{found}" if same else f"{found}, not {expected}", passed=same)

    def expect_error(self, title: str, call: Any, error: type[Exception]) -> None:
        """Print a line for a call that must be refused."""
        try:
            call()
        except error as err:
            torch.set_default_dtype(torch.float32)
            self._line(title, f"{type(err).__name__}: {' '.join(str(err).split())}", passed=True)
        else:
            self._line(title, f"no {error.__name__} was raised", passed=False)

    def _check_sight(self, title: str, seen: Observation) -> None:
        """Print a line: nothing is shown by equal features unless those of two pictures lie far apart."""
        pairs = {
            name: some[:2].double() for name, some in seen.items() if name.startswith("features") and len(some) > 1
        }
        near = [name for name, (a, b) in pairs.items() if (a - b).abs().max() <= 0.1 * a.abs().max()]
        self._line(f"{title}: pictures are told apart", f"not by {near}" if near else "they are", passed=not near)

    def _compare_one(self, title: str, expected: Tensor, actual: Tensor) -> None:
        if expected.shape != actual.shape or expected.dtype != actual.dtype:
            found = f"{tuple(actual.shape)} {actual.dtype}, not {tuple(expected.shape)} {expected.dtype}"
            self._line(title, found, passed=False)
            return
        difference = (expected.double() - actual.double()).abs().max().item()
        largest = expected.double().abs().max().item()
        kind = title.rpartition(": ")[2].split()[0]
        limit = self.tolerances.get(kind, 0.0) * largest
        text = f"largest difference {difference:.3g} of {largest:.3g}"
        self._line(title, text, passed=difference <= limit)

    def _line(self, title: str, text: str, *, passed: bool) -> None:
        self._say(f"{'PASS' if passed else 'FAIL'}  {title}: {text}")
        self.found[title] = text
        self.failed += [] if passed else [title]

    def _say(self, text: str) -> None:
        print(f"[{self.client}] {text}", flush=True)  # noqa: T201

    def finish(self) -> None:
        """Write the JSON, and leave with 1 if anything failed."""
        self._say(f"{len(self.found) - len(self.failed)} passed, {len(self.failed)} failed")
        results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        results[self.client] = {
            "date": date.today().isoformat(),
            "commit": self.commit,
            "hardware": f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
            "versions": self.versions,
            "stubbed": self.stubs,
            "failed": self.failed,
            "found": self.found,
        }
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
        sys.exit(bool(self.failed))


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(clone: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", clone, *words], capture_output=True, text=True, check=True).stdout.strip()  # noqa: S607
