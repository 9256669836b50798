"""Manifests, certificates and evidence made up by hand, to test the code that shows them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trtower.bundle.bundle import Bundle
from trtower.bundle.certificate import BatchFigures, Bound, Certificate, Figures, ImageFigures, LayerFigures
from trtower.bundle.manifest import SCHEMA, FileEntry, Manifest, PlanEntry, Source, TowerCost
from trtower.spec import BY_DTYPE, BatchProfile, TowerSpec
from trtower.tower.image_processor import ImageProcessor
from trtower_export.check.evidence import ImageEvidence

PLAN = "plans/tensorrt-rtx-1.7.1.any.plan"
SIZES = {"tower.onnx": 812345, "tower.onnx.data": 43210987, "config.json": 712, "preprocessor_config.json": 436}
SPEC = TowerSpec(
    family="dinov2", image_size=56, patch_size=14, num_layers=4, num_prefix_tokens=1, width=24, layers=(3,)
)  # 4 x 4 patches
PROCESSOR = ImageProcessor({"size": 56, "crop_size": 56})


def figures(cosine_min: float | None = 0.9994, relative_error: float | None = 1.9e-3, non_finite: int = 0) -> Figures:
    return Figures(
        token_cosine_mean=0.999998,
        token_cosine_min=cosine_min,
        token_error_p999=8.1e-3,
        relative_error=relative_error,
        max_abs_error=0.31,
        non_finite=non_finite,
    )


def bounds(cosine_min: float | None = 0.9994, limit: float = 0.999) -> tuple[Bound, ...]:
    result = []
    for images in ("photograph", "drawn"):
        holds = cosine_min is not None and cosine_min >= limit
        result += [
            Bound(figure="non_finite", images=images, limit=0.0, measured=0.0, holds=True),
            Bound(figure="token_cosine_min", images=images, limit=limit, measured=cosine_min, holds=holds),
            Bound(figure="relative_error", images=images, limit=1e-2, measured=1.9e-3, holds=True),
        ]
    return tuple(result)


def layers(
    errors: Sequence[float | None] = (2e-4, 4e-4, 9e-4, 1.9e-3), image: str = "a.png"
) -> tuple[LayerFigures, ...]:
    return tuple(
        LayerFigures(
            layer=layer,
            bundle=figures(relative_error=error),
            torch=figures(relative_error=error and error * 0.9),
            worst_image=image,
            worst_token=7,
        )
        for layer, error in enumerate(errors)
    )


def certificate(**changes: Any) -> Certificate:
    names = (*SIZES, PLAN)
    values: dict[str, Any] = {
        "ran": "graph",
        "backend": "onnxruntime-cpu",
        "runner": "onnxruntime 1.32.0, CPU",
        "executed": ("tower.onnx", "tower.onnx.data"),
        "files": {name: sha256(name) for name in names},
        "not_run": (PLAN,),
        "reference": "Dinov2Model of transformers 5.23.0, uncut, FP32 on the CPU",
        "images": (ImageFigures(name="a.png", kind="photograph", bundle=figures(), torch=figures()),),
        "images_sha256": sha256("images"),
        "skipped": (),
        "batches": (BatchFigures(batch=1, bundle=figures()), BatchFigures(batch=8, bundle=figures())),
        "as_typed": None,
        "layers": (),
        "bundle": figures(),
        "torch": figures(0.99999, 1.7e-3),
        "bounds": bounds(),
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "gpu": None,
        "machine": "x86_64, 2 threads",
        "date": "2026-11-23",
        **changes,
    }
    values = {"passed": all(bound.holds for bound in values["bounds"]), **values}
    return Certificate(**values)


def manifest(spec: TowerSpec = SPEC, *, random_weights: bool = False, **changes: Any) -> Manifest:
    """Make a manifest with these changes; fields of the certificate are changed in its certificate."""
    of_certificate = {name: changes.pop(name) for name in list(changes) if name in Certificate.__dataclass_fields__}
    precision = str(changes.get("precision", "fp16"))
    values: dict[str, Any] = {
        "schema": SCHEMA,
        "name": "tiny-dinov2",
        "trtower": "1.1.0",
        "spec": spec,
        "full": TowerCost(layers=spec.num_layers, parameters=22_056_576, flop=60_400_000_000),
        "cut": TowerCost(layers=spec.depth, parameters=20_300_000, flop=55_300_000_000),
        "source": Source(
            checkpoint="facebook/dinov2-small",
            revision=None,
            weights_sha256={name: sha256(f"weights in {name}") for name in BY_DTYPE},
            random_weights=random_weights,
        ),
        "precision": precision,
        "keep_fp32": (),
        "calibration": None,
        "input": spec.input(precision),
        "output": spec.output(precision),
        "profiles": (BatchProfile(min=1, opt=4, max=8),),
        "files": {name: FileEntry(sha256=sha256(name), size=size) for name, size in {**SIZES, PLAN: 45012345}.items()},
        "plans": (
            PlanEntry(
                file=PLAN, flavour="tensorrt-rtx", version="1.7.1", platform="linux_x86_64", compute_capabilities=()
            ),
        ),
        "versions": {"torch": "2.13.0", "onnx": "1.22.0"},
        "certificates": (certificate(**of_certificate),),
        "first_tensorrt": "10.3",
        **changes,
    }
    return Manifest(**values)


def bundle(spec: TowerSpec = SPEC, **changes: Any) -> Bundle:
    """Make a bundle that exists only in memory."""
    return Bundle(Path("engines/tiny-dinov2"), manifest(spec, **changes))


def evidence(
    name: str = "a.png", *, error: float = 1e-3, spec: TowerSpec = SPEC, kind: str = "photograph", seed: int = 0
) -> ImageEvidence:
    """Make up tokens, with noise of size ``error`` on the bundle's."""
    generator = torch.Generator().manual_seed(seed)
    shape = (spec.num_tokens, spec.hidden_size)
    reference = torch.randn(shape, generator=generator)

    def noisy(scale: float) -> Tensor:
        return reference + scale * torch.randn(shape, generator=generator)

    return ImageEvidence(
        name=name,
        kind=kind,
        pixel_values=torch.randn(3, spec.image_size, spec.image_size, generator=generator) / 2,
        reference=reference,
        bundle=noisy(error),
        torch=noisy(error * 0.8),
    )


def sha256(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()
