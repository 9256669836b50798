"""Open the same tower in another process or on another machine, where its path could hold another one by now."""

import os
import socket
from typing import Any

import torch

from trtower.errors import ConfigError
from trtower.tower.vision_tower import VisionTower


def open_same(bundle: str | os.PathLike[str], tower_sha256: str | None, *, threads: int, **options: Any) -> VisionTower:
    """Load a bundle with the options of `VisionTower`, in a process that may use as many ``threads``.

    Raises ConfigError if it is another tower than that with the identity ``tower_sha256``, unless that is None.
    """
    torch.set_num_threads(threads)
    tower = VisionTower(bundle, **options)
    if tower_sha256 not in (None, tower.bundle.manifest.tower_sha256):
        raise ConfigError(f"{bundle} on {socket.gethostname()} is another bundle than where this was started.")
    tower.load_model()
    return tower
