"""The export side's commands. They are found by entry point; nothing heavy is imported before one runs."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import PREPROCESSOR, BuildSettings
from trtower.inspection import describe_loading
from trtower.layer_codes import parse_layer_code
from trtower.names import list_choices
from trtower.spec import EIGHT_BIT, PRECISIONS
from trtower_export.arguments import check_png, read_names, read_numbers, read_profile
from trtower_export.console import ConsoleProgress, as_json, importing, say
from trtower_export.options import ExportOptions, Trust
from trtower_export.plan.store import default_store

CheckpointArgument = Annotated[
    str, typer.Argument(help="Hub id, folder (Hugging Face, LLaVA, VILA), OpenCLIP file, or a recipe's name.")
]
BundleArgument = Annotated[Path, typer.Argument(help="The bundle's folder.")]
BatchOption = Annotated[
    list[str] | None,
    typer.Option(
        "--batch",
        metavar="MIN,OPT,MAX",
        help="Images per engine call: at least, as tuned, at most. One number N is 1,N,N. Repeat for several profiles.",
    ),
]
PrecisionOption = Annotated[
    str,
    typer.Option(
        help="fp16; auto, which is fp16 and fp32 where that is not enough; "
        f"{list_choices([name for name in PRECISIONS if name != 'fp16'])}."
    ),
]
FlavourOption = Annotated[
    str,
    typer.Option(help="tensorrt (on its GPU), tensorrt-rtx (anywhere), none, or auto: what this machine can do."),
]
CapabilityOption = Annotated[
    list[str] | None,
    typer.Option(
        "--compute-capability", help="GPU to build for, such as 8.9, or 8.6,8.9; may repeat. Default: a portable plan."
    ),
]
StoreOption = Annotated[
    bool, typer.Option("--store/--no-store", help="Keep plans in the user's cache, and take those that are there.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
WeightsOption = Annotated[
    str | None,
    typer.Option("--checkpoint", help="Where the weights are now. Default: where they were at export."),
]
ImagesOption = Annotated[Path | None, typer.Option(help="Folder of images. Default: the demo extra's photographs.")]
PickleOption = Annotated[
    bool, typer.Option("--allow-pickle", help="Read pickled weights, which may run their author's code.")
]
RemoteCodeOption = Annotated[bool, typer.Option("--trust-remote-code", help="Run the checkpoint's own Python code.")]
TowerOption = Annotated[
    str | None,
    typer.Option("--tower", help="Which tower of a checkpoint that has several. Default of a check: the exported one."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def export(
    checkpoint: CheckpointArgument,
    out: Annotated[Path | None, typer.Option(help="The bundle's folder. Default: engines/NAME.")] = None,
    select_layer: Annotated[
        str | None,
        typer.Option(
            help="Hidden states to read: -2, or several as in --select-layer=-2,-5,6, or last_hidden_state. "
            "Default: what the checkpoint says, else -2."
        ),
    ] = None,
    select_feature: Annotated[
        str | None, typer.Option(help="patch, cls_patch, or LLaVA-NeXT's slices. Default: what the checkpoint says.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels a side; positions are interpolated. Default: the checkpoint's.")
    ] = None,
    precision: PrecisionOption = "fp16",
    keep_fp32: Annotated[
        str | None,
        typer.Option(
            "--keep-fp32", help="Operations to keep in FP32, as `doctor` names them: 'layers.3.mlp,layers.*.norm1'."
        ),
    ] = None,
    keep_fp16: Annotated[
        str | None,
        typer.Option(
            "--keep-fp16",
            help=f"What {list_choices(EIGHT_BIT)} leaves in FP16; '' is nothing. "
            "Default: of int8, what follows activations.",
        ),
    ] = None,
    images: ImagesOption = None,
    batch: BatchOption = None,
    flavour: FlavourOption = "auto",
    compute_capability: CapabilityOption = None,
    revision: RevisionOption = None,
    tower: TowerOption = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Rehearse without weights: same size, build time and latency.")
    ] = False,
    allow_pickle: PickleOption = False,
    trust_remote_code: RemoteCodeOption = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the bundle that is there, with its plans.")
    ] = False,
    check: Annotated[bool, typer.Option("--check/--no-check", help="End with a check on two photographs.")] = True,
    store: StoreOption = True,
) -> int:
    """Cut, trace and build a checkpoint's tower into a bundle."""
    console, progress = Console(), ConsoleProgress(Console(stderr=True))
    with importing(progress):
        from trtower_export.pipeline import export_tower

    options = ExportOptions(
        select_layer=None if select_layer is None else parse_layer_code(select_layer),
        select_feature=select_feature,
        image_size=image_size,
        precision=precision,
        keep_fp32=read_names(keep_fp32 or ""),
        keep_fp16=None if keep_fp16 is None else read_names(keep_fp16),
        images=images,
        profiles=tuple(read_profile(text) for text in batch or ()),
        flavour=flavour,
        store=default_store() if store and flavour != "none" else None,
        compute_capabilities=tuple(compute_capability or ()),
        random_weights=random_weights,
        revision=revision,
        tower=tower,
        trust=Trust(allow_pickle=allow_pickle, remote_code=trust_remote_code),
        overwrite=overwrite,
        check=check,
    )
    bundle = export_tower(checkpoint, out, options, progress)
    if bundle.manifest.source.random_weights:
        say(console, "  random weights: this bundle is a rehearsal, its features mean nothing")
    say(console, str(bundle.path))
    code = _verdict(console, bundle) if bundle.manifest.certificate else 0
    if code == 0:
        say(console, describe_loading(bundle.path))
    return code


