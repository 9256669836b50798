"""Load a checkpoint's weights and cut the tower out of them, with what is to be said of both."""

from concurrent.futures import Future
from dataclasses import dataclass

from trtower.bundle.manifest import TowerCost
from trtower.fingerprint import hash_later
from trtower.spec import TowerSpec
from trtower_export.checkpoint.checkpoint import Checkpoint
from trtower_export.console import Progress
from trtower_export.graph.cost import count_flop, measure_module
from trtower_export.graph.truncate import TruncatedTower, truncate


@dataclass(frozen=True, kw_only=True)
class LoadedTower:
    """A truncated tower in FP32, what it and the full one cost, and the hashes of its weights, once they are ready."""

    tower: TruncatedTower
    full: TowerCost
    flop: int
    hashing: Future[dict[str, str]]


def load_and_cut(checkpoint: Checkpoint, spec: TowerSpec, progress: Progress) -> LoadedTower:
    """Load the full model and keep what ``spec`` reads of it. Raises CheckpointError."""
    with progress.step(f"{'Draw' if checkpoint.random_weights else 'Load'} weights"):
        model = checkpoint.load_model(spec)
        hashing = hash_later(model, spec)
        tower = truncate(model, checkpoint.family, spec)
        return LoadedTower(
            tower=tower,
            full=measure_module(model, checkpoint.family, spec.image_size),
            flop=count_flop(tower, spec.image_size),
            hashing=hashing,
        )
