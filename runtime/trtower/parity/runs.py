"""Run a bundle on images at a batch size, and record what ran: what a check and a verification share."""

import datetime
import platform
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import CONFIG, GRAPH_DATA, PREPROCESSOR, Manifest
from trtower.errors import BundleError
from trtower.runners.base import Runner, run_batch


def run_in_batches(
    runner: Runner, manifest: Manifest, inputs: Sequence[Tensor], size: int
) -> Iterator[tuple[int, Tensor]]:
    """Run images, ``size`` at once: yield the index of an image and its features in FP32 on the CPU, row by row.

    Every batch is full: the last one begins again with the first image. ``inputs`` are one image each, (1, 3, S, S).
    """
    for start in range(0, len(inputs), size):
        members = [(start + place) % len(inputs) for place in range(size)]
        taken = torch.cat([inputs[member] for member in members]).to(runner.device, runner.pixel_dtype).contiguous()
        for member, row in zip(members, run_batch(runner, manifest.batch, manifest.output, taken), strict=True):
            yield member, row.float().cpu()


def refuse_altered(bundle: Bundle, runner: Runner) -> None:
    """Raise BundleError if a file was altered, even one that does not run here; ``runner`` has compared its own."""
    if altered := bundle.altered(bundle.manifest.files.keys() - set(runner.files)):
        raise BundleError(f"{bundle.path / altered[0]} was altered: copy the bundle again, or rebuild the plan.")


def describe_run(bundle: Bundle, runner: Runner, depends: Iterable[str]) -> dict[str, Any]:
    """Return the keys of a certificate that say what ran, where and when; the result ``depends`` on these files too."""
    manifest = bundle.manifest
    plans = [plan.file for plan in manifest.plans]
    files = dict.fromkeys((*runner.files, *depends, GRAPH_DATA, CONFIG, PREPROCESSOR))
    return {
        "ran": "plan" if runner.files[0] in plans else "graph",
        "backend": runner.backend,
        "runner": runner.name,
        "executed": tuple(runner.files),
        "files": {name: manifest.files[name].sha256 for name in files},
        "not_run": tuple(plan for plan in plans if plan not in runner.files),
        "gpu": torch.cuda.get_device_name(runner.device) if runner.device.type == "cuda" else None,
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }
