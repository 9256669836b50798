"""Measure what bytes cost inside the graph, and how fast pictures are prepared, in one run each.

    make pixels

Rehearses CLIP ViT-L/14-336 twice, with `--pixels float` and `--pixels uint8`, in a temporary folder. The calls race
against each other, the float bundle on pixels that were prepared before. Preparing 200 JPEGs of 1024 x 768 is timed
against transformers' own processor, which prepares eight at a time. This is not a test: the times depend on the
machine.
"""

import importlib
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from trtower import VisionTower
from trtower.runners.choose import candidates
from trtower.runners.race import race
from trtower.tower.prepare import count_threads, each_picture, prepare_batches
from trtower_export.check.photographs import load_photographs
from trtower_export.pipeline import ExportOptions, export_tower

RECIPE = "openai/clip-vit-large-patch14-336"
ROUNDS, PICTURES, AT_ONCE = 9, 200, 8


def main() -> None:
    """Measure both and print them."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        towers: dict[str, Path] = {}
        for pixels in ("float", "uint8"):
            options = ExportOptions(random_weights=True, check=False, flavour="none", pixels=pixels)
            towers[pixels] = export_tower(RECIPE, folder / pixels, options).path
        race_calls(towers)
        race_preparation(VisionTower(towers["float"]), folder)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")


def race_calls(bundles: dict[str, Path]) -> None:
    """Time a call of each bundle on each backend that runs here."""
    image = load_photographs(None, limit=1).images[0].image
    opened = VisionTower(bundles["float"]).bundle
    for backend in dict.fromkeys(each.backend for each in candidates(opened) if not each.obstacle):
        calls = {}
        for pixels, bundle in bundles.items():
            tower = VisionTower.load(bundle, backend)
            prepared = tower.image_processor(image, return_tensors="pt")["pixel_values"]
            prepared = prepared.to(tower.device) if pixels == "uint8" else prepared.to(tower.device, tower.dtype)
            calls[pixels] = partial(tower, prepared)
        seconds = {name: statistics.median(times) for name, times in race(calls, rounds=ROUNDS).items()}
        print(
            f"{backend}: a call with bytes takes {seconds['uint8'] / seconds['float']:.3f} times as long as one with "
            f"prepared floats ({seconds['float'] * 1e3:.0f} ms, median of {ROUNDS})",
            flush=True,
        )


def race_preparation(tower: VisionTower, folder: Path) -> None:
    """Time the preparation of JPEGs: by `tower.encode`, without the engine, and by transformers."""
    photographs = [each.image.resize((1024, 768)) for each in load_photographs(None).images]
    paths = [folder / f"{index}.jpg" for index in range(PICTURES)]
    for index, path in enumerate(paths):
        photographs[index % len(photographs)].save(path, quality=90)
    theirs = transformers_processor(tower.bundle.path)
    threads = count_threads(None)

    def ours() -> int:
        named = each_picture(paths, tower.image_processor)
        return sum(len(each) for each in prepare_batches(named, tower.image_processor, AT_ONCE, threads))

    def transformers() -> int:
        done = 0
        for start in range(0, PICTURES, AT_ONCE):
            images = [Image.open(path).convert("RGB") for path in paths[start : start + AT_ONCE]]
            done += len(theirs(images, return_tensors="pt")["pixel_values"])
        return done

    rates: dict[str, list[float]] = {"ours": [], "transformers": []}
    for _ in range(3):
        for name, prepare in (("ours", ours), ("transformers", transformers)):
            start = time.perf_counter()
            rates[name].append(prepare() / (time.perf_counter() - start))
    ratio = statistics.median(rates["ours"]) / statistics.median(rates["transformers"])
    print(
        f"encode prepares {statistics.median(rates['ours']):.0f} pictures a second on {threads} threads, "
        f"{ratio:.2f} times as many as transformers' {type(theirs).__name__}",
        flush=True,
    )


def transformers_processor(folder: Path) -> Any:
    """Load transformers' processor that works on PIL images, which version 5 has in a module of its own."""
    package = "transformers.models.clip"
    try:
        kind = importlib.import_module(f"{package}.image_processing_pil_clip").CLIPImageProcessorPil
    except ModuleNotFoundError:
        kind = importlib.import_module(f"{package}.image_processing_clip").CLIPImageProcessor
    return kind.from_pretrained(folder)


if __name__ == "__main__":
    main()
