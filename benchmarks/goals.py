"""Measure trtower's own goals on this machine, each in its own processes, and print one table.

    make goals

Rehearses CLIP ViT-L/14-336 at full size in a temporary folder. This is not a test: the times depend on the machine.
benchmarks/README.md explains each row and keeps the results.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from trtower_export.checkpoint.checkpoint import open_checkpoint

RECIPE = "openai/clip-vit-large-patch14-336"
COMMAND = [sys.executable, "-c", "from trtower.cli import main; main()"]

IMPORT = """
import gc, time, torch
gc.collect()  # or the import triggers a full pass over torch's own objects, which takes longer than the import
start = time.perf_counter()
from trtower import VisionTower, install  # `import trtower` alone imports no name
print(time.perf_counter() - start)
"""

WRAPPER = """
import statistics, sys, time, torch, trtower
tower = trtower.VisionTower.load(sys.argv[1])
size = tower.image_size
images = torch.randn(1, 3, size, size).to(tower.dtype)
features = torch.empty(1, tower.spec.num_tokens, tower.hidden_size, dtype=tower.dtype)
# The time of a session varies by more than the wrapper adds, so replace the runner with one that does nothing.
tower.runner.run = lambda *tensors: None
seconds = []
for _ in range(2000):
    start = time.perf_counter()
    tower(images)
    seconds.append(time.perf_counter() - start)
print(statistics.median(seconds))
"""


def main() -> None:
    """Measure everything and print the table."""
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, bundle = Path(temporary, "checkpoint"), Path(temporary, "bundle")
        model: Any = open_checkpoint(RECIPE, random_weights=True).load_model()
        model.save_pretrained(checkpoint)
        start = time.perf_counter()
        command: list[str | Path] = [*COMMAND, "export", checkpoint, "--out", bundle, "--no-check", "--no-store"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        export_s = time.perf_counter() - start
        peak_gb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
        import_s = statistics.median(float(run(IMPORT)) for _ in range(5))
        wrapper_s = float(run(WRAPPER, bundle))
    rows = (
        ("from weights to plan", f"{export_s:.1f} s", "under 30 s"),
        ("peak memory of this", f"{peak_gb:.2f} GB", "under 3.5 GB"),
        ("from trtower import VisionTower, install, after torch", f"{import_s * 1e3:.0f} ms", "under 100 ms"),
        ("the wrapper around a bare session call", f"{wrapper_s * 1e6:.0f} us", "under 50 us"),
    )
    table = Table("CLIP ViT-L/14-336, state -2, batch 1", "measured", "goal", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", highlight=False)


def run(script: str, *arguments: Path) -> str:
    """Run a script in its own process and return the last line that it printed."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout.strip().splitlines()[-1]


if __name__ == "__main__":
    main()
