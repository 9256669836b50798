"""Read what Linux reports about the processor: whether it multiplies BF16, and whether INT8 with exact sums."""

import hashlib
import platform
from pathlib import Path


def multiplies_bf16() -> bool:
    """Whether this processor has BF16 arithmetic; assumed outside Linux. PyTorch in BF16 is far slower without it."""
    fields = processor_fields()
    return not fields or not processor_flags(fields).isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def has_vnni() -> bool:
    """Whether Linux reports an x86 processor that adds products of INT8 in 32 bits; others may cut sums off at 16."""
    return not processor_flags(processor_fields()).isdisjoint({"avx512_vnni", "avx_vnni", "amx_int8"})


def name_processor() -> str:
    """Return a name for all processors that are as fast: what Linux calls it, and the start of its flags' sha256.

    Virtual machines call processors of several generations the same.
    """
    fields = processor_fields()
    name = fields.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({hash_flags()[:8]})" if fields else name


def hash_flags() -> str:
    """Return the sha256 of the flags that Linux reports."""
    return hashlib.sha256(" ".join(sorted(processor_flags(processor_fields()))).encode()).hexdigest()


def processor_flags(fields: dict[str, str]) -> set[str]:
    """Return the flags among what `processor_fields` has read."""
    return {*fields.get("flags", "").split(), *fields.get("Features", "").split()}  # x86 has the first, Arm the second


def processor_fields() -> dict[str, str]:
    """Read what Linux reports about the last core; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}
