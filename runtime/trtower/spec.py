"""Describe a tower in numbers: layers, features, tokens, shapes. Does not import torch.

Shapes are written in these letters everywhere: B images, S pixels per side, P prefix tokens (CLS and registers),
N patches, D features per token.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import isqrt

from trtower.errors import ConfigError, InputError
from trtower.head import EMBEDDING, HeadSpec
from trtower.layer_codes import FEATURES, name_layer
from trtower.names import check_name

MB, MIB = 10**6, 1 << 20


@dataclass(frozen=True, kw_only=True)
class Precision:
    """The format of weights and activations, and its name in each library.

    ``dtype`` is the name in torch and in a manifest, ``onnx`` the number in ONNX's TensorProto, ``tensorrt`` the name
    in TensorRT's DataType, ``openvino`` that in OpenVINO's Type, and ``triton`` Triton's. GPUs below compute capability
    ``first_capability`` lack the format, and TensorRT refuses the graph for them.

    An 8-bit precision is FP16 everywhere except in its linear layers, whose weights have the type ``onnx_linear`` (in
    TensorProto).
    """

    name: str
    dtype: str
    itemsize: int
    onnx: int
    tensorrt: str
    openvino: str
    triton: str
    first_capability: float = 0.0
    onnx_linear: int = 0  # UNDEFINED


FP16 = Precision(name="fp16", dtype="float16", itemsize=2, onnx=10, tensorrt="HALF", openvino="f16", triton="FP16")
_ROWS = (
    FP16,
    replace(
        FP16,
        name="bf16",
        dtype="bfloat16",
        onnx=16,
        tensorrt="BF16",
        openvino="bf16",
        triton="BF16",
        first_capability=8.0,
    ),
    Precision(name="fp32", dtype="float32", itemsize=4, onnx=1, tensorrt="FLOAT", openvino="f32", triton="FP32"),
    replace(FP16, name="fp8", onnx_linear=17, first_capability=8.9),
    replace(FP16, name="int8", onnx_linear=3),
)

PRECISIONS = {each.name: each for each in _ROWS}
EIGHT_BIT = tuple(name for name, each in PRECISIONS.items() if each.onnx_linear)
BY_DTYPE = {each.dtype: each for each in PRECISIONS.values() if not each.onnx_linear}
"""Dtype -> the precision in which everything has that dtype."""
HALVES = tuple(each.name for each in BY_DTYPE.values() if each.itemsize == 2)

PIXELS = FLOAT, UINT8 = ("float", "uint8")
"""What an engine takes: prepared numbers in its own dtype, or bytes that it rescales and normalises itself."""

LAYOUTS = NCHW, NHWC = ("nchw", "nhwc")
"""The order of an input: (B, 3, S, S), or for bytes also (B, S, S, 3)."""


def check_pixels(pixels: str, layout: str) -> None:
    """Raise ConfigError unless an engine can take such pixels in such a layout."""
    check_name("pixels", pixels, PIXELS)
    check_name("layout", layout, LAYOUTS)
    if layout == NHWC and pixels == FLOAT:
        raise ConfigError("--layout nhwc needs --pixels uint8: prepared floats are (B, 3, S, S) everywhere.")


MOST_IMAGES = 65536
"""The largest batch of a profile: more than any GPU's memory holds, and within TensorRT's integers."""


@dataclass(frozen=True, kw_only=True)
class BatchProfile:
    """How many images one engine call accepts: fewest, tuned for, most (TensorRT's min, opt, max)."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ConfigError(
                f"batch profile {self.min} {self.opt} {self.max} is out of order; "
                "expected 1 <= MIN <= OPT <= MAX, such as 1 8 32."
            )
        if self.max > MOST_IMAGES:
            raise ConfigError(
                f"batch profile {self.min} {self.opt} {self.max} is too large; MAX can be at most {MOST_IMAGES}."
            )

    def pieces(self, batch: int) -> Iterator[tuple[int, int]]:
        """Split ``batch`` images into ranges of one engine call each.

        A remainder below the minimum is topped up with images of the previous range, which are then computed twice.
        Raises InputError if the whole batch is below the minimum.
        """
        if batch < self.min:
            raise InputError(
                f"images has batch {batch}; this engine accepts {self.min} to {self.max} at once. Pass at least "
                f"{self.min}, or export with a smaller MIN in --batch."
            )
        for start in range(0, batch, self.max):
            stop = min(start + self.max, batch)
            yield min(start, stop - self.min), stop


DEFAULT_BATCH = BatchProfile(min=1, opt=8, max=32)
"""The batch profile of an export if neither its options nor the recipe name one."""


