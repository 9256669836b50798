"""Export the demo's pretrained ViT-S/14 in every precision, and print size and fidelity: `make precisions`.

The photographs are from scikit-image's wheel. Each bundle is checked on every backend that can run it on this machine.
FP8 and INT8 are calibrated on the same images that they are checked on; in the rows "halves" on every other image, and
checked on the rest.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from trtower.bundle.manifest import GRAPH_DATA
from trtower.runners.choose import candidates
from trtower.spec import BatchProfile
from trtower_export.check.certify import check_bundle
from trtower_export.check.photographs import load_photographs
from trtower_export.checkpoint.checkpoint import open_checkpoint, quiet_transformers
from trtower_export.console import LoggedProgress
from trtower_export.demo.pretrained import write_checkpoint
from trtower_export.pipeline import ExportOptions, export_tower

CHOICES: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "fp16": {},
    "bf16": {"precision": "bf16"},
    "fp8": {"precision": "fp8"},
    "int8": {"precision": "int8"},
    "int8, fc2 in fp16": {"precision": "int8", "keep_fp16": ("layers.*.mlp.fc2",)},
    "fp8, halves": {"precision": "fp8"},
    "int8, halves": {"precision": "int8"},
    "int8, halves, fc2 in fp16": {"precision": "int8", "keep_fp16": ("layers.*.mlp.fc2",)},
}

LIMIT = int(sys.argv[1]) if len(sys.argv) > 1 else None

with TemporaryDirectory() as folder:
    with quiet_transformers():
        source = str(write_checkpoint(Path(folder, "vit-s")))
    for number, photograph in enumerate(load_photographs(None, limit=LIMIT).images):
        half = Path(folder, "halves", str(number % 2))
        half.mkdir(parents=True, exist_ok=True)
        photograph.image.save(half / f"{number:02}.png")
    print(f"{'precision':<25}  graph MB  plan MB  cosine, mean  worst    relative error  PyTorch's own  bounds  runner")
    for name, choice in CHOICES.items():
        seen, judged = (Path(folder, "halves", part) if "halves" in name else None for part in "01")
        options = ExportOptions(**choice, profiles=(BatchProfile(min=1, opt=4, max=8),), images=seen, check=False)
        bundle = export_tower(source, Path(folder, name), options)
        photographs = load_photographs(judged, limit=LIMIT)
        here = [each.backend for each in candidates(bundle) if not each.obstacle]
        for backend in [*here, *(["emulated-bf16"] if name == "bf16" else [])]:
            checkpoint = open_checkpoint(source)
            bundle = check_bundle(bundle, checkpoint, photographs, LoggedProgress(), quick=True, backend=backend)
            manifest, certificate = bundle.manifest, bundle.manifest.certificate
            assert certificate
            assert certificate.torch
            graph, plan = (manifest.files[name].size / 1e6 for name in (GRAPH_DATA, manifest.plans[0].file))
            figures = certificate.bundle
            own = "exact" if certificate.torch.relative_error == 0 else f"{certificate.torch.relative_error:.2e}"
            print(
                f"{name:<25}  {graph:8.1f}  {plan:7.1f}  {figures.token_cosine_mean:12.6f}"
                f"  {figures.token_cosine_min:.5f}  {figures.relative_error:14.2e}  {own:>13}"
                f"  {'hold' if certificate.passed else 'missed'}  {certificate.runner}",
                flush=True,
            )
