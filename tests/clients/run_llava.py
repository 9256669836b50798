"""Compare LLaVA's own loader and model classes: eager, with a built tower, and with a bundle installed."""

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from command_line import arguments, export
from comparing import Report
from made_up import LM_SHAPE, WIDTH, pictures, randomised, write_clip, write_tokenizer
from swapping import swapped

import trtower

args = arguments()

import llava.model.llava_arch  # noqa: E402
import llava_family  # noqa: E402
from llava.model.builder import load_pretrained_model  # noqa: E402
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM  # noqa: E402
from llava_family import Loaded, install  # noqa: E402

SIZE, PATCH = 56, 14

observe = partial(llava_family.observe, images=pictures())

LAYOUTS: dict[str, dict[str, Any]] = {
    "pad": {"image_aspect_ratio": "pad"},
    "anyres": {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": [[112, 56], [56, 112], [112, 112]],
    },
    "cls_patch": {"mm_vision_select_feature": "cls_patch", "mm_vision_select_layer": -1},
    "s2": {"s2": True, "s2_scales": "56,112,168", "mm_hidden_size": 3 * WIDTH},
}
WAYS: dict[str, dict[str, Any]] = {
    "device='cpu'": {"device": "cpu"},
    "device_map='auto'": {},
    "offloaded to disk": {"max_memory": {"cpu": 700_000}},
}


def write_checkpoint(folder: Path, tower: Path, **layout: Any) -> Path:
    """Save a small LLaVA checkpoint, which names its tower but does not contain it."""
    tokenizer = write_tokenizer(folder)
    config = LlavaConfig(
        vocab_size=len(tokenizer),
        mm_hidden_size=WIDTH,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        mm_use_im_patch_token=False,
        **LM_SHAPE,
    )
    config.update({"mm_vision_tower": str(tower), **layout})
    model = randomised(LlavaLlamaForCausalLM(config)).half()
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def load(checkpoint: Path, **how: Any) -> Loaded:
    """Call LLaVA's loader as its scripts do. It tells kinds of checkpoints apart by name."""
    return load_pretrained_model(str(checkpoint), how.pop("model_base", None), checkpoint.name, **how)


def load_built(checkpoint: Path, build: Callable[..., Any] = trtower.build_vision_tower, **how: Any) -> Loaded:
    with swapped(llava.model.llava_arch, build):
        return load(checkpoint, **how)


def naming(checkpoint: Path, bundle: Path) -> Path:
    """Copy a checkpoint, and put a bundle in place of the tower in its config."""
    edited = checkpoint.with_name(f"{checkpoint.name}-edited")
    shutil.copytree(checkpoint, edited, dirs_exist_ok=True)
    config = LlavaConfig.from_pretrained(checkpoint)
    config.mm_vision_tower = str(bundle)
    config.save_pretrained(edited)
    return edited


def load_split(checkpoint: Path, tower_device: str, **how: Any) -> Loaded:
    """Load with a custom device map, which LLaVA's loader cannot do: it passes the whole map to the tower's `to`."""
    places = dict.fromkeys(("embed_tokens", "layers.0", "norm"), "cpu") | dict.fromkeys(
        ("layers.1", "mm_projector"), "disk"
    )
    device_map = {f"model.{name}": place for name, place in places.items()}
    device_map |= {"model.vision_tower": tower_device, "lm_head": "disk"}
    model = LlavaLlamaForCausalLM.from_pretrained(
        checkpoint,
        device_map=device_map,
        torch_dtype=torch.float16,
        offload_folder=checkpoint.parent / f"offloaded-{tower_device}",
        **how,
    )
    tower = model.get_vision_tower()
    if not tower.is_loaded:
        tower.load_model()
    return transformers.AutoTokenizer.from_pretrained(checkpoint, use_fast=False), model, tower.image_processor, None


