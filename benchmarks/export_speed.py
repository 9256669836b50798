"""Time an export of CLIP ViT-L/14-336 against optimum-onnx on the same folder: `make export-speed`.

    python benchmarks/export_speed.py PEER_PYTHON [ROUNDS] [CHECKPOINT]

Each round runs in turn, each in its own process: an export of the graph only, one of graph and plan, and the peer's
`optimum-cli export onnx`, which writes the full tower in FP32. PEER_PYTHON is a Python with optimum-onnx; the make
target installs one. Without CHECKPOINT, a folder of random weights is saved in FP32 first. Times include imports. If
"cores" shows that the machine was busy, compare the CPU seconds.
"""

import os
import re
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from trtower_export.checkpoint.checkpoint import open_checkpoint

RECIPE = "openai/clip-vit-large-patch14-336"
COMMAND = [sys.executable, "-c", "from trtower.cli import main; main()", "export"]
PEER = ["-c", "from optimum.commands.optimum_cli import main; main()", "export", "onnx", "--task", "feature-extraction"]
STEP = re.compile(r"^  (\S.*?) +(\d+\.\d) s$", re.MULTILINE)


@dataclass
class Runs:
    """Time and memory of the runs of one command; ``steps`` are trtower's own progress lines."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    gigabytes: list[float] = field(default_factory=list)
    steps: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, command: list[str], log: Path) -> None:
        """Run a command to its end; if it fails, exit with its output."""
        start = perf_counter()
        with log.open("w") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=stream)
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        output = log.read_text()
        if process.returncode:
            sys.exit(f"{command[0]} … {' '.join(command[3:])} failed:\n{output}")
        self.seconds.append(perf_counter() - start)
        self.cpu_seconds.append(used.ru_utime + used.ru_stime)
        self.gigabytes.append(used.ru_maxrss * 1024 / 1e9)
        for title, seconds in STEP.findall(output):
            self.steps[title].append(float(seconds))


def main() -> None:
    """Run all commands and print their times."""
    peer_python, rounds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = str(sys.argv[3]) if len(sys.argv) > 3 else str(folder / "checkpoint")
        if len(sys.argv) <= 3:
            model: Any = open_checkpoint(RECIPE, random_weights=True).load_model()
            model.save_pretrained(checkpoint)
        common = [*COMMAND, checkpoint, "--no-check", "--no-store", "--overwrite"]
        commands = {
            "trtower, graph": [*common, "--flavour", "none", "--out", str(folder / "graph")],
            "trtower, graph and plan": [*common, "--flavour", "tensorrt-rtx", "--out", str(folder / "plan")],
            "optimum-onnx, graph": [peer_python, *PEER, "--model", checkpoint, str(folder / "peer")],
        }
        runs = {name: Runs() for name in commands}
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
            for name, command in commands.items():
                runs[name].add(command, folder / "log")
    print_table(runs)


def print_table(runs: dict[str, Runs]) -> None:
    """Print medians, ratios to the peer, and the steps of an export."""
    median = statistics.median
    *ours, peer = runs
    print(f"{'median of ' + str(len(runs[peer].seconds)):<26}     s  vs peer  CPU s  vs peer  cores  peak GB")
    for name, each in runs.items():
        wall, cpu = median(each.seconds), median(each.cpu_seconds)
        of_wall, of_cpu = wall / median(runs[peer].seconds), cpu / median(runs[peer].cpu_seconds)
        peak = median(each.gigabytes)
        print(f"{name:<26} {wall:5.1f}  {of_wall:7.2f}  {cpu:5.1f}  {of_cpu:7.2f}  {cpu / wall:5.2f}  {peak:7.2f}")
    for name in ours:
        print(f"\n{name}, by step")
        steps = {title: median(seconds) for title, seconds in runs[name].steps.items()}
        for title, seconds in steps.items():
            print(f"  {title:<40} {seconds:5.1f} s")
        print(f"  {'rest (Python itself)':<40} {median(runs[name].seconds) - sum(steps.values()):5.1f} s")
    print(f"\ntorch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