def build(
    bundle: BundleArgument,
    flavour: Annotated[str, typer.Option(help="tensorrt, tensorrt-rtx, or auto: what this machine can do.")] = "auto",
    compute_capability: CapabilityOption = None,
    workspace_mib: Annotated[
        int | None, typer.Option(help="GPU memory that a layer may use. Default: all of it.")
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(help="0 to 5: how long TensorRT looks for faster kernels. Default: TensorRT's, 3.")
    ] = None,
    hardware_compatible: Annotated[
        bool, typer.Option("--hardware-compatible", help="tensorrt: for every GPU from Ampere on, and slower.")
    ] = False,
    strip: Annotated[
        bool, typer.Option("--strip", help="Leave the weights out; they come from the graph at load. Needs a GPU.")
    ] = False,
    store: StoreOption = True,
) -> int:
    """Add a plan to a bundle, where it is served: needs only the bundle and TensorRT."""
    from trtower_export.plan.build import add_plan

    progress = ConsoleProgress(Console(stderr=True))
    settings = BuildSettings(
        workspace_mib=workspace_mib,
        optimization_level=optimization_level,
        hardware_compatible=hardware_compatible,
        stripped=strip,
    )
    opened, kept = Bundle.open(bundle), default_store() if store else None
    built = add_plan(opened, flavour, tuple(compute_capability or ()), progress, settings=settings, store=kept)
    typer.echo(built)
    return 0


def check(
    bundle: BundleArgument,
    images: ImagesOption = None,
    checkpoint: WeightsOption = None,
    tower: TowerOption = None,
    backend: Annotated[
        str, typer.Option(help="auto, a backend to run the bundle on, or emulated-fp16: every rounding there could be.")
    ] = "auto",
    by_layer: Annotated[
        bool, typer.Option("--by-layer", help="Compare every hidden state, and name the first whose error jumps.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Folder for a page with pictures; compares by layer, too.")
    ] = None,
    allow_pickle: PickleOption = False,
    trust_remote_code: RemoteCodeOption = False,
    json_: JsonOption = False,
) -> int:
    """Prove a bundle against the uncut FP32 PyTorch tower; exit 1 when a bound is missed."""
    console, progress = Console(), ConsoleProgress(Console(stderr=True))
    opened = Bundle.open(bundle)
    with importing(progress):
        from trtower.tower.image_processor import ImageProcessor
        from trtower_export.check.certify import check_bundle
        from trtower_export.check.photographs import load_photographs, say_skipped
        from trtower_export.check.report.report import Report, make_folder
        from trtower_export.checkpoint.checkpoint import reopen_checkpoint

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
    page = None
    if pages and report:
        with progress.step("Draw the report"):
            page = pages.write(report, checked)
    code = _verdict(console, checked, json_=json_)
    if page and json_:
        progress.say(str(page))
    elif page:
        say(console, str(page))
    return code


