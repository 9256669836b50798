"""Measure what a projector adds to an export and its plan, and how long its bundle takes to verify.

    make heads

Rehearses LLaVA-1.5-7B three times in turn, without its projector and with it, each in its own process and a temporary
folder, plan included. Verifying is compared with the time that a large matrix product, measured afterwards, would take
for the same FLOP. This is not a test: the times depend on the machine.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from trtower import Bundle
from trtower.parity.golden import Golden
from trtower.spec import profile_batches
from trtower_export.bench.ceiling import measure_ceilings

RECIPE = "llava-v1.5-7b"
COMMAND = [sys.executable, "-c", "from trtower.cli import main; main()"]
ROUNDS = 3
HEADS = ("none", "projector")
PROJECTOR_GB = {"FP32": 4 * 20.98e6 / 1e9, "FP16": 2 * 20.98e6 / 1e9}
"""Two linear layers, 1024 to 4096 and 4096 to 4096, with biases."""


def main() -> None:
    """Measure both and print them."""
    with tempfile.TemporaryDirectory() as temporary:
        seconds: dict[str, list[float]] = {head: [] for head in HEADS}
        peaks: dict[str, list[float]] = {head: [] for head in HEADS}
        for _ in range(ROUNDS):
            for head in HEADS:
                out = Path(temporary, head)
                options = ["--random-weights", "--no-check", "--no-store", "--overwrite", "--head", head]
                took, peak = run(["export", RECIPE, "--out", str(out), *options])
                seconds[head].append(took)
                peaks[head].append(peak)
        projected = Path(temporary, "projector")
        verified, _ = run(["verify", str(projected), "--backend", "openvino"])
        images, at_best = count_work(projected)
    (without, with_), (low, high) = ([statistics.median(each[head]) for head in HEADS] for each in (seconds, peaks))
    print(f"from recipe to plan: {without:.1f} s without the projector, {with_:.1f} s with it: {with_ / without:.3f}")
    print(f"peak memory: {low:.2f} GB and {high:.2f} GB: {high / low:.3f}; the projector is {PROJECTOR_GB} GB")
    print(
        f"trtower verify --backend openvino of the projected bundle: {verified:.0f} s for {images} images, where a "
        f"large matrix product takes {at_best:.0f} s in FP32: {at_best / verified:.0%}"
    )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {ROUNDS}")


def count_work(path: Path) -> tuple[int, float]:
    """Return the images that `trtower verify` runs, and the seconds of a large matrix product of as many FLOP."""
    bundle = Bundle.open(path)
    members = len(Golden.read(bundle).images)
    images = sum(-(-members // size) * size for size in profile_batches(bundle.manifest.profiles))
    flop_per_second = measure_ceilings(torch.device("cpu"), ["fp32"])["fp32"]
    return images, images * bundle.manifest.cut.flop / flop_per_second


def run(arguments: list[str]) -> tuple[float, float]:
    """Run a command; return its seconds, and its peak memory in GB."""
    start = time.perf_counter()
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(arguments)} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main()
