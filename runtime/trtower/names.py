"""Refuse a name that is not among the known ones, and say which of them was probably meant."""

from collections.abc import Sequence
from difflib import get_close_matches

from trtower.errors import ConfigError

_MEANT = (
    ("trt", "tensorrt"),
    ("rtx trt-rtx tensorrtrtx", "tensorrt-rtx"),
    ("nvidia", "tensorrt tensorrt-rtx"),
    ("gpu cuda", "onnxruntime-cuda tensorrt tensorrt-rtx cudagraph cuda"),
    ("onnxruntime-gpu ort-cuda", "onnxruntime-cuda"),
    ("ort-cpu", "onnxruntime-cpu"),
    ("cpu", "onnxruntime-cpu openvino"),
    ("intel ov", "openvino openvino-bf16"),
    ("onnx ort onnxruntime", "onnxruntime-cpu onnxruntime-cuda onnxruntime"),
    ("torch pytorch", "eager sdpa compile"),
    ("inductor", "compile"),
    ("half float16 f16", "fp16"),
    ("16", "fp16 bf16"),
    ("bfloat16 brain", "bf16"),
    ("float float32 full single f32 32 tf32", "fp32"),
    ("float8 e4m3", "fp8"),
    ("8", "int8 fp8"),
    ("i8 w8a8", "int8"),
    ("mixed default best any", "auto"),
    ("no off false", "none"),
)
ALSO_WRITTEN = {written: meant.split() for several, meant in _MEANT for written in several.split()}
"""What people write, and what they mean by it; of those, the names that an option knows are suggested."""

CLOSE = 0.7
"""How alike two names must be, by difflib, for one to be suggested: "tensort" is, and "tpu" is not "cpu"."""


def check_name(what: str, name: object, known: Sequence[str]) -> None:
    """Raise ConfigError unless ``name`` is in ``known``; the message begins with the nearest of them.

    ``what`` says what the name is of, such as "backend".
    """
    if not isinstance(name, str) or name not in known:
        raise unknown(what, name, known, nearest(str(name), known))


def unknown(what: str, name: object, known: Sequence[str], meant: Sequence[str]) -> ConfigError:
    """Make the error for a name that is not known: what it probably ``meant`` first, then every choice."""
    suggestion = f" did you mean {list_choices([repr(each) for each in meant])}?" if meant else ""
    return ConfigError(f"unknown {what} {name!r};{suggestion} choose {list_choices(known)}.")


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """Return those of ``known`` that ``name`` probably means, the likeliest first; spelling and case are forgiven."""
    plain = name.strip().lower().removeprefix("torch.").replace("_", "-").replace(" ", "-")
    if plain in known:
        return [plain]
    return [each for each in ALSO_WRITTEN.get(plain, ()) if each in known] or get_close_matches(
        plain, known, n=2, cutoff=CLOSE
    )


def list_choices(names: Sequence[str]) -> str:
    """Join names as in "a, b or c"."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
