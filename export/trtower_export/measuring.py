"""The commands that measure: check, doctor and bench. They import what is heavy only when they run."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import PREPROCESSOR
from trtower.cli import BATCHES_HELP, read_batches
from trtower.errors import ConfigError
from trtower.layer_codes import parse_layer_code
from trtower_export.arguments import (
    BackendOption,
    BundleArgument,
    CheckBackendOption,
    CheckpointArgument,
    ErrorImagesOption,
    ExportedTowerOption,
    HeadOption,
    ImageSizeOption,
    ImagesOption,
    JsonOption,
    NormalizeOption,
    ObservationsOption,
    PickleOption,
    PictureOption,
    PlotOption,
    PolicyOption,
    PoolOption,
    RemoteCodeOption,
    ReportOption,
    RevisionOption,
    SelectLayerOption,
    TowerOption,
    WeightsOption,
    check_png,
    complete,
    read_names,
)
from trtower_export.console import ConsoleProgress, as_json, importing, say
from trtower_export.options import ExportOptions, Trust

if TYPE_CHECKING:
    from trtower_export.check.policy import PolicyCheck


def _competitors() -> tuple[str, ...]:
    from trtower_export.bench.entrants import competitors

    return competitors()


def check(
    bundle: BundleArgument,
    images: ImagesOption = None,
    checkpoint: WeightsOption = None,
    tower: ExportedTowerOption = None,
    backend: CheckBackendOption = "auto",
    by_layer: Annotated[
        bool, typer.Option("--by-layer", help="Compare every hidden state, and name the first whose error jumps.")
    ] = False,
    policy: PolicyOption = None,
    observations: ObservationsOption = None,
    report: ReportOption = None,
    allow_pickle: PickleOption = False,
    trust_remote_code: RemoteCodeOption = False,
    json_: JsonOption = False,
) -> int:
    """Compare a bundle with its PyTorch tower.

    The reference is the whole tower in FP32. Writes a certificate into the bundle. Exits with 1 if a bound is missed.
    """
    if observations and not policy:
        raise ConfigError("--observations is what a policy acts on: name its folder with --policy.")
    console, progress = Console(), ConsoleProgress(Console(stderr=True))
    opened = Bundle.open(bundle)
    with importing(progress):
        from trtower.tower.image_processor import ImageProcessor
        from trtower_export.check import policy as policies
        from trtower_export.check.certify import check_bundle
        from trtower_export.check.photographs import load_photographs, say_skipped
        from trtower_export.check.report.report import Report, make_folder
        from trtower_export.checkpoint.checkpoint import reopen_checkpoint

    if policy:
        policies.check_named(opened, policy)
    pages = None
    if report:
        make_folder(report)
        pages = Report(opened.manifest.spec, ImageProcessor.from_file(opened.verify(PREPROCESSOR)))
    photographs = load_photographs(images)
    say_skipped(photographs, progress)
    trust = Trust(allow_pickle=allow_pickle, remote_code=trust_remote_code)
    checked = check_bundle(
        opened,
        reopen_checkpoint(opened.manifest.source, moved_to=checkpoint, tower=tower, trust=trust),
        photographs,
        progress,
        backend=backend,
        by_layer=by_layer or pages is not None,
        on_image=pages.see if pages else None,
    )
    acted = policies.check_policy(checked, policy, observations, progress, backend=backend) if policy else None
    page = None
    if pages and report:
        with progress.step("Draw the report"):
            page = pages.write(report, checked, acted)
    code = show_verdict(console, checked, acted, json_=json_)
    if page and json_:
        progress.say(str(page))
    elif page:
        say(console, str(page))
    return code


def doctor(
    checkpoint: CheckpointArgument,
    images: ImagesOption = None,
    select_layer: SelectLayerOption = None,
    image_size: ImageSizeOption = None,
    head: HeadOption = "none",
    normalize: NormalizeOption = False,
    pool: PoolOption = None,
    error_images: ErrorImagesOption = 1,
    picture: PictureOption = None,
    every: Annotated[bool, typer.Option("--every", help="List every operation of every layer.")] = False,
    revision: RevisionOption = None,
    tower: TowerOption = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Examine a rehearsal, without the weights.")
    ] = False,
    allow_pickle: PickleOption = False,
    trust_remote_code: RemoteCodeOption = False,
    json_: JsonOption = False,
) -> int:
    """Find where half precision hurts a tower.

    Measures what half precision costs in every operation, and where it overflows.
    """
    console, progress = Console(), ConsoleProgress(Console(stderr=True))
    if picture:
        check_png(picture, "--picture")
    with importing(progress):
        from trtower.tower.image_processor import ImageProcessor
        from trtower_export.check.photographs import load_photographs, prepare_floats, say_skipped
        from trtower_export.checkpoint.checkpoint import open_checkpoint
        from trtower_export.checkpoint.head import describe_tower
        from trtower_export.checkpoint.preprocessor import fit_preprocessor
        from trtower_export.precision.doctor import examine
        from trtower_export.precision.heatmap import draw_heatmap
        from trtower_export.precision.table import print_operations

    photographs = load_photographs(images)
    say_skipped(photographs, progress)
    options = ExportOptions(
        select_layer=None if select_layer is None else parse_layer_code(select_layer),
        image_size=image_size,
        head=head,
        normalize=normalize,
        pool=pool,
        random_weights=random_weights,
        revision=revision,
        tower=tower,
        trust=Trust(allow_pickle=allow_pickle, remote_code=trust_remote_code),
    )
    opened = open_checkpoint(checkpoint, **options.of_checkpoint)
    spec = describe_tower(opened, options)
    processor = ImageProcessor(fit_preprocessor(opened, spec.image_size, progress))
    progress.say(opened.describe())
    progress.say(f"reads {spec.reading}, at {spec.image_size} pixels")
    pixels = prepare_floats(photographs.images, processor, spec)
    named = {each.name: pixel_values for each, pixel_values in zip(photographs.images, pixels, strict=True)}
    diagnosis = examine(opened, spec, named, progress, error_images=error_images)
    if picture:
        picture.write_bytes(draw_heatmap(diagnosis.operations))
        progress.say(str(picture))
    if json_:
        say(Console(), as_json(dataclasses.replace(diagnosis, skipped=photographs.skipped)))
    else:
        print_operations(console, diagnosis, every=every)
    return 0


def bench(
    bundle: BundleArgument,
    batch: Annotated[
        list[str] | None,
        typer.Option("--batch", metavar="N,N", help=BATCHES_HELP),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Competitors, separated by commas: eager, sdpa, compile, onnxruntime and others. Default: all.",
            autocompletion=complete(_competitors),
        ),
    ] = None,
    checkpoint: WeightsOption = None,
    tower: ExportedTowerOption = None,
    backend: BackendOption = "auto",
    rounds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="How often to time each batch size. Default: 100 on a GPU, 7 elsewhere."),
    ] = None,
    tiles: Annotated[
        int,
        typer.Option(
            min=0, metavar="N", help="Images in the list that LLaVA's tower loops over (0 skips that measurement)."
        ),
    ] = 16,
    json_: JsonOption = False,
    plot: PlotOption = None,
    allow_pickle: PickleOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> int:
    """Time a bundle against PyTorch and others.

    All competitors take turns in one run.
    """
    console, progress = Console(), ConsoleProgress(Console(stderr=True))
    opened = Bundle.open(bundle)
    if plot:
        check_png(plot, "--plot")
    with importing(progress):
        from trtower_export.bench.benchmark import BenchOptions, run_benchmark
        from trtower_export.bench.entrants import competitors
        from trtower_export.bench.tables import draw_benchmark, print_benchmark
        from trtower_export.checkpoint.checkpoint import reopen_checkpoint

    options = BenchOptions(
        batches=tuple(read_batches(batch) or ()) or None,
        against=competitors() if against is None else read_names(against),
        backend=backend,
        rounds=rounds,
        tiles=tiles,
    )
    trust = Trust(allow_pickle=allow_pickle, remote_code=trust_remote_code)
    original = reopen_checkpoint(opened.manifest.source, moved_to=checkpoint, tower=tower, trust=trust)
    benchmark = run_benchmark(opened, original, options, progress)
    if json_:
        say(Console(), as_json(benchmark))
    else:
        print_benchmark(console, benchmark)
    if plot:
        plot.write_bytes(draw_benchmark(benchmark))
    return 0


def show_verdict(console: Console, bundle: Bundle, acted: "PolicyCheck | None" = None, *, json_: bool = False) -> int:
    """Print a bundle's certificate and the actions of a policy, and return the exit code of the check."""
    from trtower_export.check.tables import print_certificate, print_policy

    certificate = bundle.manifest.certificate
    assert certificate is not None  # noqa: S101 - the bundle was checked
    if json_:
        with_policy = {"policy": dataclasses.asdict(acted) | {"passed": acted.passed}} if acted else {}
        say(Console(), as_json(dataclasses.asdict(certificate) | with_policy))
    else:
        print_certificate(console, certificate, rehearsal=bundle.manifest.source.random_weights)
        if acted:
            print_policy(console, acted)
    return 0 if certificate.passed and (acted is None or acted.passed) else 1
