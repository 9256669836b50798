"""Compare tinychat's model classes, as far as they run without its CUDA kernels: eager, built and installed.

Language models only read a prompt here, because decoding needs a kernel. VILA's and NVILA's classes need VILA.
"""

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

args = arguments(vila="a clone of VILA's repository")
stubs_without_cuda.stub_for_vila()
stubs_without_cuda.stub_tinychat_kernels()

import tinychat.utils.constants  # noqa: E402

tinychat.utils.constants.init()
tinychat.utils.constants.max_seq_len = 512

import tinychat.models.llama  # noqa: E402
import tinychat.models.llava_base.llava_arch  # noqa: E402
import tinychat.models.nvila.llava_arch  # noqa: E402
import tinychat.models.vila_llama  # noqa: E402
from llava.model import LlavaLlamaConfig  # noqa: E402
from llava.model.multimodal_encoder.siglip import SiglipVisionModel  # noqa: E402
from llava.utils.tokenizer import tokenize_conversation  # noqa: E402
from made_up import LM_SHAPE, WIDTH, pictures, randomised, write_clip, write_language_model, write_siglip  # noqa: E402
from tinychat.models.llama import LlamaForCausalLM  # noqa: E402
from tinychat.models.llava_llama import LlavaLlamaForCausalLM  # noqa: E402
from tinychat.models.nvila_qwen2 import NVILAQwen2  # noqa: E402
from tinychat.models.vila_llama import VilaLlamaForCausalLM  # noqa: E402
from tinychat.utils.llava_image_processing import process_images  # noqa: E402
from vila_family import write_checkpoint  # noqa: E402

stubs_without_cuda.stub_tinychat_rotary(tinychat.models.llama)

SIZE, PATCH, PATCHES = 56, 14, 16
IMAGE_PATCH = 7
"""The token that tinychat puts in place of a patch."""


def load_llava(tower_folder: Path, select_layer: int, build: Callable[..., Any] | None = None) -> Any:
    """Make tinychat's own LLaVA as `vila10_demo.py` does, with random weights in place of quantised ones."""
    config = transformers.LlamaConfig(vocab_size=400, **LM_SHAPE)
    config.update(
        {
            "mm_vision_tower": str(tower_folder),
            "mm_vision_select_layer": select_layer,
            "mm_hidden_size": WIDTH * (2 if select_layer < -100 else 1),
            "mm_projector_type": "mlp2x_gelu",
            "image_aspect_ratio": "pad",
        }
    )
    module = tinychat.models.llava_base.llava_arch
    with swapped(module, build):
        model = LlavaLlamaForCausalLM(config, "cpu")
    randomised(torch.nn.ModuleList([model.lm_head, model.model.layers, model.model.embed_tokens, model.model.norm]))
    randomised(model.model.mm_projector)
    model = model.half()
    tower = model.get_model().vision_tower
    if not tower.is_loaded:
        tower.load_model()
    tower.half()
    return model.eval()


@torch.inference_mode()
def observe_llava(model: Any) -> Observation:
    tinychat.utils.constants.LLAVA_DEFAULT_IMAGE_PATCH_TOKEN_IDX = IMAGE_PATCH
    observed = {}
    for name, some in (("one picture", pictures()[:1]), ("four pictures", pictures())):
        pixels = process_images(some, model.get_vision_tower().image_processor, model.config).half()
        ids = torch.tensor([[1, 20, *[IMAGE_PATCH] * PATCHES * len(some), 30, 40]])
        observed[f"pixels of {name}"] = pixels
        embeds = model.default_inputs_embeds_for_multimodal(ids, None, pixels)
        observed[f"features among the text of {name}"] = embeds
        observed[f"logits of {name}"] = LlamaForCausalLM.forward(model, None, 0, embeds, quant=False)
        if model.config.mm_vision_select_layer > -100:
            observed[f"features of {name}"] = model.encode_images(pixels)
            ids = torch.tensor([[1, 20, *[-200] * len(some), 30, 40]])
            embeds = model.prepare_inputs_labels_for_multimodal(ids, None, None, None, None, pixels)[4]
            observed[f"logits with a special token of {name}"] = LlamaForCausalLM.forward(
                model, None, 0, embeds, quant=False
            )
    return observed


def load_nvila(checkpoint: Path, build: Callable[..., Any] | None = None) -> Any:
    """Load as `nvila_demo.py` does."""
    config = LlavaLlamaConfig.from_pretrained(checkpoint)
    config.resume_path = str(checkpoint)
    module = tinychat.models.nvila.llava_arch
    with swapped(module, build):
        return NVILAQwen2(config, True).half().eval()


