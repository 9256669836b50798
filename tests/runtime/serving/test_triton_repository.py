"""A model repository is whole, says what Triton may do with the model, and is refused if it could not be served."""

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as messages

from tests.conftest import Bundles
from trtower import BuildError, Bundle, BundleError, ConfigError
from trtower.bundle.manifest import BuildSettings, PlanEntry
from trtower.bundle.staging import locked
from trtower.cli import run
from trtower.serving.triton.config import TritonOptions
from trtower.serving.triton.repository import write_repository
from trtower.spec import BatchProfile

ANYWAY = TritonOptions(allow_uncertified=True)
PLAN = TritonOptions(platform="tensorrt_plan", allow_uncertified=True)


def read(folder: Path) -> Any:
    return text_format.Parse((folder / "config.pbtxt").read_text(encoding="utf-8"), messages.ModelConfig())


def copied(bundle: Path, folder: Path) -> Path:
    return Path(shutil.copytree(bundle, folder))


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_model_holds_the_bundle_and_a_line_of_code(certified: Path, tmp_path: Path) -> None:
    (model,) = write_repository([certified], tmp_path / "models")
    assert model == tmp_path / "models" / "tower"
    bundle = model / "1" / "bundle"
    assert files(model) == {"config.pbtxt", "1/model.py", *(f"1/bundle/{name}" for name in files(certified))}
    assert Bundle.open(bundle).altered() == []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [".models.lock"]


@pytest.mark.parametrize(
    ("options", "dtype", "size"),
    [
        ({"precision": "fp16"}, messages.TYPE_FP16, [3, 42, 42]),
        ({"precision": "fp32"}, messages.TYPE_FP32, [3, 42, 42]),
        ({"precision": "bf16"}, messages.TYPE_FP32, [3, 42, 42]),
        ({"pixels": "uint8", "layout": "nhwc"}, messages.TYPE_UINT8, [42, 42, 3]),
    ],
)
def test_config_has_the_tensors_of_the_bundle(
    bundles: Bundles, tmp_path: Path, options: dict[str, str], dtype: int, size: list[int]
) -> None:
    bundle = copied(bundles(**options), tmp_path / "tower")
    write_repository([bundle], tmp_path / "models", ANYWAY)
    config = read(tmp_path / "models" / "tower")
    (given,), (returned,) = config.input, config.output
    assert (given.name, given.data_type, given.dims) == ("pixel_values", dtype, size)
    of_features = messages.TYPE_FP16 if options.get("precision") == "fp16" else messages.TYPE_FP32
    assert (returned.name, returned.data_type, returned.dims) == ("hidden_states", of_features, [9, 64])


def test_config_batches_as_the_profiles_do(export: Callable[..., Path], tmp_path: Path) -> None:
    profiles = (BatchProfile(min=1, opt=1, max=1), BatchProfile(min=1, opt=3, max=8))
    bundle = copied(export("clip", precision="fp32", flavour="none", profiles=profiles), tmp_path / "tower")
    options = replace(ANYWAY, max_queue_delay_ms=1.5, max_queue_size=77, timeout_ms=250, instances=3, kind="cpu")
    write_repository([bundle], tmp_path / "models", options)
    config = read(tmp_path / "models" / "tower")
    assert config.max_batch_size == 8
    assert config.dynamic_batching.preferred_batch_size == [3, 8]
    assert config.dynamic_batching.max_queue_delay_microseconds == 1500
    policy = config.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.default_timeout_microseconds) == (77, 250_000)
    assert policy.timeout_action == messages.ModelQueuePolicy.REJECT
    assert policy.allow_timeout_override
    assert [each.batch_size for each in config.model_warmup] == [1, 3, 8]
    (group,) = config.instance_group
    assert (group.count, group.kind) == (3, messages.ModelInstanceGroup.KIND_CPU)
    assert config.version_policy.latest.num_versions == 1


