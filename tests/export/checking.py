"""Shared by the tests of the check: a check in one call, runners that spoil results, damaged graphs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

from trtower.bundle.bundle import Bundle
from trtower.bundle.certificate import Certificate
from trtower.bundle.manifest import GRAPH, GRAPH_DATA, MANIFEST
from trtower.bundle.staging import describe
from trtower.runners.base import OnStart, Runner
from trtower.runners.choose import choose
from trtower_export.check import certify as module
from trtower_export.check.certify import certify
from trtower_export.check.photographs import load_photographs
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.console import LoggedProgress


def check(bundle: Path, checkpoint: Path, *, photographs: int = 2, **options: Any) -> Certificate:
    """Certify a bundle without writing into it."""
    images = load_photographs(None, limit=photographs)
    opened = open_checkpoint(str(checkpoint))
    return certify(Bundle.open(bundle), opened, images, progress=LoggedProgress(), **options)


Run = Callable[[torch.Tensor, torch.Tensor], object]


class Wrapped(Runner):
    """A runner around another that passes each call's inputs and outputs to a callback."""

    def __init__(self, runner: Runner, after: Run) -> None:
        self.backend, self.name, self.files = runner.backend, runner.name, runner.files
        self.device, self.dtype, self.pixel_dtype = runner.device, runner.dtype, runner.pixel_dtype
        self._runner, self._after = runner, after

    def run(self, pixel_values: torch.Tensor, hidden_states: torch.Tensor, on_start: OnStart | None = None) -> None:
        del on_start
        assert pixel_values.is_contiguous()
        self._runner.run(pixel_values, hidden_states)
        self._after(pixel_values, hidden_states)

    def close(self) -> None:
        self._runner.close()


def wrap_runner(monkeypatch: pytest.MonkeyPatch, after: Run) -> None:
    """Make the check run its bundles on a wrapped runner; ``after`` sees each call and may spoil its result."""
    monkeypatch.setattr(module, "choose", lambda *arguments: Wrapped(choose(*arguments), after))


def damage(bundle: Path, node: str) -> None:
    """Flip the sign of one row of a node's weight and update the hashes, so that only arithmetic can find it."""
    model = onnx.load(bundle / GRAPH)
    (product,) = (each for each in model.graph.node if each.name == node)
    (tensor,) = (each for each in model.graph.initializer if each.name == product.input[1])
    values = numpy_helper.to_array(tensor).copy()
    values[3] *= -1
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    (bundle / GRAPH_DATA).unlink()
    onnx.save_model(model, bundle / GRAPH, save_as_external_data=True, location=GRAPH_DATA, size_threshold=1024)
    make_hashes_fit(bundle, GRAPH, GRAPH_DATA)


def make_hashes_fit(bundle: Path, *names: str) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    for name in names:
        entry = describe(bundle / name)
        manifest["files"][name] = {"sha256": entry.sha256, "size": entry.size}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
