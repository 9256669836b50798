"""Whatever trtower uses of TensorRT's modules exists in each of them, and means what trtower takes it for."""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.runtime.signatures import accepts, parameter_names
from tests.tensorrt.modules import MODULES
from tests.tensorrt.uses import ALL, FULL, PLACES, RTX, all_uses
from trtower.runners.base import SPECIALIZATIONS
from trtower.spec import BY_DTYPE

USES = list(all_uses())

SIGNATURES = {
    "ILogger.__init__": "",
    "ICudaEngine.create_runtime_config": "",
    "ILogger.log": "severity msg",
    "Runtime.__init__": "logger",
    "Runtime.deserialize_cuda_engine": "serialized_engine",
    "ICudaEngine.get_tensor_shape": "name",
    "ICudaEngine.get_tensor_profile_shape": "name profile_index",
    "IExecutionContext.set_device_memory": "memory size",
    "IExecutionContext.set_optimization_profile_async": "profile_index stream_handle",
    "IExecutionContext.set_input_shape": "name shape",
    "IExecutionContext.set_tensor_address": "name memory",
    "IExecutionContext.execute_async_v3": "stream_handle",
    "IRuntimeConfig.set_execution_context_allocation_strategy": "strategy",
    "IRuntimeConfig.create_runtime_cache": "",
    "IRuntimeConfig.set_runtime_cache": "cache",
    "IRuntimeCache.deserialize": "blob",
    "IRuntimeCache.serialize": "",
    "Refitter.__init__": "engine logger",
    "Refitter.refit_cuda_engine": "",
    "OnnxParserRefitter.__init__": "refitter logger",
    "OnnxParserRefitter.refit_from_file": "model",
    "OnnxParserRefitter.get_error": "index",
    "ParserError.desc": "",
    "INetworkDefinition.get_layer": "index",
    "ILayer.get_output": "index",
    "IBuilderConfig.clear_flag": "flag",
    "IProgressMonitor.__init__": "",
    "IProgressMonitor.phase_start": "phase_name parent_phase num_steps",
    "IProgressMonitor.step_complete": "phase_name step",
    "IProgressMonitor.phase_finish": "phase_name",
}
"""What each call or method of ours takes its arguments for, in their order."""

CONTEXT = {"tensorrt_rtx": "runtime_config", "tensorrt": "strategy", "tensorrt_lean": "strategy"}
"""The same for `ICudaEngine.create_execution_context`, by module: TensorRT 10.3 has only the second."""

NAMES_OF_VALUES: dict[tuple[str, ...], dict[str, Sequence[str]]] = {
    ALL: {"ExecutionContextAllocationStrategy": ("STATIC", "ON_PROFILE_CHANGE", "USER_MANAGED")},
    FULL: {"DataType": [each.tensorrt for each in BY_DTYPE.values()]},
    RTX: {"DynamicShapesKernelSpecializationStrategy": [each.upper() for each in SPECIALIZATIONS]},
}
"""Values whose names trtower does not write in one piece, or that a config or a class has by default."""


def look_up(module: str, name: str) -> Any:
    """Return what a dotted name is in a module; None if it does not exist."""
    found: Any = MODULES[module]
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def function_of(module: str, name: str) -> str:
    """Return the name of what is called: of a class its constructor."""
    return f"{name}.__init__" if isinstance(look_up(module, name), type) else name


def test_every_expression_that_is_looked_for_is_found() -> None:
    """A renamed variable would take its calls out of these tests."""
    used = {use.expression for use in USES}
    assert not {expression for _, classes in PLACES.values() for expression in classes} - used
    assert len(USES) > 100


@pytest.mark.parametrize("module", MODULES)
def test_every_name_exists(module: str) -> None:
    ours = [use for use in USES if module in use.modules and use.overrides is None]
    assert not [f"{use.where}: {use.name}" for use in ours if look_up(module, use.name) is None]


@pytest.mark.parametrize("module", MODULES)
def test_every_call_fits_an_overload(module: str) -> None:
    wrong = []
    for use in USES:
        if module in use.modules and use.call:
            count, named = use.call
            if not accepts(look_up(module, function_of(module, use.name)), *range(count), **dict.fromkeys(named)):
                wrong.append(f"{use.where}: {use.name}{use.call}")
    assert not wrong


@pytest.mark.parametrize("module", MODULES)
def test_every_attribute_that_is_set_can_be_set(module: str) -> None:
    ours = [use for use in USES if module in use.modules and use.assigns]
    assert not [f"{use.where}: {use.name}" for use in ours if not look_up(module, use.name).fset]


@pytest.mark.parametrize("module", MODULES)
def test_method_that_tensorrt_calls_takes_its_arguments(module: str) -> None:
    ours = [use for use in USES if module in use.modules and use.overrides is not None]
    theirs = [use for use in ours if look_up(module, use.name) is not None]
    assert len(theirs) == (2 if module == "tensorrt_lean" else 6)  # of a logger; and of a progress monitor
    assert not [use for use in theirs if not accepts(look_up(module, use.name), *range(use.overrides or 0))]


@pytest.mark.parametrize("module", MODULES)
def test_arguments_mean_what_trtower_takes_them_for(module: str) -> None:
    expected = SIGNATURES | {"ICudaEngine.create_execution_context": CONTEXT[module]}
    called = {
        function_of(module, use.name)
        for use in USES
        if module in use.modules and (use.call or use.overrides is not None) and look_up(module, use.name)
    }
    assert called <= set(expected), "say in SIGNATURES what the arguments are"
    for name in called:
        found = {" ".join(names) for names in parameter_names(look_up(module, name))}
        assert expected[name] in found, name


@pytest.mark.parametrize("module", MODULES)
def test_names_of_values_exist(module: str) -> None:
    for modules, kinds in NAMES_OF_VALUES.items():
        for kind, names in kinds.items() if module in modules else ():
            assert set(names) <= set(look_up(module, kind).__members__), kind


@pytest.mark.parametrize("module", MODULES)
def test_plan_brings_no_code_unless_that_is_allowed(module: str) -> None:
    """Where it can be made without a driver, the object is asked itself."""
    runtime = MODULES[module].Runtime
    assert "-> bool" in runtime.engine_host_code_allowed.fget.__doc__
    assert "engine_host_code_allowed: :class:`bool`" in runtime.__doc__
    (said,) = (line for line in runtime.__doc__.splitlines() if "ivar engine_host_code_allowed" in line)
    assert said.endswith("(Default: False).")
    if module == "tensorrt_rtx":
        made = runtime(MODULES[module].Logger())
        assert made.engine_host_code_allowed is False
        made.engine_host_code_allowed = True
        assert made.engine_host_code_allowed is True
