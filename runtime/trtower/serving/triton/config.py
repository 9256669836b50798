"""A model's config.pbtxt, made with Triton's own messages, so that a misspelt field or a wrong type cannot be written.

One function for each kind of model that a repository may hold: a tower that trtower runs, a plan that Triton's TensorRT
backend runs, and for a tower of bytes the preparation of encoded pictures and the ensemble of both.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trtower.bundle.manifest import Manifest
from trtower.errors import ConfigError
from trtower.extras import import_extra
from trtower.names import check_name
from trtower.serving.tensors import IMAGE, PIXEL_VALUES, wire_type
from trtower.spec import BY_DTYPE, profile_batches

PLATFORMS = PYTHON, PLAN = ("python", "tensorrt_plan")
KINDS = AUTO, CPU, GPU = ("auto", "cpu", "gpu")


@dataclass(frozen=True, kw_only=True)
class TritonOptions:
    """How a bundle is served.

    Attributes:
        platform: "python" runs the bundle through trtower on whatever backend is there, "tensorrt_plan" a data-centre
            plan without any Python.
        backend: The backend, as in `VisionTower.load`; for the platform "python".
        instances: How many towers run side by side, on each GPU or on the CPU.
        kind: Where: "cpu", "gpu", or "auto" for a GPU if the server has one.
        max_queue_delay_ms: How long a request waits for others that it may run with.
        max_queue_size: Requests that wait at most; further ones are refused. 0 is without end.
        timeout_ms: How long a request waits at most before it is refused; 0 is without end. Clients may shorten it.
        allow_uncertified: Serve a bundle without a certificate for the backend that runs, and a rehearsal.

    Raises:
        ConfigError: An option is invalid.
    """

    platform: str = PYTHON
    backend: str = "auto"
    instances: int = 1
    kind: str = AUTO
    max_queue_delay_ms: float = 0.0
    max_queue_size: int = 1024
    timeout_ms: float = 0.0
    allow_uncertified: bool = False

    def __post_init__(self) -> None:
        check_name("platform", self.platform, PLATFORMS)
        check_name("kind of instance", self.kind, KINDS)
        if self.platform == PLAN and self.kind == CPU:
            raise ConfigError(f"a plan runs on a GPU only: leave out kind {CPU!r}, or use platform {PYTHON!r}.")
        if self.instances < 1:
            raise ConfigError(f"instances={self.instances}; expected at least 1.")
        for name in ("max_queue_delay_ms", "max_queue_size", "timeout_ms"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name}={getattr(self, name)}; expected a number of at least 0.")


def messages() -> Any:
    """Import Triton's messages; raise MissingExtraError if they are not installed."""
    return import_extra("tritonclient.grpc.model_config_pb2", extra="triton", purpose="making a model repository")


def as_text(config: Any) -> str:
    """Return a config as the text of config.pbtxt."""
    text_format = import_extra("google.protobuf.text_format", extra="triton", purpose="making a model repository")
    return str(text_format.MessageToString(config))


def tower_config(name: str, manifest: Manifest, row: Sequence[int], options: TritonOptions) -> Any:
    """Describe a tower that trtower runs, whose features of one image have the shape ``row``."""
    config = _served(name, manifest, options)
    config.backend = PYTHON
    config.output.add(name=manifest.output.name, data_type=_type(manifest.output.dtype), dims=row)
    certificate = "false" if options.allow_uncertified else "true"
    _set(config, {"backend": options.backend, "require_certificate": certificate, **_facts(manifest)})
    _instances(config, options)
    return config


def plan_config(name: str, manifest: Manifest, files: Mapping[str, str], options: TritonOptions) -> Any:
    """Describe a plan: ``files`` maps compute capabilities to the plans for them, "" to the one for all others."""
    config = _served(name, manifest, options, is_plan=True)
    config.platform = PLAN
    output = manifest.output
    config.output.add(name=output.name, data_type=_type(output.dtype, is_plan=True), dims=output.row)
    for capability, file in files.items():
        if capability:
            config.cc_model_filenames[capability] = file
        else:
            config.default_model_filename = file
    graphs = config.optimization.cuda
    graphs.graphs = True
    for size in profile_batches(manifest.profiles):
        spec = graphs.graph_spec.add(batch_size=size)
        spec.input[manifest.input.name].dim.extend(manifest.input.row)
    _set(config, _facts(manifest))
    _instances(config, options, profiles=range(len(manifest.profiles)))
    return config


