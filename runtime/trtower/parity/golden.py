"""The golden answers of a bundle: a few inputs, and what the uncut FP32 tower of PyTorch makes of them.

They are one safetensors file, so that anything that runs an engine can compare with them. Written at export, they prove
an engine where there is neither a checkpoint nor transformers.

Shapes: n images, K of the tokens of an image, D features per token; the rest is the manifest's input and output. The
vector of an embedding counts as one token.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import GOLDEN
from trtower.dtypes import PIXEL_DTYPES
from trtower.errors import BundleError, one_line
from trtower.spec import TensorSpec

TOKENS = "tokens"
"""The tensor that says which tokens the answers hold; the other two have the names of the engine's tensors."""

ABOUT = "golden"
"""The key of the file's metadata that names the images and the reference, as JSON."""

MOST_BYTES = 8_000_000
"""The size of the file, unless a single image is larger than this."""

HEADER_BYTES = 4096
"""Room for the names of tensors and images."""


@dataclass(frozen=True, kw_only=True)
class GoldenImage:
    """The name of a golden image; ``kind`` is "photograph", or for a drawn one "noise", "constant" or "saturated"."""

    name: str
    kind: str


@dataclass(frozen=True, kw_only=True, eq=False)
class GoldenInputs:
    """Golden images before they are answered.

    Attributes:
        images: The n images.
        pixel_values: What the engine takes for each: (n, 3, S, S), or bytes in its layout. FP32 engines, too, are given
            numbers of FP16.
        prepared: What PyTorch's tower takes, (n, 3, S, S) in FP32.
    """

    images: tuple[GoldenImage, ...]
    pixel_values: Tensor
    prepared: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Golden:
    """Golden inputs and answers.

    Attributes:
        images: The n images.
        pixel_values: What the engine takes for each, (n, 3, S, S), or bytes in its layout.
        tokens: The tokens in ``answers``, (K,), counted from 0 with the prefix tokens.
        answers: The reference's features of these tokens, (n, K, D) in FP32.
        reference: The model that gave the answers.
    """

    images: tuple[GoldenImage, ...]
    pixel_values: Tensor
    tokens: Tensor
    answers: Tensor
    reference: str

    def write(self, path: Path, input_: TensorSpec, output: TensorSpec) -> None:
        """Write the file of a bundle whose engine has these tensors."""
        tensors = {input_.name: self.pixel_values, TOKENS: self.tokens, output.name: self.answers}
        about = {"images": [asdict(image) for image in self.images], "reference": self.reference}
        metadata = {ABOUT: json.dumps(about)}  # one key: safetensors writes several in any order
        content = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
        path.write_bytes(content)  # save_file would let only its owner read it

    @classmethod
    def read(cls, bundle: Bundle) -> "Golden":
        """Read the golden answers of a bundle; raise BundleError if it has none, or they do not belong to it."""
        if GOLDEN not in bundle.manifest.files:
            raise BundleError(
                f"{bundle.path} holds no {GOLDEN}, because an older trtower exported it: export it again, or compare "
                "it with PyTorch by `trtower check`."
            )
        content, manifest = bundle.read(GOLDEN), bundle.manifest
        try:
            tensors = safetensors.torch.load(content)
            about = json.loads(_metadata(content)[ABOUT])
            golden = cls(
                images=tuple(GoldenImage(**image) for image in about["images"]),
                pixel_values=tensors[manifest.input.name],
                tokens=tensors[TOKENS],
                answers=tensors[manifest.output.name],
                reference=about["reference"],
            )
            golden._check(manifest.input, manifest.output)
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError) as err:
            raise BundleError(
                f"{bundle.path / GOLDEN} does not belong to this bundle: {one_line(err)}. Export it again."
            ) from err
        return golden

    def _check(self, input_: TensorSpec, output: TensorSpec) -> None:
        """Raise ValueError unless shapes and types are those of an engine with these tensors."""
        tokens, width = output.vectors
        count = len(self.images)
        if not count or self.pixel_values.shape != (count, *input_.row):
            raise ValueError(f"{input_.name} has shape {tuple(self.pixel_values.shape)} for {count} images")
        if self.pixel_values.dtype != golden_dtype(input_):
            raise ValueError(f"{input_.name} has dtype {self.pixel_values.dtype} for an engine of {input_.dtype}")
        if (self.tokens.ndim, self.tokens.dtype) != (1, torch.int64):
            raise ValueError(f"{TOKENS} has {self.tokens.ndim} dimensions and dtype {self.tokens.dtype}")
        if (self.answers.shape, self.answers.dtype) != ((count, len(self.tokens), width), torch.float32):
            raise ValueError(f"{output.name} has shape {tuple(self.answers.shape)} and dtype {self.answers.dtype}")
        if not all(type(text) is str for image in self.images for text in (image.name, image.kind, self.reference)):
            raise ValueError(f"{ABOUT} names an image or the reference by something else than text")
        if not len(self.tokens) or not 0 <= int(self.tokens.min()) <= int(self.tokens.max()) < tokens:
            raise ValueError(f"{TOKENS} are not all among the {tokens} of the engine")


def _metadata(content: bytes) -> dict[str, str]:
    """Return the metadata of a safetensors file: its header is JSON, after its length in 8 bytes."""
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return metadata


def select_tokens(features: Tensor, tokens: Tensor, output: TensorSpec) -> Tensor:
    """Keep some tokens of what an engine with this ``output`` returns for images: (..., K, D)."""
    return features.reshape(*features.shape[: features.ndim - len(output.row)], *output.vectors)[..., tokens, :]


def golden_dtype(input_: TensorSpec) -> torch.dtype:
    """Return the dtype of golden inputs: the engine's own, but FP16 for FP32, to save half the room."""
    return torch.float16 if input_.dtype == "float32" else PIXEL_DTYPES[input_.dtype]


def count_images(images: Sequence[object], image_bytes: int) -> int:
    """Return how many of ``images``, the most important first, fit half the file: at least one."""
    return max(1, min(len(images), MOST_BYTES // 2 // image_bytes))


def sample_tokens(output: TensorSpec, count: int, input_bytes: int) -> Tensor:
    """Return the tokens whose answers fit the file for ``count`` images: all, or the first, the last and some between.

    If there is room for one only, it is the first. They are evenly spaced, so the same shapes give the same tokens.
    """
    tokens, width = output.vectors
    room = MOST_BYTES - HEADER_BYTES - input_bytes
    fitting = room // (count * (width * torch.float32.itemsize + torch.int64.itemsize))
    return torch.linspace(0, tokens - 1, min(tokens, max(1, fitting))).round().long()
