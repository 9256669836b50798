"""Measure `embed_pictures` against what its parts reach flat out, and against a plain loop over transformers.

    make bench-serving

Exports a small tower (0.3 GFLOP an image) into a temporary folder, and makes 5000 JPEGs of 640 x 480 from photographs
of scikit-image. In turn, in one run, three times:

- the engine alone, on batches that are prepared and in memory, on all processors: E images a second;
- reading and preparing alone, on all processors: P;
- `embed_pictures` into each format, from the first picture to the last file on the disk;
- a loop over transformers, picture by picture, on the first 500.

Engine and preparation share the processors of a machine without a GPU, so the two together cannot be faster than
1 / (1/E + 1/P): that is the ceiling. This is not a test: the times depend on the machine.
"""

import importlib
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from trtower import EmbedOptions, EmbedProgress, VisionTower, embed_pictures
from trtower.embedding.find import find_pictures
from trtower.embedding.formats import FORMATS
from trtower.embedding.shards import Reader, Shard, Work
from trtower.tower.encoded import LARGEST_FILE, LARGEST_PICTURE
from trtower.tower.prepare import count_threads, in_order
from trtower_export.check.photographs import load_photographs
from trtower_export.pipeline import ExportOptions, export_tower

PICTURES, IN_THE_LOOP, ROUNDS, AT_ONCE = 5000, 500, 3, 8
SIZE = (640, 480)
TOWER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 224,
    "patch_size": 16,
}


def main() -> None:
    """Measure everything and print it as JSON."""
    pictures = int(sys.argv[1]) if len(sys.argv) > 1 else PICTURES
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_photographs(folder / "photos", pictures)
        torch.manual_seed(0)
        model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TOWER)).eval()
        model.save_pretrained(folder / "small")
        bundle = export_tower(str(folder / "small"), folder / "bundle", ExportOptions(check=False, flavour="none")).path
        tower = VisionTower.load(bundle)
        rates: dict[str, list[float]] = defaultdict(list)
        for round_ in range(ROUNDS):
            rates["engine"].append(run_engine(tower))
            rates["preparation"].append(prepare_all(tower, folder / "photos"))
            for format_ in FORMATS:
                out = folder / f"{format_}-{round_}"
                rates[format_].append(embed_all(bundle, folder / "photos", out, format_))
            rates["loop"].append(loop(model, bundle, folder / "photos"))
    found = {name: statistics.median(each) for name, each in rates.items()}
    ceiling = statistics.median(1 / (1 / e + 1 / p) for e, p in zip(rates["engine"], rates["preparation"], strict=True))
    result = {
        "pictures": pictures,
        "images_per_second": {name: round(rate, 1) for name, rate in found.items()},
        "all": {name: [round(rate, 1) for rate in each] for name, each in rates.items()},
        "ceiling": round(ceiling, 1),
        "of_ceiling": {format_: round(found[format_] / ceiling, 3) for format_ in FORMATS},
        "over_loop": {format_: round(found[format_] / found["loop"], 2) for format_ in FORMATS},
        "backend": tower.backend,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": count_threads(None),
    }
    print(json.dumps(result, indent=2))


def make_photographs(folder: Path, number: int) -> None:
    """Write crops of photographs, each another one."""
    folder.mkdir()
    photographs = [each.image.convert("RGB") for each in load_photographs(None).images]
    for index in range(number):
        image = photographs[index % len(photographs)]
        shift = index // len(photographs) % 50
        box = (shift, shift, image.width - shift, image.height - shift)
        image.resize(SIZE, box=box).save(folder / f"{index:05}.jpg", quality=90)


def run_engine(tower: VisionTower) -> float:
    """Return the rate of the engine alone."""
    pixel_values = torch.randn(AT_ONCE, 3, tower.image_size, tower.image_size)
    tower.warmup([AT_ONCE])
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < 5:
        tower.run_prepared(pixel_values)
        calls += 1
    return calls * AT_ONCE / (time.perf_counter() - start)


def prepare_all(tower: VisionTower, folder: Path) -> float:
    """Return the rate of reading and preparing alone."""
    threads = count_threads(None)
    work = Work(
        folder=folder,
        format="parquet",
        dtype="float16",
        shape=tower.feature_shape,
        about={},
        batch_size=AT_ONCE,
        threads=threads,
        max_bytes=LARGEST_FILE,
        max_pixels=LARGEST_PICTURE,
    )
    reader = Reader(tower, work)
    shard = Shard(index=0, pictures=find_pictures([folder]).pictures)
    start = time.perf_counter()
    for prepared in in_order(reader.read, reader.open([shard]), threads=threads, ahead=2 * AT_ONCE):
        assert prepared.pixel_values is not None
    return len(shard.pictures) / (time.perf_counter() - start)


def embed_all(bundle: Path, folder: Path, out: Path, format_: str) -> float:
    """Return the rate of `embed_pictures`, without loading the engine."""
    first: list[float] = []

    def note(progress: EmbedProgress) -> None:
        if not first:
            first.append(time.perf_counter())

    options = EmbedOptions(format=format_, batch_size=AT_ONCE, allow_uncertified=True)
    features = embed_pictures(folder, bundle, out, options, on_progress=note)
    return len(features) / (time.perf_counter() - first[0])


@torch.no_grad()
def loop(model: Any, bundle: Path, folder: Path) -> float:
    """Return the rate of a plain loop over transformers."""
    processor = transformers_processor(bundle)
    paths = sorted(folder.iterdir())[:IN_THE_LOOP]
    features, start = [], time.perf_counter()
    for path in paths:
        inputs = processor(Image.open(path).convert("RGB"), return_tensors="pt")
        states = model(**inputs, output_hidden_states=True).hidden_states
        features.append(states[-2][:, 1:].numpy())
    return len(features) / (time.perf_counter() - start)


def transformers_processor(folder: Path) -> Any:
    """Load transformers' processor that works on PIL images."""
    return importlib.import_module(
        "transformers.models.clip.image_processing_pil_clip"
    ).CLIPImageProcessorPil.from_pretrained(folder)


if __name__ == "__main__":
    main()
