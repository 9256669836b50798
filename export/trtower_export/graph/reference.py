"""Run the uncut model as transformers does, in FP32: the reference of every check, and of the golden answers."""

import torch
import transformers
from torch import Tensor, nn

from trtower.errors import CheckpointError
from trtower.parity.golden import Golden, GoldenInputs, sample_tokens
from trtower.spec import TowerSpec
from trtower_export.checkpoint.checkpoint import Checkpoint


def read_reference(
    checkpoint: Checkpoint, model: nn.Module, spec: TowerSpec, name: str, pixels: Tensor
) -> tuple[Tensor, ...]:
    """Return every hidden state of the full model for an image (1, 3, S, S), in FP32.

    Raises CheckpointError, which quotes the image's ``name``, if a state that is read is not finite.
    """
    states = checkpoint.family.read_states(model, pixels)
    if not all(states[layer].isfinite().all() for layer in spec.layers):
        raise CheckpointError(
            f"{checkpoint.source} is not finite in FP32 on {name}, so nothing can be compared with it: "
            f"run trtower doctor {checkpoint.source} to find the operation."
        )
    return states


def describe_reference(checkpoint: Checkpoint) -> str:
    """Name the model that is the reference."""
    return f"{checkpoint.family.model_class} of transformers {transformers.__version__}, uncut, FP32 on the CPU"


@torch.no_grad()
def answer(checkpoint: Checkpoint, model: nn.Module, spec: TowerSpec, inputs: GoldenInputs) -> Golden:
    """Ask the full model for the golden answers to ``inputs``. Raises CheckpointError."""
    pixels = inputs.pixel_values
    tokens = sample_tokens(spec.output("fp32"), len(pixels), pixels.nbytes)
    answers = []
    for image, one in zip(inputs.images, inputs.prepared.split(1), strict=True):
        states = read_reference(checkpoint, model, spec, image.name, one)
        answers.append(torch.cat([states[layer][:, tokens] for layer in spec.layers], dim=-1))
    return Golden(
        images=inputs.images,
        pixel_values=pixels,
        tokens=tokens,
        answers=torch.cat(answers),
        reference=describe_reference(checkpoint),
    )
