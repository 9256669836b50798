"""PyTorch's tower and a bundle side by side on one picture: their patches, and how alike these are.

Letters: S pixels a side, N patches in G rows of G, D features a patch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from PIL import Image
from torch import Tensor, nn

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import PREPROCESSOR
from trtower.errors import ConfigError, InputError
from trtower.tower.image_processor import ImageProcessor
from trtower.tower.vision_tower import VisionTower
from trtower_export.check.certify import check_weights
from trtower_export.check.report.pca import token_distances
from trtower_export.check.report.report import as_image
from trtower_export.checkpoint.checkpoint import Checkpoint
from trtower_export.graph.reference import UncutTower


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """One picture as both towers see it.

    ``seen`` is what the image processor leaves of it, S x S. ``reference`` and ``bundle`` are the patches (N, D), in
    FP32 on the CPU, and took ``reference_s`` and ``bundle_s`` seconds.
    """

    seen: Image.Image
    reference: Tensor
    bundle: Tensor
    reference_s: float
    bundle_s: float

    @property
    def cosines(self) -> Tensor:
        """The cosine between both towers, of each patch."""
        return 1 - token_distances(self.bundle, self.reference)

    def similar_to(self, patch: int) -> tuple[Tensor, Tensor]:
        """Return the cosine of every patch with one of them, in PyTorch's tower and in the bundle."""
        reference, bundle = (1 - token_distances(each, each[patch][None]) for each in (self.reference, self.bundle))
        return reference, bundle


@dataclass(frozen=True, kw_only=True, eq=False)
class Towers:
    """Both towers, loaded. PyTorch's is cut as the bundle's is, in FP32, on the bundle's device."""

    tower: VisionTower
    cut: nn.Module
    to_floats: ImageProcessor
    prefix: int
    side: int

    @classmethod
    def open(cls, bundle: Bundle, checkpoint: Checkpoint, backend: str) -> "Towers":
        """Load both, and run each once.

        Raises ConfigError if the bundle returns no grid of patches, and CheckpointError if the checkpoint has other
        weights than the bundle.
        """
        spec = bundle.manifest.spec
        if spec.grid is None:
            what = spec.head.describe() if spec.head else "tower"
            raise ConfigError(f"play shows a grid of patches, but {bundle.path} returns the {what}.")
        uncut = UncutTower.load(checkpoint, spec)
        check_weights(uncut, bundle.manifest)
        tower = VisionTower.load(bundle.path, backend)
        processor = ImageProcessor.from_file(bundle.verify(PREPROCESSOR))
        prefix, side = spec.grid
        towers = cls(
            tower=tower,
            cut=uncut.cut().to(tower.device),
            to_floats=processor if spec.takes_floats else processor.preparing_floats(),
            prefix=prefix,
            side=side,
        )
        towers.look(Image.new("RGB", (spec.image_size, spec.image_size)))
        return towers

    @torch.no_grad()
    def look(self, picture: Image.Image) -> Look:
        """Show a picture to both towers. Raises InputError if the image processor refuses it."""
        device, spec = self.tower.device, self.tower.spec
        floats: Tensor = self.to_floats.preprocess(picture, return_tensors="pt")["pixel_values"].float()
        pixels = floats.to(self.tower.dtype)
        if not spec.takes_floats:
            pixels = self.tower.image_processor(picture, return_tensors="pt")["pixel_values"]
        if pixels.shape[1:] != self.tower.bundle.manifest.input.row:
            raise InputError(f"the picture comes out as {tuple(pixels.shape)}: it must be cropped or padded before.")
        pixels, floats = pixels.to(device), floats.to(device)
        reference, reference_s = _timed(lambda: self.cut(floats), device)
        found, bundle_s = _timed(lambda: self.tower.read_tokens(pixels), device)
        return Look(
            seen=as_image(floats[0], self.to_floats),
            reference=reference[0, self.prefix :].float().cpu(),
            bundle=found[0, self.prefix :].float().cpu(),
            reference_s=reference_s,
            bundle_s=bundle_s,
        )


def _timed(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, perf_counter() - started
