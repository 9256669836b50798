"""VipLlava's projector: a LayerNorm over five hidden states side by side, then two linear layers."""

from trtower_export.heads.base import Head, transformers_class

NAME = "VipLlavaMultiModalProjector"

HEADS = (
    Head(
        name=NAME,
        model_types=("vipllava",),
        attribute="multi_modal_projector",
        own=lambda config: transformers_class("vipllava", NAME)(config),
    ),
)
