"""What servers of language models want of a bundle: features as the language model receives them."""

from trtower.bundle.bundle import Bundle
from trtower.errors import ConfigError
from trtower.head import PROJECTOR, HeadSpec


def projector_of(bundle: Bundle, server: str) -> HeadSpec:
    """Return the projector that a bundle ends with; raise ConfigError if it has none."""
    head = bundle.manifest.spec.head
    if head is None or head.kind != PROJECTOR:
        found = "without a head" if head is None else f"with an {head.kind}"
        raise ConfigError(
            f"{bundle.path} was exported {found}, but {server} wants features after the model's projector: export the "
            "whole model with --head projector."
        )
    return head