def pictures_config(name: str, manifest: Manifest, options: TritonOptions, limits: Mapping[str, int]) -> Any:
    """Describe the preparation of encoded pictures for a tower that takes bytes."""
    config = _batched(name, manifest, options)
    config.backend = PYTHON
    config.input.add(name=IMAGE, data_type=messages().TYPE_STRING, dims=[1])
    config.output.add(name=PIXEL_VALUES, data_type=_type(manifest.input.dtype), dims=manifest.input.row)
    _set(config, {key: str(value) for key, value in limits.items()})
    config.instance_group.add(kind=messages().ModelInstanceGroup.KIND_CPU, count=1)
    return config


def ensemble_config(name: str, prepares: str, runs: str, manifest: Manifest, row: Sequence[int]) -> Any:
    """Describe the ensemble of the model that ``prepares`` encoded pictures and the tower that ``runs``."""
    config = messages().ModelConfig(name=name, platform="ensemble", max_batch_size=manifest.batch.max)
    config.input.add(name=IMAGE, data_type=messages().TYPE_STRING, dims=[1])
    config.output.add(name=manifest.output.name, data_type=_type(manifest.output.dtype), dims=row)
    for model, taken, given in ((prepares, IMAGE, PIXEL_VALUES), (runs, PIXEL_VALUES, manifest.output.name)):
        step = config.ensemble_scheduling.step.add(model_name=model, model_version=-1)
        step.input_map[taken] = taken
        step.output_map[given] = given
    return config


def _served(name: str, manifest: Manifest, options: TritonOptions, *, is_plan: bool = False) -> Any:
    """Describe what every tower has: its input, batches as in the profiles, and a call of each before it is ready."""
    config = _batched(name, manifest, options)
    row, dtype = manifest.input.row, _type(manifest.input.dtype, is_plan=is_plan)
    config.input.add(name=PIXEL_VALUES, data_type=dtype, dims=row)
    for size in profile_batches(manifest.profiles):
        pixels = config.model_warmup.add(name=f"batch {size}", batch_size=size).inputs[PIXEL_VALUES]
        pixels.data_type, pixels.zero_data = dtype, True
        pixels.dims.extend(row)
    return config


def _batched(name: str, manifest: Manifest, options: TritonOptions) -> Any:
    """Describe a model that Triton batches."""
    config = messages().ModelConfig(name=name, max_batch_size=manifest.batch.max)
    config.version_policy.latest.num_versions = 1
    batching = config.dynamic_batching
    batching.preferred_batch_size.extend(size for size in profile_batches(manifest.profiles) if size > 1)
    batching.max_queue_delay_microseconds = round(options.max_queue_delay_ms * 1000)
    policy = batching.default_queue_policy
    policy.timeout_action = messages().ModelQueuePolicy.REJECT
    policy.default_timeout_microseconds = round(options.timeout_ms * 1000)
    policy.allow_timeout_override = True
    policy.max_queue_size = options.max_queue_size
    return config


def _instances(config: Any, options: TritonOptions, profiles: Sequence[int] = ()) -> None:
    kind = f"KIND_{GPU if config.platform == PLAN else options.kind}".upper()
    group = config.instance_group.add(kind=getattr(messages().ModelInstanceGroup, kind), count=options.instances)
    group.profile.extend(map(str, profiles))


def _facts(manifest: Manifest) -> dict[str, str]:
    """Say whose features these are, for clients that ask for the config."""
    return {"bundle": manifest.name, "checkpoint": manifest.source.checkpoint, "tower_sha256": manifest.tower_sha256}


def _set(config: Any, parameters: Mapping[str, str]) -> None:
    for key, value in parameters.items():
        config.parameters[key].string_value = value


def _type(dtype: str, *, is_plan: bool = False) -> Any:
    """Return Triton's type of a tensor."""
    return getattr(messages(), f"TYPE_{BY_DTYPE[dtype].triton if is_plan and dtype in BY_DTYPE else wire_type(dtype)}")
