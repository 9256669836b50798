"""The connector of Idefics3 and SmolVLM: squares of patches side by side (pixel shuffle), then one linear layer."""

from trtower_export.heads.base import projector_of

CLASSES = {"idefics3": "Idefics3Connector", "smolvlm": "SmolVLMConnector"}

HEADS = tuple(projector_of(model, name, "scale_factor", attribute="connector") for model, name in CLASSES.items())
