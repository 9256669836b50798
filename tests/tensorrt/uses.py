"""What trtower's own code uses of TensorRT's modules, read from its source, so that a new call is found by itself.

PLACES says which expression of the source is an object of which class. That is all one has to add, and only for a new
class or a new name of a variable.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RUNNER = "runtime/trtower/runners/tensorrt.py"
RUNTIMES = "runtime/trtower/runners/runtimes.py"
CONTEXTS = "runtime/trtower/runners/contexts.py"
CACHE = "runtime/trtower/runners/runtime_cache.py"
FLAVOUR = "runtime/trtower/flavour.py"
BUILDER = "export/trtower_export/plan/polygraphy.py"
CHOICE = "export/trtower_export/plan/choice.py"

ALL = ("tensorrt", "tensorrt_lean", "tensorrt_rtx")
FULL = ("tensorrt", "tensorrt_rtx")
RTX = ("tensorrt_rtx",)

MODULE = {"module": ""}
RUNTIME = MODULE | {"runtime": "Runtime", "engine": "ICudaEngine", "self._engine": "ICudaEngine"}
REFITTER = MODULE | {
    "refitter": "Refitter",
    "parser": "OnnxParserRefitter",
    "parser.get_error(index)": "ParserError",
}
NETWORK = MODULE | {"network": "INetworkDefinition", "layer": "ILayer", "tensor": "ITensor"}

PLACES: dict[tuple[str, str], tuple[Sequence[str], dict[str, str]]] = {
    (RUNNER, ""): (ALL, RUNTIME),
    (RUNNER, "_configure"): (RTX, RUNTIME | {"config": "IRuntimeConfig", "graphs": "CudaGraphStrategy"}),
    (RUNNER, "_refit"): (FULL, REFITTER),
    (RUNTIMES, ""): (ALL, MODULE),
    (CONTEXTS, ""): (ALL, {"context": "IExecutionContext"}),
    (CACHE, ""): (RTX, {"self._handle": "IRuntimeCache"}),
    (FLAVOUR, ""): (ALL, MODULE),
    (FLAVOUR, "known_capabilities"): (RTX, MODULE),
    (BUILDER, ""): (FULL, MODULE | {"config": "IBuilderConfig"}),
    (BUILDER, "_check_network"): (FULL, NETWORK),
    (CHOICE, ""): (FULL, MODULE),
}
"""File and function ("" for the rest of the file) -> the modules that it works with; and expression -> its class there
("" for the module itself)."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """One use of a name such as "Runtime.deserialize_cuda_engine" in those ``modules``.

    ``call`` holds how many positional arguments a call has, and the names of the others. ``overrides`` says how many
    arguments a method takes that overrides TensorRT's. ``assigns`` says that our code sets the attribute.
    """

    where: str
    expression: str
    modules: Sequence[str]
    name: str
    call: tuple[int, tuple[str, ...]] | None = None
    overrides: int | None = None
    assigns: bool = False


def all_uses() -> Iterator[Use]:
    """Read every use from the source."""
    for file in dict.fromkeys(file for file, _ in PLACES):
        yield from _uses_below(ast.parse((ROOT / file).read_text(encoding="utf-8")), file, "")


def _uses_below(parent: ast.AST, file: str, function: str) -> Iterator[Use]:
    for node in ast.iter_child_nodes(parent):
        yield from _uses_of(node, file, function)
        name = getattr(node, "name", "")
        yield from _uses_below(node, file, name if name and (file, name) in PLACES else function)


def _uses_of(node: ast.AST, file: str, function: str) -> Iterator[Use]:
    modules, classes = PLACES[file, function]

    def use(expression: ast.expr, method: str = "", **details: Any) -> Iterator[Use]:
        if found := _resolve(expression, classes):
            where = f"{file}:{expression.lineno}"
            yield Use(where=where, expression=found[0], modules=modules, name=found[1] + method, **details)

    if isinstance(node, ast.Attribute):
        yield from use(node, assigns=isinstance(node.ctx, ast.Store))
    elif isinstance(node, ast.Call):
        is_on_class = ast.unparse(node.func).endswith(".__init__")  # which gets its object as an argument
        yield from use(node.func, call=(len(node.args) - is_on_class, tuple(each.arg or "" for each in node.keywords)))
    elif isinstance(node, ast.ClassDef):
        methods = {each.name: len(each.args.args) - 1 for each in node.body if isinstance(each, ast.FunctionDef)}
        for base in node.bases:
            for method, count in methods.items():
                yield from use(base, f".{method}", overrides=count)


def _resolve(node: ast.expr, classes: dict[str, str]) -> tuple[str, str] | None:
    """Return the expression of ``classes`` that a node begins with, and what the whole is in TensorRT.

    For `module.ILogger.ERROR` this is ("module", "ILogger.ERROR"). None if it begins with none of them.
    """
    text = re.sub(r"\((\w+) := .*\)\.", r"\1.", ast.unparse(node))
    for expression, kind in classes.items():
        rest = text.removeprefix(f"{expression}.")
        if rest != text and re.fullmatch(r"\w+(\.\w+)*", rest):
            return expression, f"{kind}.{rest}".removeprefix(".")
    return None
