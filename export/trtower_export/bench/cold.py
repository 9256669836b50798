"""Load one entrant and call it once, alone in this process, and print as JSON what that took.

Run by the benchmark: python -m trtower_export.bench.cold BUNDLE CHECKPOINT REVISION RANDOM NAME BACKEND BATCH
"""

import json
import sys
import time
from pathlib import Path

import torch

from trtower import Bundle, VisionTower

KIB = 1024


def main(bundle: str, checkpoint: str, revision: str, random: str, name: str, backend: str, batch: str) -> None:
    """Measure, with everything imported that it needs."""
    opened = Bundle.open(bundle)
    side = opened.manifest.spec.image_size
    images = torch.randn(int(batch), 3, side, side)
    if not backend:
        from trtower_export.bench.entrants import Arena, enter
        from trtower_export.checkpoint import open_checkpoint

        found = open_checkpoint(checkpoint, revision=revision or None, random_weights=bool(random))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    start = time.perf_counter()
    if backend:
        tower = VisionTower.load(bundle, backend)
        loaded = time.perf_counter()
        tower(images.to(tower.device, tower.dtype))
    else:
        entrant = enter(Arena.open_torch(opened, found, device), name)
        given = entrant.prepare(images.to(device))
        loaded = time.perf_counter()
        entrant.call(given)
    peak = _peak_resident_set()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        peak = free - torch.cuda.mem_get_info()[0]
    answered = time.perf_counter()
    load_s = None if random and not backend else loaded - start
    print(json.dumps({"load_s": load_s, "first_s": answered - loaded, "peak_bytes": peak}))  # noqa: T201


def _peak_resident_set() -> int:
    """Ask the kernel; getrusage() would give what the parent had where that was more."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * KIB


if __name__ == "__main__":
    main(*sys.argv[1:])
