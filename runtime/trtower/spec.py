"""What a tower is, in numbers: layers, features, tokens, shapes. No torch.

Letters used for shapes everywhere: B images, S pixels a side, P prefix tokens (CLS and registers),
N patches, D features a token.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from trtower.errors import ConfigError, InputError
from trtower.layer_codes import FEATURES, name_layer
from trtower.names import check_name

MB, MIB = 10**6, 1 << 20


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What weights and activations are in, and what each library calls it.

    ``dtype`` is the name in torch and in a manifest, ``onnx`` the number in ONNX's TensorProto, ``tensorrt`` the name
    in TensorRT's DataType, and ``openvino`` the name in OpenVINO's Type. GPUs before compute capability
    ``first_capability`` lack the format, and TensorRT refuses the graph for them. Graphs are written in ``opset``: 23
    gives one Attention node a layer, which TensorRT-RTX 1.7 has kernels for only in half precision.

    An 8-bit precision is another one whose linear layers have weights of the type ``onnx_linear``, ONNX's number again.
    """

    name: str
    dtype: str
    itemsize: int
    onnx: int
    tensorrt: str
    openvino: str
    opset: int = 23
    first_capability: float = 0.0
    onnx_linear: int = 0  # UNDEFINED


FP16 = Precision(name="fp16", dtype="float16", itemsize=2, onnx=10, tensorrt="HALF", openvino="f16")
_ROWS = (
    FP16,
    replace(FP16, name="bf16", dtype="bfloat16", onnx=16, tensorrt="BF16", openvino="bf16", first_capability=8.0),
    Precision(name="fp32", dtype="float32", itemsize=4, onnx=1, tensorrt="FLOAT", openvino="f32", opset=20),
    replace(FP16, name="fp8", onnx_linear=17, first_capability=8.9),
    replace(FP16, name="int8", onnx_linear=3),
)

PRECISIONS = {each.name: each for each in _ROWS}
EIGHT_BIT = tuple(name for name, each in PRECISIONS.items() if each.onnx_linear)
BY_DTYPE = {each.dtype: each for each in PRECISIONS.values() if not each.onnx_linear}
"""The precision in which everything has that dtype."""
HALVES = tuple(each.name for each in BY_DTYPE.values() if each.itemsize == 2)

MOST_IMAGES = 65536
"""In one call: beyond any GPU's memory, and within what TensorRT counts with."""


@dataclass(frozen=True, kw_only=True)
class BatchProfile:
    """How many images one engine call takes: at least, as tuned, at most (TensorRT's min, opt, max)."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ConfigError(
                f"batch profile {self.min} {self.opt} {self.max} is out of order: "
                "1 <= MIN <= OPT <= MAX is expected, such as 1 8 32."
            )
        if self.max > MOST_IMAGES:
            raise ConfigError(f"batch profile {self.min} {self.opt} {self.max}: {MOST_IMAGES} images are the most.")

    def pieces(self, batch: int) -> Iterator[tuple[int, int]]:
        """Cut ``batch`` images into ranges that one engine call takes each.

        A rest below the minimum is topped up with images of the range before it, which are then
        computed twice; a whole batch below the minimum is refused.
        """
        if batch < self.min:
            raise InputError(f"images has batch {batch}; this engine takes {self.min} to {self.max} at once.")
        for start in range(0, batch, self.max):
            stop = min(start + self.max, batch)
            yield min(start, stop - self.min), stop


DEFAULT_BATCH = BatchProfile(min=1, opt=8, max=32)
"""What a bundle is tuned for, unless another is named."""


def merge_profiles(profiles: Sequence[BatchProfile]) -> BatchProfile:
    """Give what several profiles take together, tuned as the last.

    Raises ConfigError where they leave a batch out, and where two are the same.
    """
    for index, profile in enumerate(profiles):
        if profile in profiles[:index]:
            raise ConfigError(f"batch profile {profile.min} {profile.opt} {profile.max} is named twice.")
    ordered = sorted(profiles, key=lambda profile: profile.min)
    reached = ordered[0].max
    for profile in ordered[1:]:
        if profile.min > reached + 1:
            each = ", ".join(f"{p.min} {p.opt} {p.max}" for p in profiles)
            raise ConfigError(f"batch profiles {each} leave out {reached + 1} to {profile.min - 1} images.")
        reached = max(reached, profile.max)
    return BatchProfile(min=ordered[0].min, opt=profiles[-1].opt, max=reached)


def profile_batches(profiles: Sequence[BatchProfile]) -> list[int]:
    """List the batches that profiles name: least, as tuned, most."""
    return sorted({size for profile in profiles for size in (profile.min, profile.opt, profile.max)})


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of the graph: its name, dtype, and shape with the batch written as "batch"."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class Naming:
    """What transformers calls the parts of the model that a tower was cut from, so that a bundle knows it again.

    Names are dotted, as in `named_parameters()`, and each field lists what its part may be called. They count from
    inside ``wrapper``, a module that some releases of transformers put around the whole tower; those of the list of
    ``layers`` may lie anywhere. ``final_norm`` turns hidden state L into `last_hidden_state`; if it is empty, the two
    are one state. No hidden state depends on what is ``unread``. The ``config_fields`` decide what a tower computes,
    beside its weights.
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

    def inside(self, parameter: str) -> str:
        """Return the name of a parameter as it counts from inside the wrapper, if there is one."""
        return parameter.removeprefix(f"{self.wrapper}.")

    def find_layer(self, parameter: str) -> int | None:
        """Return the index of the layer that a parameter is part of; None if it is outside the layers."""
        layers = "|".join(map(re.escape, self.layers))
        found = re.search(rf"(?:^|\.)(?:{layers})\.(\d+)\.", parameter)
        return int(found[1]) if found else None