def merge_profiles(profiles: Sequence[BatchProfile]) -> BatchProfile:
    """Return the profile that covers several profiles, tuned as the last one.

    Raises ConfigError if they leave a gap, or if two are the same.
    """
    for index, profile in enumerate(profiles):
        if profile in profiles[:index]:
            raise ConfigError(f"batch profile {profile.min} {profile.opt} {profile.max} was given twice.")
    ordered = sorted(profiles, key=lambda profile: profile.min)
    reached = ordered[0].max
    for profile in ordered[1:]:
        if profile.min > reached + 1:
            each = ", ".join(f"{p.min} {p.opt} {p.max}" for p in profiles)
            raise ConfigError(f"batch profiles {each} leave out {reached + 1} to {profile.min - 1} images.")
        reached = max(reached, profile.max)
    return BatchProfile(min=ordered[0].min, opt=profiles[-1].opt, max=reached)


def profile_batches(profiles: Sequence[BatchProfile]) -> list[int]:
    """List the batches that the profiles name as min, opt or max, in ascending order."""
    return sorted({size for profile in profiles for size in (profile.min, profile.opt, profile.max)})


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of the graph: its name, dtype, and shape with the batch written as "batch"."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def row(self) -> tuple[int, ...]:
        """The shape of what belongs to one image."""
        return tuple(int(size) for size in self.shape[1:])

    @property
    def vectors(self) -> tuple[int, int]:
        """The number of feature vectors that belong to one image, and their width; an embedding has one."""
        *several, width = self.row
        return (several[0] if several else 1), width


@dataclass(frozen=True, kw_only=True)
class Naming:
    """What transformers calls the parts of a family's vision model, so that a bundle can recognise its tower.

    Names are dotted, as in `named_parameters()`, and each field lists every name that its part may have. Names start
    inside ``wrapper``, a module that some releases of transformers put around the whole tower; the list of ``layers``
    may lie anywhere. ``final_norm`` turns hidden state L into `last_hidden_state`; if it is empty, the two are the same
    state. No hidden state depends on the ``unread`` parts. Besides the weights, the ``config_fields`` decide what a
    tower computes.

    In a pair of towers, ``offsets`` maps what the names of the one with fewer layers begin with to the number of layers
    of the other that run before its first.
    """

    wrapper: str = "vision_model"
    layers: tuple[str, ...] = ("layer", "layers")
    final_norm: tuple[str, ...] = ("post_layernorm", "layernorm", "norm", "rms_norm")
    unread: tuple[str, ...] = ("head", "pooler", "embeddings.mask_token")
    config_fields: tuple[str, ...] = (
        "hidden_size",
        "num_attention_heads",
        "patch_size",
        "num_channels",
        "hidden_act",
        "layer_norm_eps",
        "rms_norm_eps",
        "num_register_tokens",
        "use_swiglu_ffn",
        "use_gated_mlp",
        "rope_theta",
        "norm_type",
        "use_qk_norm",
        "is_native",
    )
    offsets: dict[str, int] = field(default_factory=dict)

    def inside(self, parameter: str) -> str:
        """Return the name of a parameter without the wrapper's prefix."""
        return parameter.removeprefix(f"{self.wrapper}.")

    def find_layer(self, parameter: str) -> int | None:
        """Return the index of the layer that holds a parameter; None if it is outside the layers."""
        layers = "|".join(map(re.escape, self.layers))
        match = re.search(rf"(?:^|\.)(?:{layers})\.(\d+)\.", parameter)
        if match is None:
            return None
        return int(match[1]) + next((n for part, n in self.offsets.items() if parameter.startswith(part)), 0)


