"""tower.json, typed: what a bundle says of itself.

The manifest is decoded strictly. A key that is unknown or of another type is an error, and so is one that is missing
unless it has a default, because a manifest that is half understood would load a tower that is half the one that was
exported.
"""

import dataclasses
import functools
import json
import types
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from trtower.bundle.certificate import Certificate
from trtower.errors import BundleError, ConfigError
from trtower.flavour import FLAVOURS
from trtower.names import check_name
from trtower.spec import EIGHT_BIT, MB, PRECISIONS, BatchProfile, TensorSpec, TowerSpec, merge_profiles

MANIFEST = "tower.json"
GRAPH = "tower.onnx"
GRAPH_DATA = "tower.onnx.data"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
PLANS = "plans"
"""The files of a bundle, and the folder of its plans."""

SCHEMA = 6
"""Raised only if a key is removed or changes its meaning.

A new key has a default with which every manifest that lacks it means what it meant, so no bundle is exported again.
"""

NORM_ONLY_THE_POOLED = ("clip", "metaclip_2")
"""Families whose final norm is not on the way to `last_hidden_state`, for manifests that lack `spec.naming`."""

TO_PAD = (
    "padding and tiling stay with you: process_images([image], tower.image_processor, model.config) of llava.mm_utils, "
    "or for a model of transformers its own AutoProcessor"
)
"""What to call for a tower whose `Source.image_aspect_ratio` is not None."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where the weights came from.

    ``weights_sha256`` is over the tensors of the checkpoint that the cut tower was made of, in each dtype that a model
    may hold them in (see fingerprint.py). With ``random_weights`` the bundle is a rehearsal: its answers mean nothing.
    ``image_aspect_ratio`` is how the model's own code pads or tiles pictures before the image processor sees them, such
    as "pad" or "anyres"; None if it does not. ``tower`` was named at export, in a checkpoint that holds several.
    """

    checkpoint: str
    revision: str | None
    weights_sha256: dict[str, str]
    random_weights: bool
    image_aspect_ratio: str | None = None
    tower: str | None = None

    def __post_init__(self) -> None:
        if "float32" not in self.weights_sha256:
            raise ConfigError("weights_sha256 has no float32, by which a check knows the checkpoint.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerCost:
    """What a tower is and what it costs; ``flop`` are those of one image, two for a multiply-add.

    How each is counted stands in `trtower_export.graph.cost`.
    """

    layers: int
    parameters: int
    flop: int

    def describe_cut(self, full: "TowerCost", precision: str) -> str:
        """Say in one line what this is of the ``full`` tower, and how much that is in a precision."""
        megabytes = ""
        if precision not in EIGHT_BIT:  # in which the size depends on the layers that are
            size = PRECISIONS[precision].itemsize / MB
            megabytes = f" ({self.parameters * size:.0f} of {full.parameters * size:.0f} MB)"
        return (
            f"{self.layers} of {full.layers} layers, "
            f"{self.parameters / 1e6:.1f} of {full.parameters / 1e6:.1f} M parameters{megabytes}, "
            f"{self.flop / 1e9:.1f} of {full.flop / 1e9:.1f} GFLOP an image"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """How many linear layers are in 8 bits, and the images that their ranges were found on."""

    layers: int
    images: int
    images_sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file of the bundle; ``size`` in bytes."""

    sha256: str
    size: int


MOST_WORKSPACE_MIB = 1 << 24
"""16 TiB, more than any GPU has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """How a plan was built; None is TensorRT's default.

    ``workspace_mib`` of GPU memory a layer may use, ``optimization_level`` 0 to 5. ``hardware_compatible`` gives up
    speed to run on every GPU from Ampere on. ``stripped`` leaves the weights out: they are refitted from the graph when
    the plan is loaded.
    """

    workspace_mib: int | None = None
    optimization_level: int | None = None
    hardware_compatible: bool = False
    stripped: bool = False

    def __post_init__(self) -> None:
        if self.workspace_mib is not None and not 1 <= self.workspace_mib <= MOST_WORKSPACE_MIB:
            raise ConfigError(f"--workspace-mib {self.workspace_mib}: 1 to {MOST_WORKSPACE_MIB} is expected.")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise ConfigError(f"--optimization-level {self.optimization_level}: 0 to 5 is expected.")

    def describe(self) -> str:
        """Say in a few words how a plan was built."""
        says = []
        if self.optimization_level is not None:
            says.append(f"at optimization level {self.optimization_level}")
        if self.workspace_mib is not None:
            says.append(f"with {self.workspace_mib} MiB of workspace")
        says += ["hardware-compatible"] if self.hardware_compatible else []
        says += ["without its weights"] if self.stripped else []
        return ", ".join(says) or "with TensorRT's own settings"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanEntry:
    """One plan and what it needs.

    ``version`` is the TensorRT that built it, which must be the one that runs it. An empty
    ``compute_capabilities`` is the portable form: every GPU from Ampere (8.0) on that this TensorRT supports.
    """

    file: str
    flavour: str
    version: str
    platform: str
    compute_capabilities: tuple[str, ...]
    settings: BuildSettings = dataclasses.field(default_factory=BuildSettings)

    @property
    def log(self) -> str:
        """The file with what TensorRT said while it built the plan."""
        return f"{self.file.removesuffix('.plan')}.log"

    def replaces(self, other: "PlanEntry") -> bool:
        """Whether this plan is for the same GPUs and the same TensorRT as another."""
        same = ("flavour", "version", "platform", "compute_capabilities")
        return all(getattr(self, name) == getattr(other, name) for name in same)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BundleFacts:
    """What tower.json says of the tower, and `trtower inspect` says again.

    ``full`` is the tower of the checkpoint, and ``cut`` what is left of it in the graph. ``keep_fp32`` are the
    operations that stay in FP32 inside a graph of lower precision, by their names in it; 8 bits have a ``calibration``.
    ``profiles`` are what plans are tuned for; the graph takes any batch that they cover.
    """

    schema: int
    name: str
    trtower: str
    spec: TowerSpec
    full: TowerCost
    cut: TowerCost
    source: Source
    precision: str
    keep_fp32: tuple[str, ...]
    calibration: Calibration | None
    input: TensorSpec
    output: TensorSpec
    profiles: tuple[BatchProfile, ...]
    versions: dict[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest(BundleFacts):
    """All of tower.json.

    ``certificates`` has the last check of every backend, and of every plan, in the order in which they were made.
    """

    files: dict[str, FileEntry]
    plans: tuple[PlanEntry, ...]
    certificates: tuple[Certificate, ...]

    def __post_init__(self) -> None:
        check_name("precision", self.precision, tuple(PRECISIONS))
        if (self.precision in EIGHT_BIT) != (self.calibration is not None):
            raise ConfigError(f"precision {self.precision} and calibration {self.calibration} contradict each other.")
        tensors = (self.spec.input(self.precision), self.spec.output(self.precision))
        for found, expected in zip((self.input, self.output), tensors, strict=True):
            if found != expected:
                raise ConfigError(f"{found} is not what the spec makes of it: {expected}.")
        if not self.profiles:
            raise ConfigError("profiles is empty: one at least is expected.")
        merge_profiles(self.profiles)
        if (self.cut.layers, self.full.layers) != (self.spec.depth, self.spec.num_layers):
            raise ConfigError(
                f"{self.cut.layers} of {self.full.layers} layers are counted; the spec reads {self.spec.depth} of "
                f"{self.spec.num_layers}."
            )
        checked = [(each.backend, each.executed) for each in self.certificates]
        if len(set(checked)) < len(checked):
            raise ConfigError("certificates has two of the same files on the same backend.")
        for plan in self.plans:
            check_name(f"flavour of {plan.file}", plan.flavour, tuple(FLAVOURS))

    @property
    def is_mixed(self) -> bool:
        """Whether the graph holds weights of several precisions."""
        return bool(self.keep_fp32 or self.calibration)

    @functools.cached_property
    def batch(self) -> BatchProfile:
        """What one call takes, over all profiles."""
        return merge_profiles(self.profiles)

    @property
    def certificate(self) -> Certificate | None:
        """The certificate of the last check."""
        return self.certificates[-1] if self.certificates else None

    def to_json(self) -> str:
        """Write the text of tower.json."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Read the text of tower.json; raise BundleError saying which key is wrong."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as err:
            raise BundleError(f"tower.json is not JSON: {err}. Copy the bundle again.") from err
        schema = data.get("schema") if isinstance(data, dict) else None
        if type(schema) is not int or schema < 1:
            raise BundleError("tower.json has no schema number, so it is not a bundle's manifest.")
        if schema < SCHEMA:
            raise BundleError(
                f"tower.json has schema {schema}, of an older trtower; this one reads {SCHEMA}: export it again, with "
                "--overwrite."
            )
        if schema > SCHEMA:
            raise BundleError(f"tower.json has schema {schema}; this trtower reads {SCHEMA}: install a newer trtower.")
        spec = data.get("spec")
        if isinstance(spec, dict) and spec.get("family") in NORM_ONLY_THE_POOLED:
            spec.setdefault("naming", {"final_norm": [], "unread": ["post_layernorm"]})
        try:
            manifest: Manifest = _decode(cls, data, "tower.json")
        except ConfigError as err:
            raise BundleError(f"tower.json contradicts itself: {err}") from err
        return manifest


def _decode(kind: Any, data: Any, where: str) -> Any:
    """Turn JSON into ``kind``: dataclasses, tuples, dicts of strings, unions with None, and plain values."""
    if dataclasses.is_dataclass(kind):
        return _decode_fields(kind, _expect(dict, data, where), where)
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple:
        return tuple(_decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(_expect(list, data, where)))
    if origin is dict:
        return {key: _decode(args[1], item, f"{where}.{key}") for key, item in _expect(dict, data, where).items()}
    if origin is types.UnionType:
        if data is None and types.NoneType in args:
            return None
        choices = [arg for arg in args if arg is not types.NoneType]
        return _decode(next((c for c in choices if type(data) is c), choices[0]), data, where)
    if kind is float and type(data) is int:
        return float(data)
    return _expect(kind, data, where)


def _decode_fields(kind: Any, data: Mapping[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    missing = {field.name for field in dataclasses.fields(kind) if not _has_default(field)} - data.keys()
    unknown = data.keys() - hints.keys()
    if missing or unknown:
        named = (", ".join(sorted(keys)) or "none" for keys in (missing, unknown))
        raise BundleError("{} has other keys than schema {}: missing {}; unknown {}.".format(where, SCHEMA, *named))
    return kind(**{key: _decode(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _expect(kind: type[T], data: Any, where: str) -> T:
    if type(data) is not kind:
        raise BundleError(f"{where} is {data!r}; {kind.__name__} is expected.")
    return data