@torch.inference_mode()
def observe_nvila(model: Any) -> Observation:
    observed = {}
    for name, some in (("one picture", pictures()[:1]), ("four pictures", pictures())):
        question = [{"from": "human", "value": [*some, "what is in this picture"]}]
        media, media_config = model.prepare_media(question)
        pixels = torch.stack(media["image"])
        observed[f"pixels of {name}"] = pixels
        ids = tokenize_conversation(question, model.tokenizer, add_generation_prompt=True)[None]
        embeds, _, _ = model._embed(ids, media, media_config, None, None)
        observed[f"features among the text of {name}"] = embeds
        observed[f"logits of {name}"] = model.llm(None, 0, embeds, quant=False)
        if model.config.image_aspect_ratio == "dynamic_s2":
            break
    return observed


def load_vila(checkpoint: Path, build: Callable[..., Any] | None = None) -> Any:
    """Load as `vila15_demo.py` does, up to the weights of the language model."""
    config = LlavaLlamaConfig.from_pretrained(checkpoint)
    config.resume_path = str(checkpoint)
    module = tinychat.models.vila_llama
    with swapped(module, build):
        model = VilaLlamaForCausalLM(config).half()
    randomised(model.llm)
    return model.eval()


@torch.inference_mode()
def observe_vila(model: Any) -> Observation:
    observed = {}
    for name, some in (("one picture", pictures()[:1]), ("four pictures", pictures())):
        pixels = process_images(some, model.get_vision_tower().image_processor, model.config).half()
        observed[f"pixels of {name}"] = pixels
        observed[f"features of {name}"] = model.encode_images(pixels)
        if hasattr(model, "prepare_inputs_labels_for_multimodal"):  # VILA 1.5's code has it, today's VILA does not
            ids = torch.tensor([[1, 20, *[-200] * len(some), 30, 40]])
            observed[f"logits of {name}"] = model(ids, start_pos=0, images=pixels)
    return observed


def run(report: Report, work: Path) -> None:
    clip = write_clip(work / "clip-tower", SIZE, PATCH, num_hidden_layers=14)
    for name, layer, layers in (("llava_base, layer -2", -2, "-2"), ("llava_base, layers -212", -212, "12,-2")):
        bundle = work / f"bundle{layer}"
        with report.attempt(name):
            export(args.trtower, clip, bundle, f"--select-layer={layers}", "--select-feature", "cls_patch")
            eager = partial(load_llava, clip, layer)
            built = partial(load_llava, bundle, layer, trtower.build_vision_tower)
            report.three_ways(name, observe_llava, eager, built, partial(trtower.install, bundle=bundle))
    siglip = write_siglip(work / "siglip", SIZE, PATCH, SiglipVisionModel)
    scales = {
        "dynamic_s2": True,
        "s2_scales": "56,112,168",
        "s2_max_split_size": SIZE,
        "s2_resize_output_to_scale_idx": -1,
    }
    qwen = partial(write_language_model, work / "qwen", transformers.Qwen2Config, transformers.Qwen2ForCausalLM)
    llama = partial(write_language_model, work / "llama", transformers.LlamaConfig, transformers.LlamaForCausalLM)
    for name, language, layout, load, observe in (
        ("nvila", qwen, {"image_aspect_ratio": "resize"}, load_nvila, observe_nvila),
        ("nvila-dynamic-s2", qwen, {"image_aspect_ratio": "dynamic_s2", **scales}, load_nvila, observe_nvila),
        ("vila", llama, {"image_aspect_ratio": "resize"}, load_vila, observe_vila),
    ):
        with report.attempt(name):
            checkpoint = write_checkpoint(work / name, language(), siglip, **layout)
            compare_vila(report, name, checkpoint, load, observe)


def compare_vila(report: Report, name: str, checkpoint: Path, load: Callable[..., Any], observe: Any) -> None:
    bundle = export(args.trtower, checkpoint, checkpoint.parent / f"bundle-{name}")
    built = partial(load, checkpoint, partial(trtower.build_vision_tower, bundle=bundle))
    report.three_ways(name, observe, partial(load, checkpoint), built, partial(trtower.install, bundle=bundle))


if __name__ == "__main__":
    report = Report("tinychat", args.clone, HALF_TOLERANCE)
    report.note_stubs(stubs_without_cuda.describe())
    with tempfile.TemporaryDirectory() as folder:
        run(report, args.work or Path(folder))
    report.finish()
