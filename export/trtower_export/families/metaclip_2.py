"""MetaCLIP 2: Meta's worldwide ViTs that load as `MetaClip2VisionModel`, built like CLIP's."""

from dataclasses import replace

from trtower_export.families import clip

FAMILY = replace(
    clip.FAMILY, name="metaclip_2", model_types=("metaclip_2_vision_model",), model_class="MetaClip2VisionModel"
)
