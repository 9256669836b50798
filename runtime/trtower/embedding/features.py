"""Read a folder of features."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from trtower.bundle.not_a_bundle import read_folder
from trtower.embedding.folder import LEFT_OUT, Description
from trtower.embedding.formats import FORMATS, LeftOut, Rows


class Features:
    """The features of many pictures, in a folder that `embed_pictures` wrote.

    Iterating yields one complete file at a time, in the order of the pictures, as `Rows` of NumPy arrays.

    Attributes:
        path: The folder.
        description: What made the features, and how many there are.
    """

    def __init__(self, path: Path, description: Description) -> None:
        self.path, self.description = path, description

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> "Features":
        """Open a folder of features.

        Args:
            path: The folder, such as that of ``trtower embed --out``.

        Returns:
            Its features; reads none of them yet.

        Raises:
            ConfigError: It is not such a folder.
        """
        folder = read_folder(path, "features")
        return cls(folder, Description.read(folder))

    def __len__(self) -> int:
        """Return how many pictures have features, as of the last complete run."""
        return self.description.pictures

    @property
    def files(self) -> list[Path]:
        """The files, in the order of the pictures."""
        return sorted(self.path.glob(f"features-*.{self.description.format}"))

    def __iter__(self) -> Iterator[Rows]:
        """Read one file after another: the names of its pictures, their hashes, and their features (n, N, D)."""
        return map(FORMATS[self.description.format].read, self.files)

    def load(self) -> tuple[list[str], torch.Tensor]:
        """Read everything into memory.

        Returns:
            The names of the pictures, and their features (n, N, D), or (n, D) of an embedding, in the same order.
        """
        names, features = list[str](), torch.empty(0, *self.description.shape)
        features = features.to(getattr(torch, self.description.dtype))
        for rows in self:
            names += rows.names
            features = torch.cat([features, torch.from_numpy(rows.features.copy())])
        return names, features

    @property
    def left_out(self) -> list[LeftOut]:
        """The pictures without features, and why, as of the last complete run."""
        lines = (self.path / LEFT_OUT).read_text(encoding="utf-8").splitlines()
        return [LeftOut(**json.loads(line)) for line in lines]