def test_bundle_of_bytes_also_takes_encoded_pictures(bundles: Bundles, tmp_path: Path) -> None:
    bundle = copied(bundles(pixels="uint8"), tmp_path / "tower")
    (model,) = write_repository([bundle], tmp_path / "models", ANYWAY)
    assert model.name == "tower-encoded"
    config = read(model)
    assert (config.platform, config.max_batch_size) == ("ensemble", 4)
    assert [step.model_name for step in config.ensemble_scheduling.step] == ["tower-prepare", "tower"]
    (image,) = config.input
    assert (image.name, image.data_type, image.dims) == ("image", messages.TYPE_STRING, [1])
    assert config.output == read(tmp_path / "models" / "tower").output
    assert (model / "1").is_dir()
    assert files(tmp_path / "models" / "tower-prepare") == {"config.pbtxt", "1/model.py", "1/preprocessor_config.json"}


# Plans


def add_plan(bundle: Path, capabilities: tuple[str, ...], *, version: str = "10.3.0", **settings: Any) -> str:
    """Add something in the place of a plan, as TensorRT would have built it."""
    with locked(bundle):
        name = f"plans/tensorrt-{version}.{'-'.join(capabilities)}.plan"
        (bundle / ".plan").write_bytes(name.encode())
        entry = PlanEntry(
            file=name,
            flavour="tensorrt",
            version=version,
            platform="linux_x86_64",
            compute_capabilities=capabilities,
            settings=BuildSettings(**settings),
        )
        log = bundle / ".log"
        log.write_text("", encoding="utf-8")
        Bundle.open(bundle).add_plan(entry, bundle / ".plan", log)
    return Path(name).name


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_plans_are_chosen_by_gpu(bundles: Bundles, tmp_path: Path, precision: str) -> None:
    bundle = copied(bundles(precision=precision), tmp_path / "tower")
    names = [add_plan(bundle, ("8.0",)), add_plan(bundle, ("8.9", "9.0"))]
    (model,) = write_repository([bundle], tmp_path / "models", PLAN)
    config = read(model)
    assert config.platform == "tensorrt_plan"
    assert dict(config.cc_model_filenames) == {"8.0": names[0], "8.9": names[1], "9.0": names[1]}
    assert files(model) == {"config.pbtxt", *(f"1/{name}" for name in names)}
    dtype = messages.TYPE_BF16 if precision == "bf16" else messages.TYPE_FP16
    assert {config.input[0].data_type, config.output[0].data_type} == {dtype}
    assert config.output[0].dims == [10, 64]  # a plan returns every token
    assert config.optimization.cuda.graphs
    assert [spec.batch_size for spec in config.optimization.cuda.graph_spec] == [1, 2, 4]
    (group,) = config.instance_group
    assert (group.kind, group.profile) == (messages.ModelInstanceGroup.KIND_GPU, ["0"])


def test_plan_for_any_gpu_is_the_default(bundles: Bundles, tmp_path: Path) -> None:
    bundle = copied(bundles(precision="fp16"), tmp_path / "tower")
    name = add_plan(bundle, (), hardware_compatible=True)
    (model,) = write_repository([bundle], tmp_path / "models", PLAN)
    assert read(model).default_model_filename == name


def test_plan_that_triton_cannot_run_is_refused(clip_bundle: Path, bundles: Bundles, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"has no plan of data-centre TensorRT, .*trtower build .* --flavour tensorrt"
    ):
        write_repository([clip_bundle], tmp_path / "models", PLAN)
    bundle = copied(bundles(precision="fp16"), tmp_path / "tower")
    add_plan(bundle, ("8.0",))
    with pytest.raises(BundleError, match="is not certified"):
        write_repository([bundle], tmp_path / "models", replace(PLAN, allow_uncertified=False))
    add_plan(bundle, ("8.0",), version="10.14.0")
    with pytest.raises(ConfigError, match=r"has two plans for 8\.0, .*10\.3.* and .*10\.14"):
        write_repository([bundle], tmp_path / "models", PLAN)
    stripped = copied(bundles(precision="fp16"), tmp_path / "stripped")
    add_plan(stripped, ("8.0",), stripped=True)
    with pytest.raises(ConfigError, match="has no weights, and Triton cannot add them"):
        write_repository([stripped], tmp_path / "models", PLAN)


# A repository that exists


