"""The projector of LLaVA and its successors in transformers: two linear layers with an activation between.

LLaVA-NeXT and OneVision project each tile by itself. They put the tiles together afterwards, by the shape of the
picture, which stays with the model.
"""

from trtower_export.heads.base import projector_of

CLASSES = {
    "llava": "LlavaMultiModalProjector",
    "llava_next": "LlavaNextMultiModalProjector",
    "llava_next_video": "LlavaNextVideoMultiModalProjector",
    "llava_onevision": "LlavaOnevisionMultiModalProjector",
}

HEADS = tuple(
    projector_of(model, name, "projector_hidden_act", "multimodal_projector_bias") for model, name in CLASSES.items()
)
