"""What servers of language models want of a bundle: features as the language model receives them."""

from trtower.bundle.bundle import Bundle
from trtower.errors import ConfigError
from trtower.head import PROJECTOR, HeadSpec


def projector_of(bundle: Bundle, server: str) -> HeadSpec:
    """Return the projector that a bundle ends with; raise ConfigError if it has none, or divides its features.

    Servers put features into a prompt as they are. Dividing is for releases of transformers that multiply them later.
    """
    head = bundle.manifest.spec.head
    if head is None or head.kind != PROJECTOR:
        found = "without a head" if head is None else f"with an {head.kind}"
        raise ConfigError(
            f"{bundle.path} was exported {found}, but {server} wants features after the model's projector: export the "
            "whole model with --head projector."
        )
    if head.divisor != 1.0:
        raise ConfigError(
            f"{bundle.path} divides its features by {head.divisor:.6g}, as the transformers that exported it does, and "
            f"{server} does not multiply them: export the model again with transformers 5."
        )
    return head
