"""Read what Linux reports about the processor, such as whether it multiplies BF16."""

from pathlib import Path


def multiplies_bf16() -> bool:
    """Whether this processor has BF16 arithmetic; assumed outside Linux. PyTorch in BF16 is far slower without it."""
    fields = processor_fields()
    return not fields or not processor_flags(fields).isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


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
