"""Compare the towers of OpenVLA-OFT's model file, which takes several pictures at a time: eager, and with a bundle.

Its language model needs a fork of transformers, and is not run.
"""

import tempfile
from pathlib import Path
from typing import Any

import stubs_without_cuda
import torch
from command_line import arguments, export
from comparing import Report
from made_up import pictures

import trtower

args = arguments()

stubs_without_cuda.stub_torchvision()

from openvla_family import EXACT, HEADS, Files  # noqa: E402

KIND = "dinosiglip-vit-so-224px"
CAMERAS = 2

files = Files(args.clone)


@torch.no_grad()
def observe(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    """Run pictures through the model up to its language model, as many at a time as it takes."""
    pixels = files.prepare(folder, pictures())
    number = model.vision_backbone.get_num_images_in_input()
    together = pixels.reshape(len(pixels) // number, -1, *pixels.shape[2:])
    return {
        "projected": model._process_vision_features(together, None, use_film=False),
        "patches": torch.tensor(model.vision_backbone.get_num_patches()),
    }


def main() -> None:
    report = Report("openvla-oft", args.clone)
    report.tolerances |= {"projected": EXACT}
    report.note_stubs(stubs_without_cuda.describe())
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        folder = files.write_checkpoint(work / KIND, KIND, "resize-naive")
        model = files.load(folder)
        for head, options in HEADS.items():
            bundle = export(args.trtower, folder, work / f"{KIND}-{head}", *options, "--batch", f"1,{CAMERAS},4")
            for number in (1, CAMERAS):
                title = f"{number} at a time, --head {head}"
                with report.attempt(title):
                    model.vision_backbone.set_num_images_in_input(number)
                    observed, calls = observe(model, folder), list[int]()
                    with trtower.install(model, bundle) as installation:
                        installation.tower.on_batch = lambda batch, calls=calls: calls.append(batch.batch)
                        report.compare(f"{title}, installed", observed, observe(model, folder))
                    report.check(f"{title}, images of an engine call", calls, [len(pictures())])
                    report.compare(f"{title}, uninstalled", observed, observe(model, folder), exact=True)
    report.finish()


main()
