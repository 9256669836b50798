"""Read a device as it is asked for, and say what torch knows of it."""

import torch

from trtower.errors import ConfigError
from trtower.names import nearest, unknown


def parse_device(device: str | int | torch.device | None) -> torch.device | None:
    """Read a device as it may be asked for, None being none; raise ConfigError where no backend is for it."""
    if device is None:
        return None
    asked = _read_device(f"cuda:{device}" if type(device) is int else device)  # an index is a GPU's, as it is to torch
    if asked is None:
        text = str(device)
        meant = [f"cuda:{text}"] if text.isdecimal() and isinstance(device, str) else nearest(text, ("cpu", "cuda"))
        raise unknown("device", device, ("cpu", "cuda", "cuda:INDEX"), meant)
    if asked.type not in ("cpu", "cuda") or (asked.type == "cpu" and asked.index):
        raise ConfigError(f"device {str(asked)!r} has no backend; choose cpu, cuda or cuda:INDEX.")
    if asked.type == "cuda" and asked.index is None:
        return default_device("cuda")
    return torch.device("cpu") if asked.type == "cpu" else asked


def _read_device(written: str | int | torch.device) -> torch.device | None:
    """Read a device as torch does; None where it cannot, or takes another index: to it, cuda:257 is cuda:1."""
    try:
        asked = torch.device(written)
    except (RuntimeError, TypeError):
        return None
    return asked if asked.index is None or str(asked) == str(written) else None


def default_device(kind: str) -> torch.device:
    """Return the CPU, or torch's current GPU; the first if there is none."""
    if kind == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def device_obstacle(device: torch.device) -> str | None:
    """Say why nothing can run on a device; None if it exists."""
    if device.type == "cpu":
        return None
    if not torch.cuda.is_available():
        build = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        return f"no GPU here: {build}"
    if device.index >= torch.cuda.device_count():
        return f"{device} does not exist: torch finds {torch.cuda.device_count()} CUDA device(s)"
    return None


def capability_of(device: torch.device | None = None) -> str:
    """Return the compute capability of a GPU, by default of torch's current one, as "8.6"."""
    return "{}.{}".format(*torch.cuda.get_device_capability(device))
