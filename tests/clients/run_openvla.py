"""Compare OpenVLA's own model file: eager, and with a bundle installed of its towers, or of towers and projector."""

import io
import json
import runpy
import shutil
import sys
import tempfile
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import stubs_without_cuda
import torch
from command_line import arguments, export
from comparing import Report
from made_up import pictures, write_tokenizer

import trtower

args = arguments()

stubs_without_cuda.stub_torchvision()

from openvla_family import EXACT, HEADS, Files  # noqa: E402

EXAMPLE = Path(__file__).parents[2] / "examples" / "act_openvla.py"

HALF = 2.0
"""How many times as far from FP32 as OpenVLA's own towers in BF16 an FP16 bundle may be."""

files = Files(args.clone)


@torch.no_grad()
def observe(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Run pictures through OpenVLA's processor and model, up to its actions."""
    pixels = files.prepare(folder, pictures())
    prompt = torch.tensor([[1, 5, 9, 11, 29871]])  # OpenVLA looks for its last token
    actions = [model.predict_action(prompt, pixel_values=each[None], do_sample=False) for each in pixels]
    patches = model.vision_backbone(pixels)
    return {
        "pixels": pixels,
        "projected": model.projector(patches),
        "logits": model(input_ids=prompt.expand(len(pixels), -1), pixel_values=pixels).logits,
        "actions": torch.from_numpy(np.stack(actions)),
    }


@torch.no_grad()
def check_half(report: Report, title: str, folder: Path) -> None:
    """Compare the features of an FP16 bundle with those of OpenVLA's own towers and projector in BF16, its dtype."""
    model, pixels = files.load(folder), files.prepare(folder, pictures())
    features = model.projector(model.vision_backbone(pixels))
    in_half = files.load(folder).to(torch.bfloat16)
    eager = in_half.projector(in_half.vision_backbone(pixels.to(torch.bfloat16))).float()
    bundle = export(
        args.trtower, folder, folder.with_name(f"{folder.name}-half"), *HEADS["projector"], precision="fp16"
    )
    with trtower.install(model, bundle):
        served = model.projector(model.vision_backbone(pixels))
    off, own = (float((each - features).norm() / features.norm()) for each in (served, eager))
    report.check(
        f"{title}, FP16 bundle off by {off:.2g}, OpenVLA in BF16 by {own:.2g}", off <= HALF * own, expected=True
    )


def make_loadable(folder: Path) -> None:
    """Put OpenVLA's files and a tokenizer beside a checkpoint, as on the hub, so that transformers can load it."""
    write_tokenizer(folder)
    for path in files.folder.glob("*_prismatic.py"):
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
    ours = trtower.VisionTower.load(bundle).image_processor(pictures(), return_tensors="pt")["pixel_values"]
    theirs = files.prepare(folder, pictures())[:, -3:]
    report.compare(f"{title}, pixels of the bundle", {"pixels": theirs}, {"pixels": ours}, exact=True)


def main() -> None:
    report = Report("openvla", args.clone, feature_tolerance=EXACT)
    report.tolerances |= {"projected": EXACT, "logits": EXACT}
    report.note_stubs(stubs_without_cuda.describe())
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        for kind, strategy in (("dinosiglip-vit-so-224px", "resize-naive"), ("dinov2-vit-l", "resize-crop")):
            title = f"{kind}, {strategy}"
            with report.attempt(title):
                folder = files.write_checkpoint(work / kind, kind, strategy)
                model = files.load(folder)
                observed = observe(model, folder)
                for head, options in HEADS.items():
                    bundle = export(args.trtower, folder, work / f"{kind}-{head}", *options)
                    check_pixels(report, f"{title}, --head {head}", folder, bundle)
                    with trtower.install(model, bundle):
                        report.compare(f"{title}, --head {head}, installed", observed, observe(model, folder))
                    report.compare(f"{title}, uninstalled", observed, observe(model, folder), exact=True)
                check_half(report, title, folder)
                make_loadable(folder)
                action = run_example(folder, None)
                report.check(f"{title}, {EXAMPLE.name}", run_example(folder, bundle), action)
    report.finish()


main()
