"""Read a folder of features."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from trtower.bundle.not_a_bundle import read_folder
from trtower.embedding.folder import LEFT_OUT, Description, each_file, list_files, naming_damage
from trtower.embedding.formats import FORMATS, LeftOut, Rows


class Features:
    """The features of many pictures, in a folder that `embed_pictures` wrote.

    Iterating yields one complete file at a time, in the order of the pictures, as `Rows` of NumPy arrays.

    Attributes:
        path: The folder.
        description: What made the features, how many there are, and whether the last run was complete.
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
        """Return how many pictures have features. After a run that was stopped, this reads the names in every file."""
        if self.description.complete:
            return self.description.pictures
        names = each_file(self.path, FORMATS[self.description.format])
        return sum(len(each.names) for _, each in names)

    @property
    def files(self) -> list[Path]:
        """The files, in the order of the pictures."""
        return list_files(self.path, self.description.format)

    def __iter__(self) -> Iterator[Rows]:
        """Read one file after another: the names of its pictures, their hashes, and their features (n, N, D).

        Raises ConfigError for a file that is damaged.
        """
        for path in self.files:
            with naming_damage(path):
                rows = FORMATS[self.description.format].read(path)
            yield rows

    def load(self) -> tuple[list[str], torch.Tensor]:
        """Read everything into memory.

        Returns:
            The names of the pictures, and their features (n, N, D), or (n, D) of an embedding, in the same order.
        """
        rows = [*self]
        empty = torch.empty(0, *self.description.shape, dtype=getattr(torch, self.description.dtype))
        features = torch.cat([empty, *(torch.from_numpy(each.features.copy()) for each in rows)])
        return [name for each in rows for name in each.names], features

    @property
    def left_out(self) -> list[LeftOut]:
        """The pictures without features, and why, as of the last complete run."""
        if not (self.path / LEFT_OUT).exists():  # no run was complete yet
            return []
        lines = (self.path / LEFT_OUT).read_text(encoding="utf-8").split("\n")
        return [LeftOut(**json.loads(line)) for line in lines if line]