@dataclass(frozen=True, kw_only=True)
class TowerSpec:
    """The shape of a full tower of L = ``num_layers`` layers, and what a bundle reads of it.

    ``layers`` are the indices of the hidden states that it reads, in reading order: 0 to L, and L + 1 for
    `last_hidden_state` (see layer_codes.py). ``width`` is the number of features per token of one state. ``pixels`` and
    ``layout`` say what the engine takes: one of `PIXELS` in one of `LAYOUTS`. With a ``head`` the engine returns what
    that makes of the hidden states, and otherwise the hidden states themselves. ``towers`` are the widths of the towers
    of a pair, which stand side by side in ``width``; it is empty for a tower by itself.
    """

    family: str
    image_size: int
    patch_size: int
    num_layers: int
    num_prefix_tokens: int
    width: int
    layers: tuple[int, ...]
    select_feature: str = "patch"
    naming: Naming = Naming()
    pixels: str = FLOAT
    layout: str = NCHW
    head: HeadSpec | None = None
    towers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_pixels(self.pixels, self.layout)
        if min(self.image_size, self.patch_size, self.num_layers, self.width) < 1 or self.num_prefix_tokens < 0:
            raise ConfigError(
                "invalid tower: image_size, patch_size, num_layers and width must each be at least 1, and "
                f"num_prefix_tokens at least 0; got {self.image_size}, {self.patch_size}, {self.num_layers}, "
                f"{self.width} and {self.num_prefix_tokens}."
            )
        self.first_token(self.select_feature)
        if not self.layers or not all(0 <= layer <= self.num_layers + 1 for layer in self.layers):
            raise ConfigError(
                f"layers={self.layers} are not hidden-state indices; expected some of 0 to {self.num_layers + 1}."
            )
        if self.towers and sum(self.towers) != self.width:
            raise ConfigError(f"towers={self.towers} of a pair do not make up its width of {self.width}.")
        if self.embeds and (self.layers, self.select_feature) != ((self.num_layers + 1,), "cls_patch"):
            raise ConfigError("an embedding is made of every token of `last_hidden_state`, but the layers are others.")

    @property
    def takes_floats(self) -> bool:
        """Whether the engine takes prepared numbers, and not bytes."""
        return self.pixels == FLOAT

    @property
    def suffix(self) -> str:
        """What the name of a bundle ends in, if it ends with a head or takes bytes: "-projector-uint8"."""
        parts = [*([self.head.kind] if self.head else []), *([] if self.takes_floats else [self.pixels])]
        return "".join(f"-{part}" for part in parts)

    @property
    def of_floats(self) -> "TowerSpec":
        """The same tower, taking prepared numbers."""
        return replace(self, pixels=FLOAT, layout=NCHW)

    @property
    def num_patches_per_side(self) -> int:
        """The number of patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """N, the square of `num_patches_per_side`: like LLaVA, it never counts a CLS token."""
        return self.num_patches_per_side**2

    @property
    def num_tokens(self) -> int:
        """P + N, the number of tokens of a hidden state."""
        return self.num_prefix_tokens + self.num_patches

    @property
    def hidden_size(self) -> int:
        """D, the features per token of all layers that are read, concatenated."""
        return self.width * len(self.layers)

    @property
    def parts(self) -> tuple[int, ...]:
        """The widths of what is measured by itself in the engine's output: of each tower of a pair; else empty."""
        return () if self.head else self.towers * len(self.layers)

    @property
    def embeds(self) -> bool:
        """Whether the engine returns one vector for each image."""
        return self.head is not None and self.head.kind == EMBEDDING

    @property
    def depth(self) -> int:
        """The number of layers that must run to reach the deepest state that is read."""
        return min(max(self.layers), self.num_layers)

    @property
    def reads_final_norm(self) -> bool:
        """Whether `last_hidden_state` is read."""
        return self.num_layers + 1 in self.layers

    def reads(self, parameter: str) -> bool:
        """Whether what is read may depend on a parameter of the full model, given its name there.

        An embedding depends on all of them, except those in the embeddings that only training reads.
        """
        naming, layer = self.naming, self.naming.find_layer(parameter)
        if layer is not None and layer >= self.depth:
            return False
        unread = naming.unread if self.reads_final_norm else (*naming.unread, *naming.final_norm)
        unread = tuple(part for part in unread if part.startswith("embeddings.")) if self.embeds else unread
        return not f"{naming.inside(parameter)}.".startswith(tuple(f"{part}." for part in unread))

    @property
    def reading(self) -> str:
        """What is read, in words."""
        states = ", ".join(name_layer(layer, self.num_layers) for layer in self.layers)
        several = "s" if len(self.layers) > 1 else ""
        return f"hidden state{several} {states} of {self.num_layers} layers, {self.select_feature} tokens"

    @property
    def grid(self) -> tuple[int, int] | None:
        """How many tokens come before a square grid of what the engine returns, and its side; None without a grid."""
        if self.head is None:
            return self.num_prefix_tokens, self.num_patches_per_side
        tokens = self.head.tokens or 0
        sides = {prefix: isqrt(max(0, tokens - prefix)) for prefix in (0, self.num_prefix_tokens)}
        return next(((before, side) for before, side in sides.items() if side and side**2 == tokens - before), None)

    @property
    def first_read(self) -> int:
        """The index of the first token that the head reads; without a head the engine returns every token."""
        return self.first_token(self.select_feature) if self.head else 0

    def columns(self, layers: Sequence[int]) -> list[slice]:
        """Return the columns of hidden states in the concatenated (B, P + N, D), in the order of ``layers``."""
        starts = [self.layers.index(layer) * self.width for layer in layers]
        return [slice(start, start + self.width) for start in starts]

    def first_token(self, select_feature: str) -> int:
        """Return the index of the first token that a feature keeps; `patch` drops CLS and registers, if any."""
        check_name("select_feature", select_feature, FEATURES)
        return self.num_prefix_tokens if select_feature == "patch" else 0

    def input(self, precision: str) -> TensorSpec:
        """Describe the input tensor: normalised pixels (B, 3, S, S), or bytes in that shape or as (B, S, S, 3)."""
        sides = (self.image_size, self.image_size)
        shape = ("batch", 3, *sides) if self.layout == NCHW else ("batch", *sides, 3)
        dtype = PRECISIONS[precision].dtype if self.takes_floats else UINT8
        return TensorSpec(name="pixel_values", dtype=dtype, shape=shape)

    def output(self, precision: str) -> TensorSpec:
        """Describe the output tensor: the head's, or all tokens of the layers that are read, (B, P + N, D)."""
        name, row = self.head.output if self.head else ("hidden_states", (self.num_tokens, self.hidden_size))
        return TensorSpec(name=name, dtype=PRECISIONS[precision].dtype, shape=("batch", *row))
