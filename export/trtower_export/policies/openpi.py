"""openpi's π0 and π0.5 in PyTorch, and the tower that their descendants share: PaliGemma's SigLIP and its projector.

openpi writes no vision config: its code holds the sizes. Sources: `gemma_pytorch.py`, `preprocessing_pytorch.py` and
`examples/convert_jax_model_to_pytorch.py` of openpi.
"""

from collections.abc import Collection

from trtower_export.policies.base import Policy, PolicyTower, RawConfig, frames
from trtower_export.recipes import Recipe, read_recipe

UNWRITTEN = {"paligemma_variant": "gemma_2b"}
"""The config of a checkpoint that was trained in PyTorch, which has a metadata.pt and no config.json."""

SIDE = 224
CAMERAS = 3
"""A base and two wrists: openpi reads all three, and masks those that are missing."""


def pi_recipe() -> Recipe:
    """Return the recipe of the tower and projector that every π has."""
    return read_recipe("pi0_base")


def is_of_tensors(names: Collection[str]) -> bool:
    """Return whether these are the tensors of openpi's model; LeRobot's are under "model."."""
    return any(name.startswith("paligemma_with_expert.") for name in names)


def unmerged(raw: RawConfig) -> str | None:
    """Return why a π with adapters cannot be exported; None if it has none."""
    variant = str(raw.get("paligemma_variant"))
    if not variant.endswith("_lora"):
        return None
    return f"its paligemma_variant is {variant}, so it holds LoRA adapters; merge them, and save an ordinary policy"


POLICIES = (
    Policy(
        name="π0 or π0.5 policy of openpi",
        is_of=lambda raw: "model_type" not in raw and "type" not in raw and "paligemma_variant" in raw,
        read=lambda raw: PolicyTower(model=pi_recipe(), preprocessor=frames("openpi", SIDE), cameras=CAMERAS),
        obstacle=unmerged,
    ),
)
