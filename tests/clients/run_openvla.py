"""Compare OpenVLA's own model file: eager, and with a bundle installed of its towers, or of towers and projector.

The names of timm's ViTs fix their sizes, so they are the smallest DINOv2 there is, and SigLIP's so400m, which is the
only one with the same patches. The language model is small.
"""

import importlib
import io
import json
import runpy
import shutil
import sys
import tempfile
import types
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import stubs_without_cuda
import torch
from command_line import arguments, export
from comparing import Report
from made_up import LM_SHAPE, pictures, write_tokenizer

import trtower

args = arguments()

stubs_without_cuda.stub_torchvision()

EXAMPLE = Path(__file__).parents[2] / "examples" / "act_openvla.py"
SIDE, ACTIONS, VOCABULARY = 56, 7, 32064
DINOV2, SIGLIP = "vit_small_patch14_reg4_dinov2", "vit_so400m_patch14_siglip_224"
KINDS = {"dinosiglip-vit-so-224px": [DINOV2, SIGLIP], "dinov2-vit-l": [DINOV2]}
"""OpenVLA's names for towers, and what has their places here."""

HEADS: dict[str, list[str]] = {"none": [], "projector": ["--head", "projector"]}

EXACT = 1e-5
"""Relative to the largest feature, in FP32."""


def load_files() -> tuple[Any, Any, Any]:
    """Import OpenVLA's three files as transformers does, without the package around them, which is for training."""
    package = types.ModuleType("openvla_files")
    package.__path__ = [str(args.clone / "prismatic" / "extern" / "hf")]
    sys.modules["openvla_files"] = package
    names = ("configuration", "modeling", "processing")
    configuration, modeling, processing = (importlib.import_module(f"openvla_files.{name}_prismatic") for name in names)
    return configuration, modeling, processing


configuration, modeling, processing = load_files()


def write_checkpoint(folder: Path, kind: str, strategy: str) -> Path:
    """Save a small OpenVLA with random weights, and its processor."""
    configuration.VISION_BACKBONE_TO_TIMM_ID[kind] = KINDS[kind]
    configuration.VISION_BACKBONE_TO_RESOLUTION[kind] = [SIDE] * len(KINDS[kind])
    config = configuration.OpenVLAConfig(
        vision_backbone_id=kind,
        llm_backbone_id="llama2-7b-pure",
        image_resize_strategy=strategy,
        text_config={**LM_SHAPE, "vocab_size": VOCABULARY},
        norm_stats={"made_up": {"action": {"q01": [-1.0] * ACTIONS, "q99": [1.0] * ACTIONS}}},
    )
    model = modeling.OpenVLAForActionPrediction(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        spread = min(0.2, parameter[0].numel() ** -0.5) if parameter.ndim > 1 else 0.1
        drawn = torch.randn(parameter.shape, generator=generator) * spread
        ones = name.endswith(("weight", "scale_factor")) and parameter.ndim == 1
        parameter.data = drawn + 1 if ones else drawn
    model.save_pretrained(folder)
    colours = [([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ([0.5] * 3, [0.5] * 3)][: len(KINDS[kind])]
    processing.PrismaticImageProcessor(
        use_fused_vision_backbone=len(KINDS[kind]) == 2,
        image_resize_strategy=strategy,
        input_sizes=[(3, SIDE, SIDE)] * len(KINDS[kind]),
        interpolations=["bicubic"] * len(KINDS[kind]),
        means=[mean for mean, _ in colours],
        stds=[std for _, std in colours],
    ).save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    """Load a checkpoint with OpenVLA's own class."""
    return modeling.OpenVLAForActionPrediction.from_pretrained(folder, torch_dtype=torch.float32).eval()


@torch.no_grad()
def observe(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Run pictures through OpenVLA's processor and model, up to its actions."""
    pixels = processing.PrismaticImageProcessor.from_pretrained(folder)(pictures(), return_tensors="pt")["pixel_values"]
    prompt = torch.tensor([[1, 5, 9, 11, 29871]])  # OpenVLA looks for its last token
    actions = [model.predict_action(prompt, pixel_values=each[None], do_sample=False) for each in pixels]
    patches = model.vision_backbone(pixels)
    return {
        "pixels": pixels,
        "projected": model.projector(patches),
        "logits": model(input_ids=prompt.expand(len(pixels), -1), pixel_values=pixels).logits,
        "actions": torch.from_numpy(np.stack(actions)),
    }


def make_loadable(folder: Path) -> None:
    """Put OpenVLA's files and a tokenizer beside a checkpoint, as on the hub, so that transformers can load it."""
    write_tokenizer(folder)
    for path in (args.clone / "prismatic" / "extern" / "hf").glob("*_prismatic.py"):
        shutil.copy(path, folder)
    policy, images = "modeling_prismatic.OpenVLAForActionPrediction", "processing_prismatic.PrismaticImageProcessor"
    classes = {
        "config.json": {"AutoConfig": "configuration_prismatic.OpenVLAConfig", "AutoModelForVision2Seq": policy},
        "preprocessor_config.json": {
            "AutoImageProcessor": images,
            "AutoProcessor": "processing_prismatic.PrismaticProcessor",
        },
    }
    for name, auto_map in classes.items():
        written = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(written | {"auto_map": auto_map}))


def run_example(folder: Path, bundle: Path | None) -> str:
    """Run the example on a picture, without a bundle if there is none; return the action that it prints."""
    picture, printed = folder / "frame.png", io.StringIO()
    pictures()[0].save(picture)
    sys.argv = [str(EXAMPLE), str(folder), str(bundle), str(picture), "pick up the square", "made_up"]
    without = nullcontext() if bundle else patch.object(trtower, "install")
    with redirect_stdout(printed), without:
        runpy.run_path(str(EXAMPLE))
    return printed.getvalue().splitlines()[-1]


def check_pixels(report: Report, title: str, folder: Path, bundle: Path) -> None:
    """Compare the pixels of the bundle's processor with those that OpenVLA's makes for the last tower."""
    theirs = processing.PrismaticImageProcessor.from_pretrained(folder)(pictures(), return_tensors="pt")["pixel_values"]
    ours = trtower.VisionTower.load(bundle).image_processor(pictures(), return_tensors="pt")["pixel_values"]
    report.compare(f"{title}, pixels of the bundle", {"pixels": theirs[:, -3:]}, {"pixels": ours}, exact=True)


def main() -> None:
    report = Report("openvla", args.clone, feature_tolerance=EXACT)
    report.tolerances |= {"projected": EXACT, "logits": EXACT}
    report.note_stubs(stubs_without_cuda.describe())
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        for kind, strategy in (("dinosiglip-vit-so-224px", "resize-naive"), ("dinov2-vit-l", "resize-crop")):
            title = f"{kind}, {strategy}"
            with report.attempt(title):
                folder = write_checkpoint(work / kind, kind, strategy)
                model = load(folder)
                observed = observe(model, folder)
                for head in ("none", "projector"):
                    bundle = export(args.trtower, folder, work / f"{kind}-{head}", *HEADS[head])
                    check_pixels(report, f"{title}, --head {head}", folder, bundle)
                    with trtower.install(model, bundle):
                        report.compare(f"{title}, --head {head}, installed", observed, observe(model, folder))
                    report.compare(f"{title}, uninstalled", observed, observe(model, folder), exact=True)
                make_loadable(folder)
                action = run_example(folder, None)
                report.check(f"{title}, {EXAMPLE.name}", run_example(folder, bundle), action)
    report.finish()


main()
