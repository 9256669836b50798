"""The modules of TensorRT that this environment itself has. Those of the environment behind it do not count."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

MODULES: dict[str, ModuleType] = {
    name: import_module(name)
    for name in ("tensorrt", "tensorrt_lean", "tensorrt_rtx")
    if (spec := find_spec(name)) and Path(spec.origin or "").is_relative_to(sys.prefix)
}
