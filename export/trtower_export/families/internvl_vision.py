"""InternViT as transformers has it: `InternVLVisionModel`, the tower of InternVL's checkpoints that end in -hf."""

from typing import Any

from torch import Tensor, nn

from trtower_export.families.base import Family, Pieces, replaced, resized_positions, run_layer


class _Stem(nn.Module):
    """InternVL's embeddings. transformers 4.57 returns the grid as well as the tokens."""

    def __init__(self, embeddings: Any, image_size: int) -> None:
        super().__init__()
        positions = embeddings.position_embeddings
        if positions is not None:
            positions = resized_positions(embeddings, positions, image_size)
        # Only training uses the mask token.
        self.embeddings = replaced(embeddings, position_embeddings=positions, mask_token=None)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return run_layer(self.embeddings, pixel_values)


def _take_apart(model: Any, image_size: int) -> Pieces:
    stem = _Stem(model.embeddings, image_size)
    return Pieces(stem=stem, layers=model.encoder.layer, final_norm=model.layernorm)


def _read_states(model: Any, pixel_values: Tensor) -> tuple[Tensor, ...]:
    # Request the states in the config: as an argument, it leaves the layers wrapped in transformers 4.57.
    before = model.config.output_hidden_states
    model.config.output_hidden_states = True
    try:
        output = model(pixel_values)
    finally:
        model.config.output_hidden_states = before
    return (*output.hidden_states, output.last_hidden_state)


FAMILY = Family(
    name="internvl_vision",
    model_types=("internvl_vision",),
    model_class="InternVLVisionModel",
    patch_embedding="embeddings.patch_embeddings.projection.weight",
    num_prefix_tokens=lambda config: 1,
    take_apart=_take_apart,
    read_states=_read_states,
    # From transformers' conversion of the weights; the defaults of its image processor belong to another model.
    preprocessor={
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 448, "width": 448},
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
)
