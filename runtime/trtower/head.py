"""Describe the head of an engine: what follows the hidden states in it. Does not import torch."""

from dataclasses import dataclass, field

from trtower.errors import ConfigError
from trtower.names import check_name

HEADS = PROJECTOR, EMBEDDING = ("projector", "embedding")
"""What may follow the hidden states inside an engine: the model's projector, or the pooling of an embedding model."""

NO_HEAD = "none"

POOLS = CLS, CLS_MEAN = ("cls", "cls_mean")
"""What an embedding without a pooling head is made of: the CLS token, or that and the mean of the patches."""


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """What follows the hidden states inside the engine.

    ``kind`` is one of `HEADS`, and ``name`` is what the head is called, such as "LlavaMultiModalProjector".
    ``attribute`` is what a model calls the module that holds its weights, "" if the tower itself does. A projector
    gives ``tokens`` vectors of ``width`` for each image. An embedding gives one, so its ``tokens`` is None; with
    ``normalised`` it has unit length, and ``pool`` is one of `POOLS`, or None if the model has a pooling head.
    ``divisor`` is what the features are divided by last: PaliGemma's code does that in some releases of transformers.
    ``settings`` are the fields of the model's config that decide what the head computes, as JSON.
    """

    kind: str
    name: str
    width: int
    tokens: int | None = None
    attribute: str = ""
    normalised: bool = False
    pool: str | None = None
    divisor: float = 1.0
    settings: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name("head", self.kind, HEADS)
        if self.pool is not None:
            check_name("pool", self.pool, POOLS)
        several = self.tokens is not None
        if self.width < 1 or several != (self.kind == PROJECTOR) or (self.tokens is not None and self.tokens < 1):
            raise ConfigError(f"a head of kind {self.kind} cannot have width={self.width} and tokens={self.tokens}.")
        if self.kind == PROJECTOR and (self.normalised or self.pool):
            raise ConfigError("a projector is neither normalised nor pooled; only an embedding is.")
        if not self.divisor > 0:
            raise ConfigError(f"divisor={self.divisor}; expected a number above 0.")

    @property
    def row(self) -> tuple[int, ...]:
        """The shape of one image's features."""
        return (self.width,) if self.tokens is None else (self.tokens, self.width)

    @property
    def output(self) -> tuple[str, tuple[int, ...]]:
        """The name of the engine's output, `image_features` or as in CLIP `image_embeds`, and the shape of a row."""
        return "image_features" if self.kind == PROJECTOR else "image_embeds", self.row

    def describe(self) -> str:
        """Say in a few words what it is."""
        if self.tokens is None:
            length = ", of length 1" if self.normalised else ""
            mean = " and the mean of the patches" if self.pool == CLS_MEAN else ""
            return f"embedding by {self.name}{mean}, a vector of {self.width}{length}"
        divided = "" if self.divisor == 1.0 else f", divided by {self.divisor:.6g}"
        return f"projector {self.name}, {self.tokens} tokens of {self.width}{divided}"
