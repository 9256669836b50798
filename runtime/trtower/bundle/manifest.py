"""tower.json as typed dataclasses: the description of a bundle.

The manifest is decoded strictly. An unknown key, a value of the wrong type, and a missing key without a default are all
errors, because a half-understood manifest would load another tower than the one that was exported.
"""

import dataclasses
import functools
import hashlib
import json
import re
import types
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from trtower.bundle.certificate import Certificate
from trtower.bundle.tuning import Tuning
from trtower.errors import BundleError, ConfigError
from trtower.flavour import FLAVOURS
from trtower.names import check_name
from trtower.spec import EIGHT_BIT, MB, PRECISIONS, BatchProfile, TensorSpec, TowerSpec, merge_profiles

MANIFEST = "tower.json"
GRAPH = "tower.onnx"
GRAPH_DATA = "tower.onnx.data"
FUSED_GRAPH = "tower.fused.onnx"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
GOLDEN = "golden.safetensors"
BUILD_NOTES = "BUILD.md"
PLANS = "plans"
"""The files of a bundle, and the folder of its plans.

The two graphs compute the same and share GRAPH_DATA. GRAPH holds only operators that every TensorRT since 10.3 knows.
FUSED_GRAPH has one node for each attention and RMS norm, for which ONNX Runtime has fast kernels. FP32 bundles, and
those exported before there were two graphs, lack it. Bundles exported before there were golden answers lack GOLDEN.
"""

SCHEMA = 6
"""Increased only if a key is removed or changes its meaning.

A new key has a default that keeps the meaning of every older manifest, so no bundle has to be exported again.
"""

NORM_ONLY_THE_POOLED = ("clip", "metaclip_2")
"""Families whose `last_hidden_state` does not pass the final norm, for manifests that lack `spec.naming`."""

TO_PAD = (
    "your code does the padding and tiling: use process_images([image], tower.image_processor, model.config) of "
    "llava.mm_utils, or for a model of transformers its own AutoProcessor"
)
"""What to call if `Source.image_aspect_ratio` is not None."""

PARSES_PLAIN, PARSES_ATTENTION, PARSES_RMS_NORMS = "10.3", "10.14", "10.15"
"""The first TensorRT for the graphs of FP32, for those of half precision, and for those of `RMS_NORMS`, in manifests
that do not say: before `first_tensorrt` came, graphs of half precision held the operator Attention, and some of them
RMSNormalization. The first is also the oldest TensorRT that trtower runs at all."""

