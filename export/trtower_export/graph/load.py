"""Load a checkpoint's weights, cut the tower out of them, and count both."""

from concurrent.futures import Future
from dataclasses import dataclass

from trtower.bundle.manifest import TowerCost
from trtower.fingerprint import hash_later
from trtower.parity.golden import Golden, GoldenInputs
from trtower.spec import TowerSpec
from trtower.tower.image_processor import ImageProcessor
from trtower_export.checkpoint.checkpoint import Checkpoint
from trtower_export.console import Progress
from trtower_export.graph.cost import count_flop, measure_uncut
from trtower_export.graph.pixels import PixelsFromBytes
from trtower_export.graph.reference import UncutTower
from trtower_export.graph.truncate import TruncatedTower


@dataclass(frozen=True, kw_only=True)
class LoadedTower:
    """A cut tower, and what the manifest says about it.

    Attributes:
        tower: The cut tower, in FP32.
        full: The cost of the full tower.
        flop: The FLOP of the cut tower for one image.
        hashing: The hashes of the weights, once they are ready.
        golden: The golden answers of the full tower.
        head_sha256: The hashes of the weights that the head keeps outside the tower.
    """

    tower: TruncatedTower
    full: TowerCost
    flop: int
    hashing: Future[dict[str, str]]
    golden: Golden
    head_sha256: dict[str, str]


def load_and_cut(
    checkpoint: Checkpoint, spec: TowerSpec, processor: ImageProcessor, inputs: GoldenInputs, progress: Progress
) -> LoadedTower:
    """Load the full model, ask it for the golden answers, and keep only what ``spec`` reads.

    ``processor`` is the bundle's. Raises CheckpointError, and ConfigError if the graph cannot do the rest of its work.
    """
    with progress.step(f"{'Draw' if checkpoint.random_weights else 'Load'} weights"):
        uncut = UncutTower.load(checkpoint, spec)
        hashing = hash_later(uncut.model, spec)
    with progress.step(f"Run the uncut tower on {len(inputs.images)} golden images"):
        golden = uncut.answer(inputs)
    tower = uncut.cut()
    if not spec.takes_floats:
        tower.pixels = PixelsFromBytes(processor, spec.layout)
    return LoadedTower(
        tower=tower,
        full=measure_uncut(uncut),
        flop=count_flop(tower, spec.image_size),
        hashing=hashing,
        golden=golden,
        head_sha256=uncut.head_sha256(),
    )
