"""Run a bundle and the full, uncut PyTorch tower on the same images, and write down how far they are apart.

The reference is transformers' own forward pass in FP32 with every layer in place, so a tower cut one layer off,
or traced wrongly, cannot agree with it by construction. PyTorch in the bundle's own precision runs beside it:
its error is what the eager tower that is being replaced makes, and the bundle is judged against that.
"""

import copy
import datetime
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers
from torch import Tensor, nn

from trtower.bundle import PREPROCESSOR, Bundle
from trtower.errors import CheckpointError
from trtower.image_processor import ImageProcessor
from trtower.manifest import Bound, Certificate, Figures, ImageFigures, Manifest
from trtower.runners import Runner
from trtower.runners.choose import candidates, choose
from trtower_export.checkpoint import Checkpoint
from trtower_export.emulation import EMULATED_BF16, open_emulated
from trtower_export.photographs import Photographs
from trtower_export.progress import Progress
from trtower_export.truncate import truncate, weights_sha256

TOKEN_COSINE_MIN = {"fp32": 0.99999, "fp16": 0.999, "bf16": 0.99}
"""The worst token of any image. PyTorch's own FP16 and BF16 leave 0.99998 and 0.9990 on a pretrained ViT-S/14;
a random ViT-B/32 cut one layer off leaves 0.983, with a relative error of 0.17."""

RELATIVE_ERROR = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
"""Over all images: about five times what PyTorch's own FP16 (1.7e-3) and BF16 (1.3e-2) make on that ViT."""

RATIO_TO_TORCH = 3.0
"""The relative error over PyTorch's own in the same precision. ONNX Runtime's FP16 measured 0.36 (random
ViT-L/14-336) and 1.16 (pretrained ViT-S/14). In FP32 PyTorch's own error is zero, and there is no ratio."""

Comparison = Callable[[str, Tensor, Tensor, Tensor], None]
"""Takes an image's name, its pixel_values (3, S, S), and its tokens (P + N, D) from PyTorch and the bundle, in FP32."""


def certify(
    bundle: Bundle,
    checkpoint: Checkpoint,
    photographs: Photographs,
    *,
    backend: str = "auto",
    progress: Progress,
    compare: Comparison | None = None,
) -> Certificate:
    """Check ``bundle`` on ``photographs``; the result passes or not, and is not yet written anywhere.

    ``compare`` is given what each image was and what became of it, such as for a picture.
    Raises BackendError where nothing here can run the bundle, and CheckpointError where ``checkpoint`` has other
    weights than the bundle.
    """
    manifest = bundle.manifest
    spec = manifest.spec
    runner = _open(bundle, backend)
    with progress.step("Load PyTorch's tower"):
        model = checkpoint.load_model(spec)
        torch_tower = copy.deepcopy(truncate(model, checkpoint.family, spec))
        _check_weights(torch_tower, manifest, checkpoint.source)
        torch_tower.to(runner.device, runner.dtype)
    processor = ImageProcessor.from_file(bundle.verify(PREPROCESSOR))
    total = {"bundle": Sums(), "torch": Sums()}
    rows = []
    with progress.step(f"Compare on {len(photographs.images)} images") as step, torch.no_grad():
        for index, photograph in enumerate(photographs.images):
            step.update(index / len(photographs.images), photograph.name)
            pixel_values = processor.preprocess(photograph.image, return_tensors="pt")["pixel_values"]
            states = checkpoint.family.read_states(model, pixel_values)
            reference = torch.cat([states[layer] for layer in spec.layers], dim=-1)
            pixel_values = pixel_values.to(runner.device, runner.dtype)
            batch = pixel_values.repeat(manifest.batch.min, 1, 1, 1)
            features = torch.empty(
                len(batch), spec.num_tokens, spec.hidden_size, dtype=runner.dtype, device=runner.device
            )
            runner.run(batch, features)
            figures = {}
            for name, found in (("bundle", features[:1]), ("torch", torch_tower(pixel_values))):
                sums = Sums.of(found.float().cpu(), reference)
                figures[name] = sums.figures()
                total[name].add(sums)
            rows.append(ImageFigures(name=photograph.name, **figures))
            if compare:
                compare(photograph.name, pixel_values[0].float().cpu(), reference[0], features[0].float().cpu())
    bounds = judge(manifest.precision, total["bundle"].figures(), total["torch"].figures())
    plans = [plan.file for plan in manifest.plans]
    return Certificate(
        passed=all(bound.holds for bound in bounds),
        ran="plan" if runner.files[0] in plans else "graph",
        backend=runner.name,
        files={name: manifest.files[name].sha256 for name in runner.files},
        not_run=tuple(plan for plan in plans if plan not in runner.files),
        reference=f"{checkpoint.family.model_class} of transformers {transformers.__version__}, uncut, FP32 on the CPU",
        images=tuple(rows),
        images_sha256=photographs.sha256,
        bundle=total["bundle"].figures(),
        torch=total["torch"].figures(),
        bounds=bounds,
        versions={"torch": torch.__version__, "transformers": transformers.__version__},
        machine=_machine(runner.device),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )


