"""Record the machine and versions behind a measurement, so that readers can judge whether it applies to theirs."""

import datetime
import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from trtower.extras import installed_version
from trtower.runners import choose
from trtower.runners.device import capability_of
from trtower.runners.processor import processor_fields, processor_flags

PACKAGES = ("trtower", "torch", "transformers")
"""Packages to record the versions of, besides those of the backends."""

SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "KMP_AFFINITY", "CUDA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE")
"""Environment variables that change the speed."""


DRIVER = Path("/proc/driver/nvidia/version")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return processor, GPU, versions and date."""
    backends = sorted({backend.package for backend in choose.BACKENDS})
    environment: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cores_of_this_process": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "threads": torch.get_num_threads(),
        "device": str(device),
        "versions": {name: number for name in (*PACKAGES, *backends) if (number := installed_version(name))},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        environment["gpu"] = {
            "name": properties.name,
            "compute_capability": capability_of(device),
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
            "driver": read_driver(DRIVER),
        }
    return environment


def read_driver(path: Path) -> str | None:
    """Return the version of NVIDIA's driver as its kernel module reports it; None without a driver."""
    try:
        line = path.read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return None
    number = re.search(r"\d+(\.\d+)+", line)
    return number[0] if number else line


VECTOR_UNITS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "asimd", "sve", "bf16")
"""The flags of /proc/cpuinfo that say how fast a processor multiplies: first those of x86, then those of Arm."""


def _processor() -> str:
    """Return the processor's name and its vector units."""
    fields = processor_fields()
    if not fields:
        return platform.processor() or platform.machine()
    flags = processor_flags(fields)
    units = [unit for unit in VECTOR_UNITS if unit in flags]
    name = fields.get("model name", platform.machine())
    return f"{name} ({', '.join(units)})" if units else name
