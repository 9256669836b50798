"""DINOv2: Meta's ViTs that load as `Dinov2Model`."""

from typing import Any

from trtower_export.families.base import Family, Pieces, replaced, resized_positions


def take_apart(model: Any, image_size: int) -> Pieces:
    """Take a `Dinov2Model` or a `Dinov2WithRegistersModel` apart. Drop the mask token, which only training uses."""
    positions = resized_positions(model.embeddings, model.embeddings.position_embeddings, image_size)
    stem = replaced(model.embeddings, position_embeddings=positions, mask_token=None)
    return Pieces(stem=stem, layers=model.encoder.layer, final_norm=model.layernorm)


FAMILY = Family(
    name="dinov2",
    model_types=("dinov2",),
    model_class="Dinov2Model",
    patch_embedding="embeddings.patch_embeddings.projection.weight",
    num_prefix_tokens=lambda config: 1,
    take_apart=take_apart,
    preprocessor={
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    },
)