def doctor(
    checkpoint: CheckpointArgument,
    images: ImagesOption = None,
    select_layer: Annotated[str | None, typer.Option(help="As for export.")] = None,
    image_size: Annotated[int | None, typer.Option(help="As for export.")] = None,
    error_images: Annotated[
        int,
        typer.Option(
            min=0, help="On how many images, the hardest, each operation is rounded alone: half a run each. 0: none."
        ),
    ] = 1,
    picture: Annotated[Path | None, typer.Option(help="PNG to draw: layers by operations.")] = None,
    every: Annotated[bool, typer.Option("--every", help="List every operation of every layer.")] = False,
    revision: RevisionOption = None,
    tower: TowerOption = None,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Examine a rehearsal.")] = False,
    allow_pickle: PickleOption = False,
    trust_remote_code: RemoteCodeOption = False,
    json_: JsonOption = False,
) -> int:
    """Say what half precision costs in every operation of a tower, and where it overflows."""
    console, progress = Console(), ConsoleProgress(Console(stderr=True))
    if picture:
        check_png(picture, "--picture")
    with importing(progress):
        from trtower.tower.image_processor import ImageProcessor
        from trtower_export.check.photographs import load_photographs, prepare, say_skipped
        from trtower_export.checkpoint.checkpoint import open_checkpoint
        from trtower_export.checkpoint.preprocessor import fit_preprocessor
        from trtower_export.precision.doctor import examine
        from trtower_export.precision.heatmap import draw_heatmap
        from trtower_export.precision.table import print_operations

    photographs = load_photographs(images)
    say_skipped(photographs, progress)
    found = open_checkpoint(
        checkpoint,
        random_weights=random_weights,
        revision=revision,
        tower=tower,
        trust=Trust(allow_pickle=allow_pickle, remote_code=trust_remote_code),
    )
    spec = found.spec(None if select_layer is None else parse_layer_code(select_layer), None, image_size)
    processor = ImageProcessor(fit_preprocessor(found, spec.image_size, progress))
    progress.say(found.describe())
    progress.say(f"reads {spec.reading}, at {spec.image_size} pixels")
    pixels = prepare(photographs.images, processor)
    named = {each.name: pixel_values for each, pixel_values in zip(photographs.images, pixels, strict=True)}
    diagnosis = examine(found, spec, named, progress, error_images=error_images)
    if picture:
        picture.write_bytes(draw_heatmap(diagnosis.operations))
        progress.say(str(picture))
    if json_:
        typer.echo(as_json(dataclasses.replace(diagnosis, skipped=photographs.skipped)))
    else:
        print_operations(console, diagnosis, every=every)
    return 0


def bench(
    bundle: BundleArgument,
    batch: Annotated[
        list[str] | None,
        typer.Option(
            "--batch",
            metavar="N,…",
            help="Images at once, such as 1,8,32. Default: the profile's; its minimum on a CPU.",
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Comma-separated competitors: eager, sdpa, compile, onnxruntime, … Default: all.")
    ] = None,
    checkpoint: WeightsOption = None,
    tower: TowerOption = None,
    backend: Annotated[str, typer.Option(help="What the bundle runs on, as for VisionTower.load.")] = "auto",
    rounds: Annotated[int | None, typer.Option(min=1, help="Default: 100 on a GPU, 7 elsewhere.")] = None,
    tiles: Annotated[int, typer.Option(min=0, help="Images in the list that LLaVA's tower loops over. 0: none.")] = 16,
    json_: JsonOption = False,
    plot: Annotated[Path | None, typer.Option(help="PNG to draw.")] = None,
    allow_pickle: PickleOption = False,
    trust_remote_code: RemoteCodeOption = False,
) -> int:
    """Race a bundle against PyTorch and other runtimes, in turn in one run."""
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
        batches=tuple(size for text in batch or () for size in read_numbers(text)) or None,
        against=competitors() if against is None else read_names(against),
        backend=backend,
        rounds=rounds,
        tiles=tiles,
    )
    trust = Trust(allow_pickle=allow_pickle, remote_code=trust_remote_code)
    found = reopen_checkpoint(opened.manifest.source, moved_to=checkpoint, tower=tower, trust=trust)
    benchmark = run_benchmark(opened, found, options, progress)
    if json_:
        typer.echo(as_json(benchmark))
    else:
        print_benchmark(console, benchmark)
    if plot:
        plot.write_bytes(draw_benchmark(benchmark))
    return 0


def demo(
    out: Annotated[Path, typer.Option(help="Where the bundles and the picture go.")] = Path("engines"),
) -> int:
    """Show the whole way on pretrained weights and photographs, offline."""
    from trtower_export.demo.demo import run_demo

    return run_demo(out, Console())


def recipes(json_: JsonOption = False) -> int:
    """List the checkpoints that trtower knows the tower of, and what an export of each takes by default."""
    from trtower_export.recipes import all_recipes
    from trtower_export.recipes.table import describe_recipe, print_recipes

    rows = [describe_recipe(recipe) for recipe in all_recipes()]
    if json_:
        typer.echo(as_json(rows))
    else:
        print_recipes(Console(), rows)
    return 0


def _verdict(console: Console, bundle: Bundle, *, json_: bool = False) -> int:
    """Print what a check found, and return its exit code."""
    from trtower_export.check.tables import print_certificate

    certificate = bundle.manifest.certificate
    assert certificate is not None  # noqa: S101 - the bundle was checked
    if json_:
        typer.echo(as_json(certificate))
    else:
        print_certificate(console, certificate, rehearsal=bundle.manifest.source.random_weights)
    return 0 if certificate.passed else 1
