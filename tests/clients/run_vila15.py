"""Compare the model class of VILA's branch vila1.5, up to its language model: eager, built and installed."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import stubs_without_cuda
import torch
import transformers
from command_line import arguments, export
from comparing import HALF_TOLERANCE, Observation, Report
from swapping import swapped

import trtower

args = arguments()
stubs_without_cuda.stub_for_vila()

import llava.model.llava_arch  # noqa: E402
from llava.constants import IMAGE_TOKEN_INDEX  # noqa: E402
from llava.mm_utils import process_images, tokenizer_image_token  # noqa: E402
from llava.model import LlavaLlamaConfig, LlavaLlamaModel  # noqa: E402
from llava.model.multimodal_encoder.siglip import SiglipImageProcessor, SiglipVisionModel  # noqa: E402
from made_up import pictures, write_clip, write_language_model, write_siglip  # noqa: E402
from vila_family import write_checkpoint  # noqa: E402

SIZE, PATCH = 56, 14
PROJECTOR = {
    "mm_projector_cfg": "mlp2x_gelu"
}  # with a current torch, its downsampling fails on what an eager SigLIP returns
SCALES = {"s2": True, "s2_scales": "56,112,168", "s2_max_split_size": SIZE}
LAYOUTS: dict[str, dict[str, Any]] = {
    "siglip": {"image_aspect_ratio": "resize", **PROJECTOR},
    "clip": {"image_aspect_ratio": "pad", "mm_vision_select_feature": "patch", **PROJECTOR},
    "s2": {"image_aspect_ratio": "resize", **SCALES, **PROJECTOR},
}


def load(checkpoint: Path, build: Callable[..., Any] | None = None) -> Any:
    """Make the model as VILA's loader does, which loads a SigLIP tower only on a GPU."""
    config = LlavaLlamaConfig.from_pretrained(checkpoint)
    config.resume_path, config.model_dtype = str(checkpoint), "torch.float16"
    with swapped(llava.model.llava_arch, build):
        return LlavaLlamaModel(config).eval()


@torch.inference_mode()
def observe(model: Any) -> Observation:
    """Observe the inputs of the language model, which itself only runs with flash attention."""
    tower, observed = model.get_vision_tower(), {}
    for name, some in (("one picture", pictures()[:1]), ("four pictures", pictures())):
        pixels = process_images(some, tower.image_processor, model.config).half()
        prompt = "user " + "<image>" * len(some) + " what is in this picture assistant "
        ids = tokenizer_image_token(prompt, model.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
        observed[f"pixels of {name}"] = pixels
        observed[f"features of {name}"] = tower(pixels)
        observed[f"features of {name} in a list"] = torch.cat(tower(list(pixels)))
        embeds = model.prepare_inputs_labels_for_multimodal(ids, None, torch.ones_like(ids), None, None, pixels)[4]
        observed[f"features among the text of {name}"] = embeds
    numbers = (tower.hidden_size, tower.num_patches, model.config.mm_hidden_size)
    observed["numbers of the tower"] = torch.tensor(numbers)
    return observed


def run(report: Report, work: Path) -> None:
    language = write_language_model(work / "language", transformers.LlamaConfig, transformers.LlamaForCausalLM)
    siglip = write_siglip(work / "siglip-tower", SIZE, PATCH, SiglipVisionModel, SiglipImageProcessor)
    clip = write_clip(work / "clip-tower", SIZE, PATCH)
    for name, layout in LAYOUTS.items():
        with report.attempt(name):
            tower = clip if name == "clip" else siglip
            checkpoint = write_checkpoint(work / f"vila-{name}", language, tower, **layout)
            bundle = export(args.trtower, checkpoint, work / f"bundle-{name}")
            named = partial(trtower.build_vision_tower, bundle=bundle)
            eager, built = partial(load, checkpoint), partial(load, checkpoint, named)
            report.three_ways(name, observe, eager, built, partial(trtower.install, bundle=bundle))
            with report.attempt(f"{name}, built, saved and loaded"):
                saved = work / f"saved-{name}"
                built().save_pretrained(str(saved))
                reloaded = observe(load(saved, trtower.build_vision_tower))
                report.compare(f"{name}, built, saved and loaded", observe(built()), reloaded, exact=True)


if __name__ == "__main__":
    report = Report("VILA 1.5", args.clone, HALF_TOLERANCE)
    report.note_stubs(stubs_without_cuda.describe())
    with tempfile.TemporaryDirectory() as folder:
        run(report, args.work or Path(folder))
    report.finish()
