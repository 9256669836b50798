"""How to embed pictures."""

from dataclasses import dataclass

import torch

from trtower.embedding.formats import FORMATS
from trtower.errors import ConfigError
from trtower.layer_codes import LayerCode
from trtower.names import check_name
from trtower.spec import BY_DTYPE, MIB
from trtower.tower.encoded import LARGEST_FILE, LARGEST_PICTURE

DTYPES = tuple(name for name in BY_DTYPE if name != "bfloat16")
"""The dtypes of features in files: neither NumPy nor Parquet has bfloat16."""

FEATURES_OF_A_FILE = 256 * MIB
PICTURES_OF_A_FILE = 1024


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """How `embed_pictures` embeds.

    Attributes:
        format: The kind of files, "parquet" (with the extra ``embed``) or "safetensors".
        dtype: The dtype of the features in them, "float16" or "float32". None: that of the bundle's engine, and
            float32 for bfloat16.
        select_layer: The hidden states to read, as in `VisionTower.load`.
        select_feature: The tokens to read, as in `VisionTower.load`.
        column: The column of Parquet files that holds pictures, as bytes or as paths. None: the one that holds bytes.
        pictures_per_file: How many pictures go into one file, which is what a process that dies loses. None: as many as
            make 256 MiB of features, at most 1024.
        batch_size: Pictures in one engine call. None: what the bundle's plans are tuned for.
        threads: Threads that read and prepare pictures. None: one for each processor, at most 8.
        backend: The backend, as in `VisionTower.load`.
        device: Where to run, as in `VisionTower.load`. Not on Ray, which assigns GPUs.
        allow_uncertified: Accept a bundle without a certificate for the backend that runs, and a rehearsal.
        max_bytes: Leave out files with more bytes.
        max_pixels: Leave out pictures with more pixels; decoding one takes up to 4 bytes for each, in every thread.
        retry: Try again the pictures that an earlier run left out.
        ray: Run on Ray: "local" starts it on this machine, "auto" or "HOST:PORT" is the address of a cluster that this
            machine is a node of. It needs the extra ``ray`` on every node.
        workers: Engines on Ray. None: one for each GPU, or without GPUs one for every ``cores``.
        cores: Processors of each engine on Ray. None: on GPUs an equal share, at most 8; without GPUs 8, or all.

    Raises:
        ConfigError: An option is invalid.
    """

    format: str = "parquet"
    dtype: str | None = None
    select_layer: LayerCode | None = None
    select_feature: str | None = None
    column: str | None = None
    pictures_per_file: int | None = None
    batch_size: int | None = None
    threads: int | None = None
    backend: str = "auto"
    device: str | torch.device | None = None
    allow_uncertified: bool = False
    max_bytes: int = LARGEST_FILE
    max_pixels: int = LARGEST_PICTURE
    retry: bool = False
    ray: str | None = None
    workers: int | None = None
    cores: int | None = None

    def __post_init__(self) -> None:
        check_name("format", self.format, tuple(FORMATS))
        if self.dtype is not None:
            check_name("dtype", self.dtype, DTYPES)
        numbers = ("pictures_per_file", "batch_size", "threads", "max_bytes", "max_pixels", "workers", "cores")
        for name in numbers:
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name}={value!r}; expected a number of at least 1.")
        for name in ("workers", "cores"):
            if self.ray is None and getattr(self, name) is not None:
                raise ConfigError(f"{name} is for Ray only: pass ray as well.")
        if self.ray is not None and self.device is not None:
            raise ConfigError("device is not for Ray, which assigns GPUs to engines: leave it out.")

    def files_of(self, row: tuple[int, ...], itemsize: int, batch_size: int) -> int:
        """Return how many pictures go into one file, whose features have the shape ``row`` each: whole batches."""
        if self.pictures_per_file is not None:
            return self.pictures_per_file
        size = itemsize * int(torch.Size(row).numel())
        return max(1, min(PICTURES_OF_A_FILE, FEATURES_OF_A_FILE // size) // batch_size) * batch_size
