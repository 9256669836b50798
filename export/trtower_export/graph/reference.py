"""The uncut tower, as transformers runs it in FP32: what is cut, and the reference of everything that is compared."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor, nn

from trtower.dtypes import DTYPES
from trtower.errors import CheckpointError
from trtower.fingerprint import read_parameters, weights_sha256
from trtower.parity.golden import Golden, GoldenInputs, sample_tokens, select_tokens
from trtower.spec import TowerSpec
from trtower_export.checkpoint.checkpoint import Checkpoint
from trtower_export.checkpoint.head import load_head
from trtower_export.families import family_of
from trtower_export.graph.truncate import TruncatedTower, truncate


@dataclass(frozen=True, kw_only=True)
class UncutTower:
    """The full vision model of a checkpoint, in FP32, and the head that ``spec`` names, or None.

    ``own`` are the weights that the head keeps outside the model.
    """

    checkpoint: Checkpoint
    spec: TowerSpec
    model: nn.Module
    head: nn.Module | None
    own: tuple[Tensor, ...]

    @classmethod
    def load(cls, checkpoint: Checkpoint, spec: TowerSpec) -> "UncutTower":
        """Load both. Raises CheckpointError if a tensor is missing, unknown, quantised or of another shape."""
        model = checkpoint.load_model(spec)
        head, own = load_head(checkpoint, model, spec)
        return cls(checkpoint=checkpoint, spec=spec, model=model, head=head, own=own)

    def cut(self) -> TruncatedTower:
        """Return the part that ``spec`` reads, with the head. It shares the weights."""
        return truncate(self.model, self.checkpoint.family, self.spec, self.head)

    def states(self, name: str, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return every hidden state of the full model for an image (1, 3, S, S).

        Raises CheckpointError, which quotes the image's ``name``, if a state that is read is not finite.
        """
        states = self.checkpoint.family.read_states(self.model, pixels)
        self._refuse_infinite([states[layer] for layer in self.spec.layers], name)
        return states

    def expect(self, name: str, states: tuple[Tensor, ...]) -> Tensor:
        """Return what an engine must return for these hidden states of an image. Raises CheckpointError as `states`."""
        features = self.read(states)
        self._refuse_infinite([features], name)
        return features

    def _refuse_infinite(self, tensors: Sequence[Tensor], name: str) -> None:
        if not all(each.isfinite().all() for each in tensors):
            raise CheckpointError(
                f"{self.checkpoint.source} is not finite in FP32 on {name}, so nothing can be compared with it: "
                f"run trtower doctor {self.checkpoint.source} to find the operation."
            )

    def read(self, states: tuple[Tensor, ...]) -> Tensor:
        """Return what the head makes of hidden states, or without one the states that are read, side by side."""
        tokens = torch.cat([states[layer] for layer in self.spec.layers], dim=-1)
        if self.head is None:
            return tokens
        features: Tensor = self.head(tokens[:, self.spec.first_read :])
        return features

    @torch.no_grad()
    def answer(self, inputs: GoldenInputs) -> Golden:
        """Answer golden inputs. Raises CheckpointError if the answers are not finite, or are all zero."""
        output, pixels = self.spec.output("fp32"), inputs.pixel_values
        tokens = sample_tokens(output, len(pixels), pixels.nbytes)
        answers = [
            select_tokens(self.expect(image.name, self.states(image.name, one)), tokens, output)
            for image, one in zip(inputs.images, inputs.prepared.split(1), strict=True)
        ]
        if not any(answer.any() for answer in answers):
            raise CheckpointError(
                f"{self.checkpoint.source}: its features are zero for every image, so nothing can be compared with "
                f"them: are the weights of its {self.spec.head.name if self.spec.head else 'tower'} trained?"
            )
        return Golden(
            images=inputs.images,
            pixel_values=pixels,
            tokens=tokens,
            answers=torch.cat(answers),
            reference=self.describe(),
        )

    def describe(self) -> str:
        """Name what the reference is."""
        config = self.checkpoint.config
        classes = " and ".join(family_of(part.model_type).model_class for part in getattr(config, "parts", [config]))
        model = f"{classes} of transformers {transformers.__version__}, uncut"
        after = f", and {self.spec.head.name}" if self.spec.head else ""
        return f"{model}{after}, FP32 on the CPU"

    def weights_sha256(self) -> str:
        """Hash the weights of the model that are read, in FP32."""
        return weights_sha256(read_parameters(self.model, self.spec))

    def head_sha256(self) -> dict[str, str]:
        """Hash the weights that the head keeps outside the model, in every dtype; {} if it keeps none."""
        return {name: weights_sha256(self.own, dtype) for name, dtype in DTYPES.items()} if self.own else {}
