"""The projectors of Aya Vision and Cohere2 Vision: squares of patches side by side, then a gated MLP.

Both return a grid. transformers 5 lists its tokens row by row; 4.57 leaves that to whoever merges them into the text.
"""

from trtower_export.heads.base import Flatten, projector_of

CLASSES = {"aya_vision": "AyaVisionMultiModalProjector", "cohere2_vision": "Cohere2VisionMultiModalProjector"}

HEADS = tuple(
    projector_of(
        model,
        name,
        "downsample_factor",
        "adapter_layer_norm_eps",
        steps=lambda parts: {"projector": parts.projector, "flatten": Flatten()},
    )
    for model, name in CLASSES.items()
)