def write_parts(checkpoint: Path) -> tuple[Path, Path, Path]:
    """Split a LLaVA checkpoint into a base language model, a projector and a LoRA, as LLaVA's training saves them."""
    model = LlavaLlamaForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.float16)
    base, projector, lora = (checkpoint.parent / name for name in ("base", "llava-projector", "llava-lora"))
    weights = model.state_dict()
    ours = {name: weight for name, weight in weights.items() if "mm_projector" in name}
    language = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**model.config.to_dict() | {"model_type": "llama"})
    )
    language.load_state_dict({name: weight for name, weight in weights.items() if name not in ours})
    language.half().save_pretrained(base)
    for folder in (base, projector, lora):
        write_tokenizer(folder)
    for folder in (projector, lora):
        model.config.save_pretrained(folder)
    torch.save(ours, projector / "mm_projector.bin")
    torch.save({f"base_model.model.{name}": weight for name, weight in ours.items()}, lora / "non_lora_trainables.bin")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    randomised(adapted)
    adapted.save_pretrained(str(lora))
    return base, projector, lora


def run(report: Report, work: Path) -> None:
    tower = write_clip(work / "clip-tower", SIZE, PATCH)
    for name, layout in LAYOUTS.items():
        checkpoint = write_checkpoint(work / f"llava-{name}", tower, **layout)
        bundle = export(args.trtower, checkpoint, work / f"bundle-{name}")
        edited = naming(checkpoint, bundle)
        for way, how in WAYS.items() if name == "pad" else [*WAYS.items()][:1]:
            how = how | ({"offload_folder": str(work / "offloaded")} if "max_memory" in how else {})
            eager, built = partial(load, checkpoint, **how), partial(load_built, edited, **how)
            report.three_ways(f"{name}, {way}", observe, eager, built, partial(install, bundle=bundle))
        if name != "s2":  # whose projector reads the merged map
            bundle = export(args.trtower, checkpoint, work / f"projected-{name}", "--head", "projector")
            eager = partial(load, checkpoint, device="cpu")
            report.with_projector(name, partial(observe, projected=True), eager, partial(install, bundle=bundle))
    checkpoint, bundle = work / "llava-pad", work / "bundle-pad"
    for place in ("cpu", "disk"):
        eager, built = (
            partial(load_split, checkpoint, place),
            partial(load_built_split, work / "llava-pad-edited", place),
        )
        title = f"pad, a map with the tower on {place}"
        report.three_ways(title, observe, eager, built, partial(install, bundle=bundle))
    name_the_bundle(report, checkpoint, bundle)


def load_built_split(checkpoint: Path, place: str) -> Loaded:
    with swapped(llava.model.llava_arch):
        return load_split(checkpoint, place)


def name_the_bundle(report: Report, checkpoint: Path, bundle: Path) -> None:
    """Name a bundle without editing a config: to the loader if it accepts one, else to the constructor."""
    observed = observe(load(checkpoint, device="cpu"))
    how: dict[str, Any] = {"device": "cpu", "mm_vision_tower": str(bundle)}
    with report.attempt("the bundle named to the loader"):
        report.compare("the bundle named to the loader", observed, observe(load_built(checkpoint, **how)))
    named = partial(trtower.build_vision_tower, bundle=bundle)
    with report.attempt("the bundle named to the constructor"):
        report.compare(
            "the bundle named to the constructor", observed, observe(load_built(checkpoint, named, device="cpu"))
        )
    base, *parts = write_parts(checkpoint)
    for part in parts:
        title = f"{part.name} on a base"
        call = partial(load_built, part, model_base=str(base), **how)
        report.expect_error(f"{title}, the bundle named to the loader", call, TypeError)
        report.three_ways(
            f"{title}, the bundle named to the constructor",
            observe,
            partial(load, part, model_base=str(base), device="cpu"),
            partial(load_built, part, named, model_base=str(base), device="cpu"),
            partial(install, bundle=bundle),
        )


if __name__ == "__main__":
    report = Report("LLaVA", args.clone)
    report.note_stubs([])
    with tempfile.TemporaryDirectory() as folder:
        run(report, args.work or Path(folder))
    report.finish()
