"""Compare VILA's own loader and model classes, with SigLIP, CLIP and several scales: eager, built and installed."""

import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import stubs_without_cuda
import torch
import transformers
from command_line import arguments, export
from comparing import HALF_TOLERANCE, Observation, Report
from PIL import Image
from swapping import swapped

import trtower

args = arguments()
stubs_without_cuda.stub_for_vila()

import llava  # noqa: E402
import llava.model.llava_arch  # noqa: E402
from llava.mm_utils import process_image, process_images  # noqa: E402
from llava.model import LlavaLlamaConfig, LlavaLlamaModel  # noqa: E402
from llava.model.multimodal_encoder.siglip import SiglipVisionModel  # noqa: E402
from llava.utils.tokenizer import tokenize_conversation  # noqa: E402
from made_up import pictures, write_clip, write_language_model, write_siglip  # noqa: E402
from vila_family import write_checkpoint  # noqa: E402

SIZE, PATCH = 56, 14

SCALES = {"s2_scales": "56,112,168", "s2_max_split_size": SIZE, "mm_projector_cfg": "mlp_downsample"}
LAYOUTS: dict[str, dict[str, Any]] = {
    "vila-siglip": {"image_aspect_ratio": "resize"},
    "vila-clip": {"image_aspect_ratio": "pad", "mm_vision_select_feature": "patch"},
    "vila-tiles": {"image_aspect_ratio": "dynamic", "max_tiles": 6},
    "vila-s2": {"image_aspect_ratio": "resize", "s2": True, **SCALES},
    "vila-dynamic-s2": {
        "image_aspect_ratio": "dynamic_s2",
        "dynamic_s2": True,
        "max_tiles": 12,
        "s2_resize_output_to_scale_idx": -1,
        **SCALES,
    },
}


@torch.inference_mode()
def observe(model: Any, *, projected: bool = False) -> Observation:
    """Run a model on one picture and on all; with ``projected`` call what also runs the projector, not the tower."""
    tower, config = model.get_vision_tower(), model.config
    observed = {}
    images = pictures()
    for name, some in (("one picture", images[:1]), ("four pictures", images)):
        media_config: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        pixels = prepare(model, some, media_config)
        observed[f"pixels of {name}"] = pixels
        if projected:
            observed[f"projected of {name}"] = model.encode_images(pixels)
        elif config.image_aspect_ratio != "dynamic_s2" or len(some) == 1:
            observed[f"features of {name}"] = tower(pixels)
        if not config.dynamic_s2 and not projected:
            listed = tower(list(pixels))
            observed[f"features of {name} in a list"] = torch.cat(listed)
        places = "<image>\n" * (1 if config.dynamic_s2 else len(pixels))
        question = [{"from": "human", "value": f"{places}what is in this picture"}]
        ids = tokenize_conversation(question, model.tokenizer, add_generation_prompt=True)[None]
        media = {"image": list(pixels)}
        observed[f"logits of {name}"] = model(input_ids=ids, media=media, media_config=media_config).logits
        options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
        observed[f"tokens of {name}"] = model.generate(ids, media=media, media_config=media_config, **options)
        how = transformers.GenerationConfig(**options, eos_token_id=model.tokenizer.eos_token_id)
        answer = model.generate_content([*some, "what is in this picture"], how)
        observed[f"text of {name}"] = torch.tensor([ord(letter) for letter in answer])
        if config.dynamic_s2:
            break  # VILA itself merges only the tiles of one picture
    observed["numbers of the tower"] = torch.tensor([tower.hidden_size, tower.num_patches, config.mm_hidden_size])
    return observed


def prepare(model: Any, images: list[Image.Image], media_config: dict[str, dict[str, Any]]) -> torch.Tensor:
    """Prepare pictures as `generate_content` does."""
    config, processor = model.config, model.get_vision_tower().image_processor
    if len(images) > 1 or config.image_aspect_ratio not in ("dynamic", "dynamic_s2"):
        return process_images(images, processor, config).half()
    config.image_processor = processor
    if config.image_aspect_ratio == "dynamic":
        return process_image(images[0], config, None, enable_dynamic_res=True).half()
    if isinstance(config.s2_scales, str):
        config.s2_scales = [int(scale) for scale in config.s2_scales.split(",")]
    pixels, block_sizes = process_image(images[0], config, None, enable_dynamic_s2=True)
    media_config["image"]["block_sizes"] = [block_sizes]
    return pixels.half()


