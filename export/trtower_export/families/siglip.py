"""SigLIP, and SigLIP 2 with a fixed size: Google's ViTs that load as `SiglipVisionModel`.

There is no CLS token. `last_hidden_state` is normed; the head that pools it is never read.
"""

from functools import partial

from torch import nn

from trtower_export.families.base import Family, Pieces, read_states, run_layer
from trtower_export.families.clip import flat, resized_embeddings


def _take_apart(model: nn.Module, image_size: int) -> Pieces:
    vision = flat(model)
    stem = resized_embeddings(vision.embeddings, 0, image_size)
    return Pieces(stem=stem, layers=vision.encoder.layers, final_norm=vision.post_layernorm)


FAMILY = Family(
    name="siglip",
    model_types=("siglip_vision_model",),
    model_class="SiglipVisionModel",
    patch_embedding="embeddings.patch_embedding.weight",
    num_prefix_tokens=lambda config: 0,
    take_apart=_take_apart,
    run_layer=partial(run_layer, attention_mask=None),
    read_states=partial(read_states, interpolate_pos_encoding=True),
    preprocessor={
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 224, "width": 224},
        "resample": 3,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
)