def test_models_are_added_to_a_repository(certified: Path, bundles: Bundles, tmp_path: Path) -> None:
    other = copied(bundles(precision="fp16"), tmp_path / "other")
    write_repository([certified], tmp_path / "models")
    write_repository([other], tmp_path / "models", ANYWAY)
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"tower", "other"}


def test_existing_model_is_refused_and_replaced_if_asked(certified: Path, tmp_path: Path) -> None:
    write_repository([certified], tmp_path / "models")
    config = tmp_path / "models" / "tower" / "config.pbtxt"
    before = config.read_bytes()
    options = TritonOptions(instances=2)
    with pytest.raises(ConfigError, match=r"tower/1 exists: write another --version, or replace it with --overwrite"):
        write_repository([certified], tmp_path / "models", options)
    assert config.read_bytes() == before
    write_repository([certified], tmp_path / "models", options, overwrite=True)
    assert read(config.parent).instance_group[0].count == 2


def test_version_is_added(certified: Path, bundles: Bundles, tmp_path: Path) -> None:
    newer = copied(bundles(layer=1), tmp_path / "newer" / "tower")
    write_repository([certified], tmp_path / "models")
    write_repository([newer], tmp_path / "models", ANYWAY, version=2)
    model = tmp_path / "models" / "tower"
    assert {path.name for path in model.iterdir()} == {"config.pbtxt", "1", "2"}
    sha256 = Bundle.open(newer).manifest.tower_sha256
    assert read(model).parameters["tower_sha256"].string_value == sha256
    assert Bundle.open(model / "2" / "bundle").manifest.tower_sha256 == sha256


def test_nothing_is_written_if_any_bundle_is_refused(certified: Path, fp32_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"is not certified: it has no certificate\. .* --allow-uncertified"):
        write_repository([certified, fp32_bundle], tmp_path / "models")
    assert not (tmp_path / "models").exists()
    twice = copied(certified, tmp_path / "again" / "tower")
    with pytest.raises(ConfigError, match="two bundles are called tower"):
        write_repository([certified, twice], tmp_path / "models")


def test_altered_bundle_is_refused(certified: Path, tmp_path: Path) -> None:
    bundle = copied(certified, tmp_path / "tower")
    content = bytearray((bundle / "tower.onnx.data").read_bytes())
    content[-1] ^= 1
    (bundle / "tower.onnx.data").write_bytes(content)
    with pytest.raises(BundleError, match="was altered"):
        write_repository([bundle], tmp_path / "models")
    assert files(tmp_path / "models") == set()


def test_full_disk_leaves_no_model(certified: Path, tmp_path: Path, small_disk: Path) -> None:
    subprocess.run(["dd", "if=/dev/zero", f"of={small_disk}/ballast", "bs=1k", "count=600"], check=True)  # noqa: S607
    with pytest.raises(BuildError, match="the disk filled up"):
        write_repository([certified], small_disk / "models")
    assert files(small_disk / "models") == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"platform": "onnx"}, "unknown platform 'onnx'; choose python or tensorrt_plan"),
        ({"kind": "tpu"}, "unknown kind of instance 'tpu'"),
        ({"platform": "tensorrt_plan", "kind": "cpu"}, "a plan runs on a GPU only"),
        ({"instances": 0}, "instances=0; expected at least 1"),
        ({"timeout_ms": -1}, "timeout_ms=-1; expected a number of at least 0"),
        ({"max_queue_delay_ms": float("nan")}, "max_queue_delay_ms=nan"),
    ],
)
def test_invalid_option_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TritonOptions(**options)


def test_command(certified: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["triton", str(certified), "--out", str(tmp_path / "models"), "--max-queue-delay-ms", "2"]
    assert run(command) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'models' / 'tower'}\n"
    assert run(command) == 2
    assert "exists: write another --version" in capsys.readouterr().err
    assert run([*command, "--version", "0"]) == 2
    assert "version=0; expected a number of at least 1" in capsys.readouterr().err
    assert run(["triton", str(tmp_path), "--out", str(tmp_path / "models")]) == 1
    assert "is not a bundle" in capsys.readouterr().err
    parameters = read(tmp_path / "models" / "tower").parameters
    assert json.loads(parameters["require_certificate"].string_value) is True
