"""Load one entrant in its own process, call it once, and print the times and the peak memory as JSON.

The benchmark runs it as python -m trtower_export.bench.cold JSON, with the arguments of `main` in the JSON.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from trtower import Bundle, EngineOptions, VisionTower
from trtower.dtypes import PIXEL_DTYPES
from trtower.runners.race import draw_inputs
from trtower_export.bench.results import COMPILED

KIB = 1024


def main(
    bundle: str,
    name: str,
    backend: str | None,
    device: str,
    batch: int,
    source: str,
    trust: dict[str, bool],
    **options: Any,
) -> None:
    """Measure on ``device``. Without a ``backend``, PyTorch runs.

    torch is imported before the clock starts; importing the backend's package counts as loading. ``source``, ``trust``
    and ``options`` belong to the checkpoint.
    """
    opened = Bundle.open(bundle)
    images = draw_inputs(opened.manifest, batch)
    if not backend:
        from trtower_export.bench.entrants import Arena, enter
        from trtower_export.checkpoint.checkpoint import open_checkpoint
        from trtower_export.options import Trust

        checkpoint = open_checkpoint(source, trust=Trust(**trust), **options)
    on_gpu = torch.device(device).type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else 0
    start = time.perf_counter()
    if backend:
        served = VisionTower.load(bundle, backend, device, engine=EngineOptions(compile=name.endswith(COMPILED)))
        loaded = time.perf_counter()
        served(images.to(served.device, PIXEL_DTYPES[opened.manifest.input.dtype]))
    else:
        arena = Arena.open_torch(opened, checkpoint, torch.device(device))
        if name.endswith("-bf16"):
            # in place: nobody keeps a second copy of the weights in FP32
            torch.nn.ModuleList([arena.uncut.model, arena.cut]).to(torch.bfloat16)
        entrant = enter(arena, name)
        prepared = entrant.prepare(images.to(device))
        loaded = time.perf_counter()
        entrant.call(prepared)
    peak = _peak_resident_set()
    if on_gpu:
        torch.cuda.synchronize(device)
        peak = free - torch.cuda.mem_get_info(device)[0]
    answered = time.perf_counter()
    load_s = None if options["random_weights"] and not backend else loaded - start
    print(json.dumps({"load_s": load_s, "first_s": answered - loaded, "peak_bytes": peak}))  # noqa: T201


def _peak_resident_set() -> int:
    """Read the peak from the kernel: getrusage() would return the parent's if that was larger."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * KIB


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
