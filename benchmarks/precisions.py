"""Export the demo's pretrained ViT-S/14 in every precision, and print size and fidelity: `make precisions`.

The photographs are from scikit-image's wheel. FP8 and INT8 are calibrated on the same images that they are checked on,
so their figures are the best case. Each bundle is checked on every backend that can run it on this machine.
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
    "int8, all": {"precision": "int8", "keep_fp16": ()},
}
"""By default INT8 keeps layers that an activation feeds in FP16."""

LIMIT = int(sys.argv[1]) if len(sys.argv) > 1 else None

with TemporaryDirectory() as folder:
    with quiet_transformers():
        source = str(write_checkpoint(Path(folder, "vit-s")))
    print("precision  graph MB  plan MB  cosine, mean  worst    relative error  PyTorch's own  bounds  checked on")
    for name, choice in CHOICES.items():
        options = ExportOptions(**choice, profiles=(BatchProfile(min=1, opt=4, max=8),), check=False)
        bundle = export_tower(source, Path(folder, name), options)
        photographs = load_photographs(None, limit=LIMIT)
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
                f"{name:<9}  {graph:8.1f}  {plan:7.1f}  {figures.token_cosine_mean:12.6f}"
                f"  {figures.token_cosine_min:.5f}  {figures.relative_error:14.2e}  {own:>13}"
                f"  {'hold' if certificate.passed else 'missed'}  {certificate.runner}",
                flush=True,
            )
