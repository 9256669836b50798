"""Measure the memory that a bundle frees in a loaded model, and the time to features: LLaVA-1.5's tower and class.

The tower is CLIP ViT-L/14-336 at full size with random weights, in `LlavaForConditionalGeneration` of transformers with
two layers of a language model as wide as LLaVA-1.5-7B's. FP16 on a GPU, BF16 on a CPU. Prints JSON.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import trtower
from trtower_export.bench.environment import describe_environment
from trtower_export.pipeline import ExportOptions, export_tower
from trtower_export.recipes import find_recipe

ROUNDS = {"cuda": 50, "cpu": 3}
IMAGES = {"cuda": (1, 5, 20), "cpu": (1, 5)}
"""One image, the tiles of one AnyRes image, and the tiles of four."""


def draw_model(dtype: torch.dtype) -> Any:
    """Create the model with random weights in this dtype, the same ones every time."""
    recipe = find_recipe("clip-vit-large-patch14-336")
    assert recipe is not None
    tower = transformers.CLIPVisionConfig(**recipe.config)
    text = transformers.LlamaConfig(num_hidden_layers=2)
    config = transformers.LlavaConfig(vision_config=tower, text_config=text)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    return model


@torch.inference_mode()
def time_features(model: Any, images: int) -> float:
    """Return the median ms of `get_image_features`, including the projector."""
    device = next(model.parameters()).device
    pixel_values = torch.randn(images, 3, 336, 336, device=device, dtype=model.dtype)
    seconds = []
    for _ in range(1 + ROUNDS[device.type]):
        wait(device)
        started = time.perf_counter()
        model.model.get_image_features(pixel_values)
        wait(device)
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds[1:])


def wait(device: torch.device) -> None:
    """Wait until the GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def used_mb(device: torch.device) -> float:
    """Return the GPU memory that is not free, or on a CPU the resident set of this process."""
    if device.type == "cuda":
        wait(device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return (total - free) / 1e6
    return float(psutil.Process().memory_info().rss) / 1e6


def main() -> None:
    """Measure both towers in the same model, one after the other."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, precision = (torch.float16, "fp16") if device.type == "cuda" else (torch.bfloat16, "bf16")
    transformers.logging.set_verbosity_error()
    report: dict[str, Any] = {"environment": describe_environment(device), "precision": precision}
    with tempfile.TemporaryDirectory() as folder:
        draw_model(dtype).model.vision_tower.save_pretrained(f"{folder}/tower")
        options = ExportOptions(precision=precision, flavour="none", check=False)
        export_tower(f"{folder}/tower", Path(f"{folder}/bundle"), options)
        model = draw_model(dtype).to(device)
        report["eager_ms"] = {images: time_features(model, images) for images in IMAGES[device.type]}
        report["used_eager_mb"] = used_mb(device)
        started = time.perf_counter()
        installed = trtower.install(model, f"{folder}/bundle")
        report["install_s"] = time.perf_counter() - started
        report["backend"], report["freed_mb"] = installed.tower.backend, installed.freed / 1e6
        report["used_dropped_mb"] = used_mb(device)
        report["installed_ms"] = {images: time_features(model, images) for images in IMAGES[device.type]}
        report["used_installed_mb"] = used_mb(device)
        installed.tower.close()
        report["used_closed_mb"] = used_mb(device)  # without either tower
        started = time.perf_counter()
        trtower.uninstall(model)
        report["uninstall_s"] = time.perf_counter() - started
        report["used_back_mb"] = used_mb(device)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