def _open(bundle: Bundle, backend: str) -> Runner:
    """Open what a tower would run on; a BF16 bundle that nothing here can run is checked in emulation."""
    stuck = all(candidate.obstacle for candidate in candidates(bundle))
    if backend == EMULATED_BF16 or (backend == "auto" and bundle.manifest.precision == "bf16" and stuck):
        return open_emulated(bundle)
    return choose(bundle, backend)


def judge(precision: str, bundle: Figures, own: Figures) -> tuple[Bound, ...]:
    """Hold the figures over all images against the bounds of a precision. NaN in the bundle's holds nothing."""

    def at_most(figure: str, limit: float, measured: float | None) -> Bound:
        return Bound(figure=figure, limit=limit, measured=measured, holds=measured is not None and measured <= limit)

    cosine = bundle.token_cosine_min
    limit = TOKEN_COSINE_MIN[precision]
    bounds = [
        at_most("non_finite", 0.0, float(bundle.non_finite)),
        Bound(figure="token_cosine_min", limit=limit, measured=cosine, holds=cosine is not None and cosine >= limit),
        at_most("relative_error", RELATIVE_ERROR[precision], bundle.relative_error),
    ]
    if precision != "fp32":
        bounds.append(
            at_most("relative_error_over_torch", RATIO_TO_TORCH, _ratio(bundle.relative_error, own.relative_error))
        )
    return tuple(bounds)


def _ratio(found: float | None, own: float | None) -> float | None:
    """Divide two relative errors; where PyTorch's own half precision overflows, any finite error is better."""
    if found is None:
        return None
    if found == 0.0 or own is None:
        return 0.0
    return found / own if own else None


@dataclass
class Sums:
    """What the figures of one image, or of many, are made of, in FP64."""

    squared_error: float = 0.0
    squared_reference: float = 0.0
    max_abs_error: float = 0.0
    non_finite: int = 0
    cosines: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, found: Tensor, reference: Tensor) -> "Sums":
        """Compare tokens (..., D) with the reference's."""
        x, ref = found.double(), reference.double()
        error = x - ref
        return cls(
            squared_error=float(error.square().sum()),
            squared_reference=float(ref.square().sum()),
            max_abs_error=float(error.abs().max()),
            non_finite=found.numel() - int(found.isfinite().sum()),
            cosines=[torch.nn.functional.cosine_similarity(x, ref, dim=-1).flatten()],
        )

    def add(self, other: "Sums") -> None:
        """Take another image in."""
        self.squared_error += other.squared_error
        self.squared_reference += other.squared_reference
        # max() would drop a NaN that comes second
        self.max_abs_error = float(torch.tensor([self.max_abs_error, other.max_abs_error], dtype=torch.double).max())
        self.non_finite += other.non_finite
        self.cosines += other.cosines

    def figures(self) -> Figures:
        """Make the figures of all that was taken in."""
        cosines = torch.cat(self.cosines)
        return Figures(
            token_cosine_mean=_finite(float(cosines.mean())),
            token_cosine_min=_finite(float(cosines.min())),
            relative_error=_finite(math.sqrt(self.squared_error / self.squared_reference)),
            max_abs_error=_finite(self.max_abs_error),
            non_finite=self.non_finite,
        )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _check_weights(tower: nn.Module, manifest: Manifest, source: str) -> None:
    if weights_sha256(tower) != manifest.source.weights_sha256:
        raise CheckpointError(
            f"the weights at {source} are not the ones that {manifest.name} was exported from, which were at "
            f"{manifest.source.checkpoint}: name that checkpoint with --checkpoint, or export again."
        )


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads, not run on a GPU"
