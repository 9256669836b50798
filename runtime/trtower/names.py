"""Refuse an unknown name, and suggest the known one that was probably meant."""

from collections.abc import Sequence
from difflib import get_close_matches

from trtower.errors import ConfigError

_MEANT = (
    ("trt", "tensorrt"),
    ("rtx trt-rtx tensorrtrtx", "tensorrt-rtx"),
    ("nvidia", "tensorrt tensorrt-rtx"),
    ("gpu cuda", "tensorrt tensorrt-rtx torch-cuda onnxruntime-cuda cudagraph cuda"),
    ("onnxruntime-gpu ort-cuda", "onnxruntime-cuda"),
    ("ort-cpu", "onnxruntime-cpu"),
    ("cpu", "openvino torch-cpu onnxruntime-cpu"),
    ("intel ov", "openvino openvino-bf16"),
    ("onnx ort", "onnxruntime"),
    ("pytorch", "torch eager sdpa compile"),
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
"""What people write -> what they mean. Only the names that an option accepts are suggested."""

CLOSE = 0.7
"""The least similarity, by difflib, of a suggestion: "tensort" suggests tensorrt, "tpu" does not suggest cpu."""


def check_name(what: str, name: object, known: Sequence[str]) -> None:
    """Raise ConfigError unless ``name`` is in ``known``; the message suggests the nearest ones.

    ``what`` is the kind of thing that is named, such as "backend".
    """
    if not isinstance(name, str) or name not in known:
        raise unknown(what, name, known, nearest(str(name), known))


def unknown(what: str, name: object, known: Sequence[str], meant: Sequence[str]) -> ConfigError:
    """Make the error for an unknown name. It suggests the names in ``meant`` first, then lists every choice."""
    suggestion = f" did you mean {list_choices([repr(each) for each in meant])}?" if meant else ""
    return ConfigError(f"unknown {what} {name!r};{suggestion} choose {list_choices(known)}.")


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """Return the known names that ``name`` probably means, likeliest first, ignoring case and small misspellings."""
    plain = name.strip().lower().removeprefix("torch.").replace("_", "-").replace(" ", "-")
    if plain in known:
        return [plain]
    return [each for each in ALSO_WRITTEN.get(plain, ()) if each in known] or get_close_matches(
        plain, known, n=2, cutoff=CLOSE
    )


def list_choices(names: Sequence[str]) -> str:
    """Join names as "a, b or c"."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
