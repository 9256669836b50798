"""SmolVLM's SigLIP, which loads as `SmolVLMVisionTransformer`, built like Idefics3's."""

from dataclasses import replace

from trtower_export.families import idefics3_vision

FAMILY = replace(
    idefics3_vision.FAMILY,
    name="smolvlm_vision",
    model_types=("smolvlm_vision",),
    model_class="SmolVLMVisionTransformer",
    preprocessor={**idefics3_vision.FAMILY.preprocessor, "size": {"height": 512, "width": 512}},
)