RMS_NORMS = ("aimv2", "internvl_vision")
"""Families that may have RMS norms."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """Where the weights came from.

    ``weights_sha256`` hashes the checkpoint's tensors that the cut tower reads, in each dtype that a model may hold
    them in (see fingerprint.py), and ``head_sha256`` those of a head outside the tower, such as a projector. With
    ``random_weights`` the bundle is a rehearsal: its outputs mean nothing.
    ``image_aspect_ratio`` is how the model's own code pads or tiles pictures before the image processor sees them, such
    as "pad" or "anyres"; None if it does not. ``tower`` is the one chosen at export if the checkpoint holds several.
    """

    checkpoint: str
    revision: str | None
    weights_sha256: dict[str, str]
    random_weights: bool
    image_aspect_ratio: str | None = None
    tower: str | None = None
    head_sha256: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if "float32" not in self.weights_sha256:
            raise ConfigError("weights_sha256 has no float32, by which a check recognises the checkpoint.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerCost:
    """The size and cost of a tower; ``flop`` is for one image and counts a multiply-add as two.

    `trtower_export.graph.cost` documents how each is counted.
    """

    layers: int
    parameters: int
    flop: int

    def describe_cut(self, full: "TowerCost", precision: str) -> str:
        """Compare a cut tower with the ``full`` one in one line, with the size of the weights in ``precision``."""
        megabytes = ""
        if precision not in EIGHT_BIT:  # whose size depends on which layers are in 8 bits
            size = PRECISIONS[precision].itemsize / MB
            megabytes = f" ({self.parameters * size:.0f} of {full.parameters * size:.0f} MB)"
        return (
            f"{self.layers} of {full.layers} layers, "
            f"{self.parameters / 1e6:.1f} of {full.parameters / 1e6:.1f} M parameters{megabytes}, "
            f"{self.flop / 1e9:.1f} of {full.flop / 1e9:.1f} GFLOP an image"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """How many linear layers are in 8 bits, and on which images their ranges were measured."""

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

    ``workspace_mib`` is the GPU memory that a layer may use, ``optimization_level`` is 0 to 5. ``hardware_compatible``
    gives up speed to run on every GPU from Ampere on. A ``version_compatible`` plan also runs on TensorRT's lean
    runtime. ``stripped`` leaves the weights out: loading the plan refits them from the graph.
    """

    workspace_mib: int | None = None
    optimization_level: int | None = None
    hardware_compatible: bool = False
    version_compatible: bool = False
    stripped: bool = False

    def __post_init__(self) -> None:
        if self.workspace_mib is not None and not 1 <= self.workspace_mib <= MOST_WORKSPACE_MIB:
            raise ConfigError(f"--workspace-mib is {self.workspace_mib}; expected 1 to {MOST_WORKSPACE_MIB}.")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise ConfigError(f"--optimization-level is {self.optimization_level}; expected 0 to 5.")

    def options(self) -> list[str]:
        """List the options of `trtower build` that ask for these settings."""
        numbers = {"--workspace-mib": self.workspace_mib, "--optimization-level": self.optimization_level}
        flags = {
            "--hardware-compatible": self.hardware_compatible,
            "--version-compatible": self.version_compatible,
            "--strip": self.stripped,
        }
        options = [part for name, number in numbers.items() if number is not None for part in (name, str(number))]
        return [*options, *(name for name, is_on in flags.items() if is_on)]

    def describe(self) -> str:
        """Describe in a few words how a plan was built."""
        says = []
        if self.optimization_level is not None:
            says.append(f"at optimization level {self.optimization_level}")
        if self.workspace_mib is not None:
            says.append(f"with {self.workspace_mib} MiB of workspace")
        says += ["hardware-compatible"] if self.hardware_compatible else []
        says += ["version-compatible"] if self.version_compatible else []
        says += ["without its weights"] if self.stripped else []
        return ", ".join(says) or "with TensorRT's own settings"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanEntry:
    """One plan and what it needs to run.

    ``version`` is the TensorRT that built the plan; only that version runs it, full or, if the plan is
    version-compatible, lean. A plan with empty ``compute_capabilities`` is portable: it runs on every GPU from Ampere
    (8.0) on that this TensorRT supports.
    """

    file: str
    flavour: str
    version: str
    platform: str
    compute_capabilities: tuple[str, ...]
    settings: BuildSettings = dataclasses.field(default_factory=BuildSettings)

    def __post_init__(self) -> None:
        if self.settings.version_compatible and self.flavour != "tensorrt":
            raise ConfigError(f"{self.file} is version-compatible, which plans of {self.flavour} cannot be.")

    @property
    def log(self) -> str:
        """The file with TensorRT's messages from the build."""
        return f"{self.file.removesuffix('.plan')}.log"

    def replaces(self, other: "PlanEntry") -> bool:
        """Whether this plan is for the same GPUs, platform and TensorRT as another, whatever their settings."""
        same = ("flavour", "version", "platform", "compute_capabilities")
        return all(getattr(self, name) == getattr(other, name) for name in same)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """The named target of an export: where the bundle is served.

    ``flavour`` is the TensorRT of its plans, "" if a bundle does not say. ``accept_known_faults`` names the faults of
    that TensorRT that did not stop the export.
    """

    name: str
    flavour: str = ""
    compute_capabilities: tuple[str, ...] = ()
    accept_known_faults: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class BundleFacts:
    """The part of tower.json that `trtower inspect` repeats.

    ``full`` is the checkpoint's tower, and ``cut`` what is left of it in the graph. ``keep_fp32`` names the operations
    that stay in FP32 in a graph of lower precision. Only 8-bit precisions have a ``calibration``. Plans are tuned for
    the ``profiles``; the graph accepts any batch that they cover. ``first_tensorrt`` is the first data-centre TensorRT
    that can parse the graph. ``target`` is the deployment that the bundle was exported for, None if none was named.
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
    first_tensorrt: str = PARSES_ATTENTION
    target: Deployment | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest(BundleFacts):
    """The whole of tower.json.

    ``certificates`` holds the last of each kind for every backend, plan and GPU, oldest first, and ``tunings`` the last
    of every device.
    """

    files: dict[str, FileEntry]
    plans: tuple[PlanEntry, ...]
    certificates: tuple[Certificate, ...]
    tunings: tuple[Tuning, ...] = ()

    def __post_init__(self) -> None:
        check_name("precision", self.precision, tuple(PRECISIONS))
        if (self.precision in EIGHT_BIT) != (self.calibration is not None):
            raise ConfigError(f"precision {self.precision} does not go with calibration {self.calibration}.")
        tensors = (self.spec.input(self.precision), self.spec.output(self.precision))
        for tensor, expected in zip((self.input, self.output), tensors, strict=True):
            if tensor != expected:
                raise ConfigError(f"the tensor is {tensor}; the spec and precision require {expected}.")
        if not re.fullmatch(r"\d{1,4}(\.\d{1,4}){1,3}", self.first_tensorrt):
            raise ConfigError(f"first_tensorrt is {self.first_tensorrt!r}; expected a version such as 10.3.")
        if not self.profiles:
            raise ConfigError("profiles is empty; expected at least one.")
        merge_profiles(self.profiles)
        if (self.cut.layers, self.full.layers) != (self.spec.depth, self.spec.num_layers):
            raise ConfigError(
                f"cut has {self.cut.layers} of {self.full.layers} layers; the spec reads {self.spec.depth} of "
                f"{self.spec.num_layers}."
            )
        proved = [each.subject for each in self.certificates]
        if len(set(proved)) < len(proved):
            raise ConfigError("certificates has two of the same kind for the same files on the same backend and GPU.")
        if len({each.subject for each in self.tunings}) < len(self.tunings):
            raise ConfigError("tunings has two of the same device.")
        for plan in self.plans:
            check_name(f"flavour of {plan.file}", plan.flavour, tuple(FLAVOURS))

    @property
    def is_mixed(self) -> bool:
        """Whether the graph holds weights of several precisions."""
        return bool(self.keep_fp32 or self.calibration)

    @functools.cached_property
    def batch(self) -> BatchProfile:
        """The batches that the profiles cover together."""
        return merge_profiles(self.profiles)

    @functools.cached_property
    def tower_sha256(self) -> str:
        """The hash of everything that decides what the tower answers: all but plans, and what was found out since."""
        of_plans = {name for plan in self.plans for name in (plan.file, plan.log)}
        files = {name: file.sha256 for name, file in self.files.items() if name not in of_plans}
        decides = {"spec": dataclasses.asdict(self.spec), "precision": self.precision, "files": files}
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()

    @property
    def certificate(self) -> Certificate | None:
        """The newest certificate; None if there is none."""
        return self.certificates[-1] if self.certificates else None

    def to_json(self) -> str:
        """Return the text of tower.json."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Parse the text of tower.json; raise BundleError naming the key that is wrong."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as err:
            raise BundleError(f"tower.json is not JSON: {err}. Copy the bundle again.") from err
        schema = data.get("schema") if isinstance(data, dict) else None
        if type(schema) is not int or schema < 1:
            raise BundleError("tower.json has no schema number, so it is not the manifest of a bundle.")
        if schema < SCHEMA:
            raise BundleError(
                f"tower.json has schema {schema}, from an older trtower; this one reads {SCHEMA}. Export the bundle "
                "again, with --overwrite."
            )
        if schema > SCHEMA:
            raise BundleError(f"tower.json has schema {schema}; this trtower reads {SCHEMA}. Install a newer trtower.")
        spec = data.get("spec")
        if isinstance(spec, dict) and spec.get("family") in NORM_ONLY_THE_POOLED:
            spec.setdefault("naming", {"final_norm": [], "unread": ["post_layernorm"]})
        if isinstance(name := data.get("target"), str):  # the name was all that the first manifests with a target had
            data["target"] = {"name": name} if name else None
        if data.get("precision") == "fp32":
            data.setdefault("first_tensorrt", PARSES_PLAIN)
        elif isinstance(spec, dict) and spec.get("family") in RMS_NORMS:
            data.setdefault("first_tensorrt", PARSES_RMS_NORMS)
        try:
            manifest: Manifest = _decode(cls, data, "tower.json")
        except ConfigError as err:
            raise BundleError(f"tower.json contradicts itself: {err} Copy the bundle or export it again.") from err
        return manifest


def _decode(kind: Any, data: Any, where: str) -> Any:
    """Turn JSON into ``kind``: a dataclass, tuple, dict with string keys, union with None, or plain value."""
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
        message = "{} does not match schema {}: missing {}; unknown {}. Copy the bundle again, or update trtower."
        raise BundleError(message.format(where, SCHEMA, *named))
    return kind(**{key: _decode(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _expect(kind: type[T], data: Any, where: str) -> T:
    if type(data) is not kind:
        raise BundleError(f"{where} is {data!r}; expected {kind.__name__}. Copy the bundle or export it again.")
    return data
