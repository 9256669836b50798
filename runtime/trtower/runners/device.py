"""Parse the device that a user requests, and say what torch knows about it."""

from pathlib import Path

import torch

from trtower.errors import ConfigError
from trtower.names import nearest, unknown
from trtower.runners.processor import name_processor

NVIDIA = Path("/dev/nvidiactl")
"""Present if NVIDIA's driver has a GPU for this machine or container."""

JETSON = Path("/etc/nv_tegra_release")
"""Present on a Jetson, whose torch does not come from PyPI."""


def parse_device(device: str | int | torch.device | None) -> torch.device | None:
    """Parse a requested device; return None for None. Raise ConfigError if no backend runs on it."""
    if device is None:
        return None
    parsed = _read_device(f"cuda:{device}" if type(device) is int else device)  # torch, too, takes a number for a GPU
    if parsed is None:
        text = str(device)
        meant = [f"cuda:{text}"] if text.isdecimal() and isinstance(device, str) else nearest(text, ("cpu", "cuda"))
        raise unknown("device", device, ("cpu", "cuda", "cuda:INDEX"), meant)
    if parsed.type not in ("cpu", "cuda") or (parsed.type == "cpu" and parsed.index):
        raise ConfigError(f"device {str(parsed)!r} has no backend; choose cpu, cuda or cuda:INDEX.")
    if parsed.type == "cuda" and parsed.index is None:
        return default_device("cuda")
    return torch.device("cpu") if parsed.type == "cpu" else parsed


def _read_device(written: str | int | torch.device) -> torch.device | None:
    """Parse a device with torch; None if torch cannot, or changes the index: it takes cuda:257 for cuda:1."""
    try:
        parsed = torch.device(written)
    except (RuntimeError, TypeError):
        return None
    return parsed if parsed.index is None or str(parsed) == str(written) else None


def default_device(kind: str) -> torch.device:
    """Return the CPU, or torch's current GPU. Without a GPU, return cuda:0, for messages to name."""
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def describe_device(device: torch.device) -> str:
    """Name what decides how fast a device is: the GPU, or the processor and the number of torch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{name_processor()}, {threads} thread{'s' if threads > 1 else ''}"


def device_obstacle(device: torch.device) -> str | None:
    """Say why torch cannot use a device; None if it can."""
    if device.type == "cpu":
        return None
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        return f"{built}, although there is an NVIDIA GPU: {_remedy()}" if has_gpu() else f"no GPU here: {built}"
    if device.index >= torch.cuda.device_count():
        return f"{device} does not exist: torch finds {torch.cuda.device_count()} CUDA device(s)"
    return None


def has_gpu() -> bool:
    """Return whether this machine has a GPU, whether torch can use it or not."""
    return torch.cuda.is_available() or NVIDIA.exists() or JETSON.exists()


def _remedy() -> str:
    if JETSON.exists():
        return "install a torch for this JetPack; BUILD.md in a bundle that was exported for it says which"
    if torch.version.cuda is None:
        return f"pip install --force-reinstall torch=={torch.__version__.partition('+')[0]}"
    return f"nvidia-smi shows whether the driver is older than CUDA {torch.version.cuda}"


def capability_of(device: torch.device | None = None) -> str:
    """Return the compute capability of a GPU, by default torch's current one, as in "8.6"."""
    return "{}.{}".format(*torch.cuda.get_device_capability(device))
