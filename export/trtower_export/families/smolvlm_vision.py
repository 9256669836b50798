"""SmolVLM's SigLIP, which loads as `SmolVLMVisionTransformer`, built like Idefics3's."""

from dataclasses import replace
from functools import partial

from trtower_export.families import idefics3_vision

FAMILY = replace(
    idefics3_vision.FAMILY,
    name="smolvlm_vision",
    model_types=("smolvlm_vision",),
    model_class="SmolVLMVisionTransformer",
    obstacle=partial(idefics3_vision.obstacle, model_class="SmolVLMVisionTransformer"),
    preprocessor={**idefics3_vision.FAMILY.preprocessor, "size": {"height": 512, "width": 512}},
)
