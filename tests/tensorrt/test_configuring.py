"""How data-centre TensorRT is told to build: Polygraphy's own code and TensorRT's own classes, but made-up objects.

The bindings make no objects without TensorRT's libraries. Each object here is a mock that has the attributes of its
real class and no other, and each call is held against the real overloads.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.runtime.signatures import accepts
from tests.tensorrt.modules import MODULES
from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import GRAPH, GRAPH_DATA, BuildSettings
from trtower.errors import BackendError
from trtower.spec import MIB
from trtower_export.console import Step
from trtower_export.plan.choice import PlanChoice
from trtower_export.plan.polygraphy import PLAN, build_plan

pytestmark = pytest.mark.skipif("tensorrt" not in MODULES, reason="data-centre TensorRT is in other environments")

Bundles = Callable[..., Path]


class Silent(Step):
    def update(self, fraction: float, note: str) -> None:
        del fraction, note


class MadeUpObjects:
    """A builder and all that it makes. ``flags`` are those that a build leaves set in its config."""

    def __init__(self, trt: Any, plan: bytes) -> None:
        self._trt = trt
        self._made: list[tuple[str, Any, Any]] = []
        self.flags: set[Any] = {trt.BuilderFlag.TF32}  # set by default
        self.cache = self._make("ITimingCache")
        self.cache.serialize.return_value.__enter__.return_value = b"timings"
        tensor = {"shape": trt.Dims((-1, 3, 42, 42)), "is_shape_tensor": False, "dtype": trt.DataType.HALF}
        constant = self._make("ILayer", type=trt.LayerType.CONSTANT, precision_is_set=False)
        constant.get_output.return_value = self._make("ITensor", **tensor | {"shape": trt.Dims((4, 5))})
        self.network = self._make("INetworkDefinition", num_inputs=1, num_layers=1)
        self.network.get_input.return_value = self._make("ITensor", name="pixel_values", **tensor)
        self.network.get_layer.return_value = constant
        self.network.__len__.return_value = 1
        self.network.__getitem__.side_effect = [constant].__getitem__
        gpu = {"DLA_core": -1, "default_device_type": trt.DeviceType.GPU, "int8_calibrator": None}
        self.config = self._make("IBuilderConfig", num_optimization_profiles=1, **gpu)
        self.config.set_flag.side_effect = self.flags.add
        self.config.clear_flag.side_effect = self.flags.discard
        self.config.get_flag.side_effect = self.flags.__contains__
        self.config.get_memory_pool_limit.return_value = 0
        self.config.get_tactic_sources.return_value = 0
        self.config.create_timing_cache.return_value = self.config.get_timing_cache.return_value = self.cache
        self.builder = self._make("Builder")
        self.builder.create_network.return_value = self.network
        self.builder.create_builder_config.return_value = self.config
        self.builder.create_optimization_profile.return_value = self._make("IOptimizationProfile")
        self.builder.build_serialized_network.return_value = plan
        self.parser = self._make("OnnxParser", num_errors=0)

    def _make(self, name: str, /, **attributes: Any) -> Any:
        kind = getattr(self._trt, name)
        made = mock.NonCallableMagicMock(spec_set=kind, name=name)
        for key, value in attributes.items():
            if hasattr(kind, key):  # 11.x has less than 10.x
                setattr(made, key, value)
        self._made.append((name, kind, made))
        return made

    def calls(self) -> list[tuple[str, Any, Any, Any]]:
        """Return all calls: as "IBuilderConfig.set_flag", the real method, and the arguments without and with names."""
        return [
            (f"{name}.{method}", getattr(kind, method), arguments, named)
            for name, kind, made in self._made
            for method, arguments, named in made.method_calls
            if not method.startswith("__")
        ]


@pytest.fixture
def made_up(bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> MadeUpObjects:
    """Replace what makes objects in TensorRT; the plan is as large as the weights."""
    trt = MODULES["tensorrt"]
    made_up = MadeUpObjects(trt, bytes((bundles(precision="fp16") / GRAPH_DATA).stat().st_size))
    monkeypatch.setattr(trt, "Builder", lambda logger: made_up.builder)
    monkeypatch.setattr(trt, "OnnxParser", lambda network, logger: made_up.parser)
    monkeypatch.setattr(trt, "init_libnvinfer_plugins", lambda logger, namespace: True)
    return made_up


def build(bundle: Path, folder: Path, settings: BuildSettings | None = None) -> None:
    manifest = Bundle.open(bundle).manifest
    choice = PlanChoice(flavour="tensorrt", compute_capabilities=("8.9",), settings=settings or BuildSettings())
    tensor, profiles = manifest.input, manifest.profiles
    build_plan(bundle / GRAPH, choice, tensor, profiles, folder, Silent(), cache=folder / "timings")


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        (BuildSettings(), ()),
        (BuildSettings(version_compatible=True), ("VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME")),
        (BuildSettings(stripped=True), ("STRIP_PLAN", "REFIT")),
        (BuildSettings(workspace_mib=512, optimization_level=2, hardware_compatible=True), ()),
    ],
)
def test_settings_become_flags_and_calls_that_exist(
    bundles: Bundles, tmp_path: Path, made_up: MadeUpObjects, settings: BuildSettings, flags: tuple[str, ...]
) -> None:
    trt = MODULES["tensorrt"]
    build(bundles(precision="fp16"), tmp_path, settings)
    assert made_up.flags == {getattr(trt.BuilderFlag, flag) for flag in flags}
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert made_up.builder.create_network.call_args.kwargs == {"flags": strongly_typed}
    assert isinstance(made_up.config.progress_monitor, trt.IProgressMonitor)
    if settings.hardware_compatible:
        assert made_up.config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.AMPERE_PLUS
        assert made_up.config.builder_optimization_level == 2
        made_up.config.set_memory_pool_limit.assert_called_once_with(trt.MemoryPoolType.WORKSPACE, 512 * MIB)
    assert (tmp_path / PLAN).stat().st_size
    assert (tmp_path / "timings").read_bytes() == b"timings"


def test_every_call_fits_a_real_overload(bundles: Bundles, tmp_path: Path, made_up: MadeUpObjects) -> None:
    build(bundles(precision="fp16"), tmp_path, BuildSettings(workspace_mib=512, version_compatible=True))
    calls = made_up.calls()
    names = {name for name, *_ in calls}
    assert names >= {"Builder.build_serialized_network", "IBuilderConfig.set_flag", "IOptimizationProfile.set_shape"}
    assert not [name for name, method, arguments, named in calls if not accepts(method, *arguments, **named)]


def test_builder_that_does_not_start_names_the_driver(bundles: Bundles, tmp_path: Path) -> None:
    """The stub libraries return NULL instead of a builder, as TensorRT's own do without a usable driver."""
    version = MODULES["tensorrt"].__version__
    with pytest.raises(BackendError, match=rf"^tensorrt {version} could not start; its driver may be too old: "):
        build(bundles(precision="fp16"), tmp_path)
    assert not (tmp_path / PLAN).exists()
