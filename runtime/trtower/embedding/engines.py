"""What embeds shards: one tower in this process. Several, on Ray, are in on_ray.py."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from trtower.embedding.shards import Done, Shard, Tick, Work, embed_shards
from trtower.errors import BackendError
from trtower.tower.vision_tower import VisionTower

OF_CERTIFICATE = ("kind", "passed", "date", "backend", "runner", "gpu")
"""What features repeat of the certificate."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """What runs: the ``backend``, with its version in ``runner``, and the certificate that vouches for it, if any."""

    backend: str
    runner: str
    certificate: dict[str, Any] | None

    @classmethod
    def of(cls, tower: VisionTower) -> "Runs":
        """Describe a loaded tower."""
        if tower.runner is None:
            raise BackendError(f"{tower.vision_tower_name} is not loaded: call load_model.")
        backend, executed = tower.runner.backend, tower.runner.files[0]
        found = tower.bundle.find_certificate(backend, executed)
        is_valid = found is not None and not tower.bundle.changed_since(found)
        certificate = {name: getattr(found, name) for name in OF_CERTIFICATE} if is_valid else None
        return cls(backend=backend, runner=tower.runner.name, certificate=certificate)


class Engines(Protocol):
    """One or more loaded towers, and what they run on."""

    @property
    def runs(self) -> Runs: ...  # noqa: D102

    def embed(self, work: Work, shards: Sequence[Shard], tick: Tick) -> Iterator[Done]:
        """Write the file of each shard, in any order, and yield it once it is on the disk."""


Open = Callable[[], AbstractContextManager[Engines]]
"""Loads the engines, for the length of a `with` block."""


@dataclass(frozen=True)
class Here:
    """A tower in this process."""

    tower: VisionTower

    @property
    def runs(self) -> Runs:
        """What the tower runs on."""
        return Runs.of(self.tower)

    def embed(self, work: Work, shards: Sequence[Shard], tick: Tick) -> Iterator[Done]:
        """Write the file of each shard, in their order."""
        return embed_shards(self.tower, work, shards, tick)


@contextmanager
def here(tower: VisionTower) -> Iterator[Here]:
    """Load a tower for the length of the block."""
    tower.load_model()
    with tower:
        yield Here(tower)