def load(checkpoint: Path, **how: object) -> Any:
    return llava.load(str(checkpoint), **{"device": "cpu", **how})


def load_built(checkpoint: Path, bundle: Path | None = None, **how: object) -> Any:
    """Load with a bundle, without editing the checkpoint; if None, the checkpoint's own tower folder is a bundle."""
    build = partial(trtower.build_vision_tower, bundle=bundle) if bundle else trtower.build_vision_tower
    with swapped(llava.model.llava_arch, build):
        return load(checkpoint, **how)


def load_from_config(checkpoint: Path, bundle: Path | None = None, **how: object) -> Any:
    """Call VILA's `from_pretrained` with a config, which needs a `resume_path` for VILA to find the parts."""
    config = LlavaLlamaConfig.from_pretrained(checkpoint)
    config.resume_path, config.model_dtype = str(checkpoint), "torch.float16"
    with swapped(llava.model.llava_arch, partial(trtower.build_vision_tower, bundle=bundle) if bundle else None):
        return LlavaLlamaModel.from_pretrained(config, **how).eval()


def save_and_load(built: Any, folder: Path) -> Any:
    """Save a model whose built tower has not run yet, and load what was saved."""
    built.save_pretrained(str(folder))
    return load_built(folder)


def run(report: Report, work: Path) -> None:
    language = write_language_model(work / "language", transformers.LlamaConfig, transformers.LlamaForCausalLM)
    towers = {
        "siglip": write_siglip(work / "siglip", SIZE, PATCH, SiglipVisionModel),
        "clip": write_clip(work / "clip", SIZE, PATCH),
    }
    for name, layout in LAYOUTS.items():
        with report.attempt(name):
            tower = towers["clip" if name == "vila-clip" else "siglip"]
            checkpoint = write_checkpoint(work / name, language, tower, **layout)
            bundle = export(args.trtower, checkpoint, work / f"bundle-{name}")
            eager, built = partial(load, checkpoint), partial(load_built, checkpoint, bundle)
            report.three_ways(name, observe, eager, built, partial(trtower.install, bundle=bundle))
            if "s2" not in name:  # whose projectors read the merged map
                bundle = export(args.trtower, checkpoint, work / f"projected-{name}", "--head", "projector")
                report.with_projector(
                    name, partial(observe, projected=True), eager, partial(trtower.install, bundle=bundle)
                )
            with report.attempt(f"{name}, built, saved and loaded"):
                saved = save_and_load(built(), work / f"saved-{name}")
                report.compare(f"{name}, built, saved and loaded", observe(built()), observe(saved), exact=True)
    checkpoint, bundle = work / "vila-siglip", work / "bundle-vila-siglip"
    offloaded: dict[str, Any] = {
        "device_map": "auto",
        "max_memory": {"cpu": 200_000},
        "offload_folder": str(work / "offloaded"),
    }
    for title, how in (("from_pretrained", {}), ("from_pretrained, the rest offloaded to disk", offloaded)):
        with report.attempt(title):
            observed = observe(load_from_config(checkpoint, **how))
            report.compare(f"{title}, built", observed, observe(load_from_config(checkpoint, bundle, **how)))
    patches = write_checkpoint(
        work / "vila-patches", language, towers["siglip"], mm_vision_select_feature="patch", image_aspect_ratio="resize"
    )
    call = partial(load_built, patches, bundle)
    report.expect_error("a feature 'patch' of a tower without a CLS token, built", call, trtower.ConfigError)


if __name__ == "__main__":
    report = Report("VILA", args.clone, HALF_TOLERANCE)
    report.note_stubs(stubs_without_cuda.describe())
    with tempfile.TemporaryDirectory() as folder:
        run(report, args.work or Path(folder))
    report.finish()
