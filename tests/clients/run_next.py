"""Compare LLaVA-NeXT's own loader and model classes, with CLIP and OneVision's SigLIP: eager, built, installed."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from command_line import arguments, export
from comparing import Observation, Report
from made_up import LM_SHAPE, WIDTH, pictures, randomised, write_clip, write_in_hub_cache, write_siglip, write_tokenizer
from swapping import swapped

import trtower

args = arguments()

import llava.model.llava_arch  # noqa: E402
import llava_family  # noqa: E402
from llava.model.builder import load_pretrained_model  # noqa: E402
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM  # noqa: E402
from llava.model.language_model.llava_qwen import LlavaQwenConfig, LlavaQwenForCausalLM  # noqa: E402
from llava_family import Loaded, install  # noqa: E402

CLIP_SIZE, CLIP_PATCH = 56, 14
SIGLIP_SIZE, SIGLIP_PATCH = 384, 14  # NeXT's SigLIP wrapper accepts no others

ANYRES: dict[str, Any] = {
    "image_aspect_ratio": "anyres",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[112, 56], [56, 112], [112, 112]],
}
ONEVISION: dict[str, Any] = {
    "image_aspect_ratio": "anyres_max_4",
    "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": "(1x1),...,(3x3)",
    "unfreeze_mm_vision_tower": True,
    "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
}
CLIP_LAYOUTS: dict[str, dict[str, Any]] = {
    "llava-v1.5-pad": {"image_aspect_ratio": "pad", "delay_load": True},
    "llava-llama-anyres": ANYRES,
    "llava-llama-slicefour": ANYRES | {"mm_vision_select_feature": "slicefour_patch", "mm_hidden_size": 4 * WIDTH},
    "llava-llama-cls_patch": {"image_aspect_ratio": "pad", "mm_vision_select_feature": "cls_patch"},
    "llava-llama-s2": {"image_aspect_ratio": "pad", "s2": True, "s2_scales": "56,112", "mm_hidden_size": 2 * WIDTH},
}
OFFLOADED = ("llava-llama-anyres", "llava-onevision-qwen")

SIGLIP_LAYOUTS: dict[str, dict[str, Any]] = {
    "llava-onevision-qwen": ONEVISION,
    "llava-siglip-qwen-pad": ONEVISION | {"image_aspect_ratio": "pad"},
}


def write_checkpoint(folder: Path, config_class: Any, model_class: Any, tower_name: str, **layout: Any) -> Path:
    """Save a small checkpoint of NeXT, which contains its tower's weights unless the tower is loaded later."""
    tokenizer = write_tokenizer(folder)
    config = config_class(
        vocab_size=len(tokenizer),
        mm_hidden_size=WIDTH,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_use_im_patch_token=False,
        **LM_SHAPE,
    )
    config.update({"mm_vision_tower": tower_name, **layout})
    model = model_class(config)
    tower = model.get_vision_tower()
    weights = tower.vision_tower.state_dict() if tower.is_loaded else {}
    weights = {name: weight.clone() for name, weight in weights.items()}
    randomised(model)
    if weights:
        tower.vision_tower.load_state_dict(weights)
    model.half().save_pretrained(folder, safe_serialization=True)
    return folder


def load(checkpoint: Path, **how: Any) -> Loaded:
    """Call NeXT's loader without flash attention, its default."""
    return load_pretrained_model(str(checkpoint), None, checkpoint.name, attn_implementation="sdpa", **how)


def load_built(checkpoint: Path, bundle: Path, **how: Any) -> Loaded:
    """Name the bundle through NeXT's `overwrite_config`; NeXT's towers count a CLS token that they keep."""
    with swapped(llava.model.llava_arch, partial(trtower.build_vision_tower, count_cls=True)):
        return load(checkpoint, overwrite_config={"mm_vision_tower": str(bundle)}, **how)


def run(report: Report, work: Path) -> None:
    # slicefour reads four layers, and needs at least seven
    clip = write_clip(work / "clip-tower", CLIP_SIZE, CLIP_PATCH, num_hidden_layers=7)
    observe = partial(llava_family.observe, images=pictures())
    for name, layout in CLIP_LAYOUTS.items():
        with report.attempt(name):
            checkpoint = write_checkpoint(work / name, LlavaConfig, LlavaLlamaForCausalLM, str(clip), **layout)
            compare(report, checkpoint, observe)
    siglip = write_in_hub_cache(
        "made-up/siglip-384", partial(write_siglip, image_size=SIGLIP_SIZE, patch_size=SIGLIP_PATCH)
    )
    # NeXT's wrapper always reports so400m's width, and fails on a list of pictures
    numbers = ("num_patches", "num_patches_per_side")
    observe = partial(llava_family.observe, images=pictures(scale=4)[:2], numbers=numbers, lists=False)
    for name, layout in SIGLIP_LAYOUTS.items():
        with report.attempt(name):
            checkpoint = write_checkpoint(work / name, LlavaQwenConfig, LlavaQwenForCausalLM, siglip, **layout)
            compare(report, checkpoint, observe)
    name_the_bundle(report, work)


def compare(report: Report, checkpoint: Path, observe: Callable[..., Observation]) -> None:
    bundle = export(args.trtower, checkpoint, checkpoint.parent / f"bundle-{checkpoint.name}")
    eager, built = partial(load, checkpoint), partial(load_built, checkpoint, bundle)
    report.three_ways(checkpoint.name, observe, eager, built, partial(install, bundle=bundle))
    if checkpoint.name != "llava-llama-s2":  # whose projector reads the merged map
        projected = checkpoint.parent / f"projected-{checkpoint.name}"
        export(args.trtower, checkpoint, projected, "--head", "projector")
        report.with_projector(
            checkpoint.name, partial(observe, projected=True), eager, partial(install, bundle=projected)
        )
    if checkpoint.name in OFFLOADED:
        # from_pretrained leaves an offloaded eager tower on the meta device, where it cannot be called
        folder = str(checkpoint.parent / "offloaded")
        how: dict[str, Any] = {"max_memory": {"cpu": 700_000}, "offload_folder": folder}
        title = f"{checkpoint.name}, offloaded to disk"
        with report.attempt(f"{title}, built"):
            report.compare(f"{title}, built", observe(eager()), observe(built(**how)))
        with report.attempt(f"{title}, installed"):
            call = partial(install, eager(**how), bundle)
            report.expect_error(f"{title}, installed", call, trtower.ConfigError)


def name_the_bundle(report: Report, work: Path) -> None:
    """Name a bundle to the loader. NeXT passes it to the config only if it does not make its own."""
    title = "the bundle named to the loader"
    accepts, refuses = "llava-siglip-qwen-pad", "llava-llama-anyres"
    named = {
        name: partial(load, work / name, mm_vision_tower=str(work / f"bundle-{name}")) for name in (accepts, refuses)
    }
    with swapped(llava.model.llava_arch), report.attempt(f"{accepts}, {title}"):
        tower = named[accepts]()[1].get_vision_tower()
        report.check(f"{accepts}, {title}", type(tower), trtower.CLIPVisionTower)
        report.expect_error(f"{refuses}, {title}", named[refuses], TypeError)


if __name__ == "__main__":
    report = Report("LLaVA-NeXT", args.clone)
    report.note_stubs([])
    with tempfile.TemporaryDirectory() as folder:
        run(report, args.work or Path(folder))
    report.finish()