@dataclass(frozen=True, kw_only=True)
class TowerSpec:
    """A cut tower of ``num_layers`` layers L.

    ``layers`` are hidden-state indices 0 to L, as read; L + 1 is `last_hidden_state` (see layer_codes.py).
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

    def __post_init__(self) -> None:
        if min(self.image_size, self.patch_size, self.num_layers, self.width) < 1 or self.num_prefix_tokens < 0:
            raise ConfigError(
                f"a tower of {self.image_size} pixels, {self.patch_size} a patch, {self.num_layers} layers "
                f"of {self.width} cannot be: all are 1 at least."
            )
        self.first_token(self.select_feature)
        if not self.layers or not all(0 <= layer <= self.num_layers + 1 for layer in self.layers):
            raise ConfigError(f"layers={self.layers} are not hidden-state indices: 0 to {self.num_layers + 1} are.")

    @property
    def num_patches_per_side(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """N: the square of the side, with or without a CLS token, as LLaVA counts."""
        return self.num_patches_per_side**2

    @property
    def num_tokens(self) -> int:
        """P + N: the tokens that the engine gives."""
        return self.num_prefix_tokens + self.num_patches

    @property
    def hidden_size(self) -> int:
        """D: the layers that are read, concatenated."""
        return self.width * len(self.layers)

    @property
    def depth(self) -> int:
        """How many layers must run for the deepest state that is read."""
        return min(max(self.layers), self.num_layers)

    @property
    def reads_final_norm(self) -> bool:
        """Whether `last_hidden_state` is among what is read."""
        return self.num_layers + 1 in self.layers

    def reads(self, parameter: str) -> bool:
        """Return whether a state that is read may depend on a parameter of the full model, by its name there."""
        naming, layer = self.naming, self.naming.find_layer(parameter)
        if layer is not None and layer >= self.depth:
            return False
        unread = naming.unread if self.reads_final_norm else (*naming.unread, *naming.final_norm)
        return not f"{naming.inside(parameter)}.".startswith(tuple(f"{part}." for part in unread))

    @property
    def reading(self) -> str:
        """Say what is read, in words."""
        states = ", ".join(name_layer(layer, self.num_layers) for layer in self.layers)
        several = "s" if len(self.layers) > 1 else ""
        return f"hidden state{several} {states} of {self.num_layers} layers, {self.select_feature} tokens"

    def columns(self, layers: Sequence[int]) -> list[slice]:
        """Find hidden states that are held among the concatenated ones, (B, P + N, D), in the order asked for."""
        starts = [self.layers.index(layer) * self.width for layer in layers]
        return [slice(start, start + self.width) for start in starts]

    def first_token(self, select_feature: str) -> int:
        """Give the index of the first token that a feature keeps; `patch` drops CLS and registers, where there are."""
        check_name("select_feature", select_feature, FEATURES)
        return self.num_prefix_tokens if select_feature == "patch" else 0

    def input(self, precision: str) -> TensorSpec:
        """Describe the tensor that enters: normalised pixels, (B, 3, S, S)."""
        shape = ("batch", 3, self.image_size, self.image_size)
        return TensorSpec(name="pixel_values", dtype=PRECISIONS[precision].dtype, shape=shape)

    def output(self, precision: str) -> TensorSpec:
        """Describe the tensor that leaves: all tokens of the layers read, (B, P + N, D)."""
        shape = ("batch", self.num_tokens, self.hidden_size)
        return TensorSpec(name="hidden_states", dtype=PRECISIONS[precision].dtype, shape=shape)
