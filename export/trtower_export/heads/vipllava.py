"""VipLlava's projector: a LayerNorm over five hidden states side by side, then two linear layers."""

from trtower_export.heads.base import projector_of

HEADS = (projector_of("vipllava", "VipLlavaMultiModalProjector", "projector_hidden_act", "projector_layernorm_eps"),)
