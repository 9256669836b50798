"""Turn many pictures into files of features: `embed_pictures`, with one tower here or with several on Ray."""

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from trtower.bundle.not_a_bundle import read_folder
from trtower.bundle.suggest import how_to_certify
from trtower.embedding.engines import Open, here
from trtower.embedding.features import Features
from trtower.embedding.find import Place, find_pictures
from trtower.embedding.folder import SCHEMA, FeatureFolder, Made, writing
from trtower.embedding.formats import FORMATS
from trtower.embedding.options import EmbedOptions
from trtower.embedding.picture import Picture
from trtower.embedding.shards import Shard, Work
from trtower.errors import BundleError, InputError
from trtower.layer_codes import read_layer_code
from trtower.spec import BY_DTYPE
from trtower.tower.prepare import count_threads
from trtower.tower.vision_tower import VisionTower

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EmbedProgress:
    """How far a run of `embed_pictures` is.

    Attributes:
        done: Pictures that this run has dealt with.
        total: Pictures that this run has to deal with, without those that the folder had before.
        before: Pictures that the folder had before.
        seconds: Since the first picture was begun, after the engine was loaded.
    """

    done: int
    total: int
    before: int
    seconds: float

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return self.done / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """How long the rest takes at this rate; None before the first picture."""
        return (self.total - self.done) / self.rate if self.rate else None


def embed_pictures(
    pictures: Place | Iterable[Place],
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: EmbedOptions | None = None,
    *,
    on_progress: Callable[[EmbedProgress], None] = lambda progress: None,
) -> Features:
    """Embed pictures into a folder of files.

    What the folder has already is not computed again: after a process was killed, or when there are more pictures, call
    it again with the same arguments. Pictures that cannot be read are left out, and named in the folder.

    Args:
        pictures: A folder, a pattern such as "photos/*.jpg", a list of paths (.txt, or "-" for standard input), a
            WebDataset's tar file, a Parquet file, a picture's file, or several of these.
        bundle: The folder that `trtower export` wrote.
        out: The folder to write to: new, empty, or of an earlier run with this tower.
        options: How to embed. Default: `EmbedOptions()`.
        on_progress: Called before the first picture, and after each.

    Returns:
        All features in the folder.

    Raises:
        ConfigError: An option or place is invalid, two pictures have one name, the folder holds something else or
            features of another tower, or it holds features of a picture whose file has changed.
        InputError: None of the pictures could be embedded.
        BundleError: The bundle is damaged, or not certified.
        BackendError: No requested backend can run the bundle, or Ray does not answer.
        BuildError: The disk is full. The complete files stay.
        MissingExtraError: A package is missing.
    """
    options = options or EmbedOptions()
    folder = read_folder(out, "out")
    FORMATS[options.format].check()
    tower = VisionTower(
        bundle,
        select_layer=options.select_layer,
        select_feature=options.select_feature,
        backend=options.backend,
        device=options.device,
        require_certificate=not options.allow_uncertified,
    )
    if (reason := tower.bundle.uncertifiable()) and not options.allow_uncertified:
        advice = how_to_certify(tower.bundle, options.backend)
        raise BundleError(f"{bundle} is not certified: {reason}. {advice}; or embed with --allow-uncertified.")
    open_engines = _opener(tower, options)
    places = [pictures] if isinstance(pictures, str | os.PathLike) else [*pictures]
    found = find_pictures(places, options.column)
    if found.remark:
        logger.warning("%s", found.remark)
    with writing(folder, _made(tower, options)) as features:
        lacking = features.lacking(found.pictures, retry=options.retry)
        progress = _Progress(len(lacking), len(found.pictures) - len(lacking), on_progress)
        if lacking:
            _embed(open_engines, tower, features, lacking, options, progress)
            features.read_known()
        description = features.finish()
    if not description.pictures:
        first = Features.open(folder).left_out[0]
        raise InputError(f"none of {description.left_out} pictures could be embedded; {first.name}: {first.reason}")
    return Features.open(folder)


def _embed(
    open_engines: Open,
    tower: VisionTower,
    features: FeatureFolder,
    pictures: Sequence[Picture],
    options: EmbedOptions,
    progress: "_Progress",
) -> None:
    """Embed the pictures that a folder lacks."""
    made = features.description
    batch_size = options.batch_size or tower.bundle.manifest.batch.opt
    step = options.files_of(made.shape, BY_DTYPE[made.dtype].itemsize, batch_size)
    parts = [pictures[start : start + step] for start in range(0, len(pictures), step)]
    shards = [Shard(index=index, pictures=part) for index, part in zip(features.free_indices(), parts, strict=False)]
    with open_engines() as engines:
        features.begin(engines.runs.backend, any_backend=options.backend != "auto")
        work = Work(
            folder=features.path.absolute(),
            format=made.format,
            dtype=made.dtype,
            shape=made.shape,
            about={**made.made, **asdict(engines.runs)},
            batch_size=batch_size,
            threads=count_threads(options.threads),
            max_bytes=options.max_bytes,
            max_pixels=options.max_pixels,
        )
        progress.start()
        for _ in engines.embed(work, shards, progress.tick):
            pass


def _opener(tower: VisionTower, options: EmbedOptions) -> Open:
    if options.ray is None:
        return lambda: here(tower)
    from trtower.embedding.on_ray import import_ray, on_ray

    import_ray()
    return lambda: on_ray(tower, options)


def _made(tower: VisionTower, options: EmbedOptions) -> Made:
    """Describe what a tower's features are made of."""
    manifest = tower.bundle.manifest
    layers, tokens = read_layer_code(tower.select_layer, tower.select_feature, manifest.spec.num_layers)
    of_engine = "float32" if manifest.output.dtype == "bfloat16" else manifest.output.dtype
    return Made(
        schema=SCHEMA,
        format=options.format,
        dtype=options.dtype or of_engine,
        shape=tower.feature_shape,
        layers=layers,
        tokens=tokens,
        bundle=manifest.name,
        tower_sha256=manifest.tower_sha256,
        checkpoint=manifest.source.checkpoint,
        random_weights=manifest.source.random_weights,
        precision=manifest.precision,
    )


class _Progress:
    """Tells a callback how far a run is."""

    def __init__(self, total: int, before: int, report: Callable[[EmbedProgress], None]) -> None:
        self._total, self._before, self._report = total, before, report
        self._done = 0

    def start(self) -> None:
        """Report that the first picture begins."""
        self._started = time.monotonic()
        self.tick(0)

    def tick(self, number: int) -> None:
        """Report that so many more pictures were dealt with."""
        self._done += number
        seconds = time.monotonic() - self._started
        self._report(EmbedProgress(done=self._done, total=self._total, before=self._before, seconds=seconds))
