"""How VILA, VILA 1.5 and tinychat put a checkpoint together."""

from pathlib import Path

from llava.model import LlavaLlamaConfig, LlavaLlamaModel
from made_up import randomised


def write_checkpoint(folder: Path, language: Path, tower: Path, **layout: object) -> Path:
    """Put the parts together as VILA's training does, and save the checkpoint."""
    config = LlavaLlamaConfig(
        **{
            "llm_cfg": str(language),
            "vision_tower_cfg": str(tower),
            "mm_projector_cfg": "mlp_downsample",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "cls_patch",
            **layout,
        }
    )
    config.model_dtype = "torch.float16"
    model = LlavaLlamaModel(config)
    randomised(model.mm_projector)
    model.save_pretrained(str(folder))
    return folder
