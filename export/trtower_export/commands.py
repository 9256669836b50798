"""The export side's commands. The runtime finds them by entry point; they import what is heavy only when they run."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import BUILD_NOTES, BuildSettings
from trtower.extras import import_extra
from trtower.layer_codes import parse_layer_code
from trtower_export.arguments import (
    BatchOption,
    BuildFlavourOption,
    BundleArgument,
    CapabilityOption,
    CheckpointArgument,
    DemoOutOption,
    FlavourOption,
    HardwareCompatibleOption,
    HeadOption,
    ImageSizeOption,
    ImagesOption,
    KeepFp16Option,
    KeepFp32Option,
    KnownFaultOption,
    LayoutOption,
    NormalizeOption,
    OptimizationLevelOption,
    OutOption,
    PickleOption,
    PixelsOption,
    PoolOption,
    PrecisionOption,
    RandomWeightsOption,
    RemoteCodeOption,
    RevisionOption,
    SelectFeatureOption,
    SelectLayerOption,
    StoreOption,
    TargetOption,
    TowerOption,
    read_names,
    read_profile,
)
from trtower_export.console import ConsoleProgress, importing, say
from trtower_export.measuring import show_verdict
from trtower_export.options import ExportOptions, Trust


def export(
    checkpoint: CheckpointArgument,
    out: OutOption = None,
    select_layer: SelectLayerOption = None,
    select_feature: SelectFeatureOption = None,
    image_size: ImageSizeOption = None,
    pixels: PixelsOption = "float",
    layout: LayoutOption = "nchw",
    head: HeadOption = "none",
    normalize: NormalizeOption = False,
    pool: PoolOption = None,
    precision: PrecisionOption = "fp16",
    keep_fp32: KeepFp32Option = None,
    keep_fp16: KeepFp16Option = None,
    images: ImagesOption = None,
    batch: BatchOption = None,
    flavour: FlavourOption = "auto",
    compute_capability: CapabilityOption = None,
    target: TargetOption = None,
    accept_known_fault: KnownFaultOption = None,
    revision: RevisionOption = None,
    tower: TowerOption = None,
    random_weights: RandomWeightsOption = False,
    allow_pickle: PickleOption = False,
    trust_remote_code: RemoteCodeOption = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle and its plans.")] = False,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Finish with a check on two photographs.")] = True,
    store: StoreOption = True,
) -> int:
    """Export a checkpoint's tower into a bundle.

    Cuts the tower after the deepest layer that is read, traces it to ONNX, builds a plan if TensorRT is installed, and
    checks the result. Exits with 1 if the check misses a bound.
    """
    console, progress = Console(), ConsoleProgress(Console(stderr=True))
    with importing(progress):
        from trtower.inspection import describe_loading
        from trtower_export.pipeline import export_tower
        from trtower_export.plan.store import find_store

    options = ExportOptions(
        select_layer=None if select_layer is None else parse_layer_code(select_layer),
        select_feature=select_feature,
        image_size=image_size,
        pixels=pixels,
        layout=layout,
        head=head,
        normalize=normalize,
        pool=pool,
        precision=precision,
        keep_fp32=read_names(keep_fp32 or ""),
        keep_fp16=read_names(keep_fp16 or ""),
        images=images,
        profiles=tuple(read_profile(text) for text in batch or ()),
        flavour=flavour,
        store=find_store(progress) if store and flavour != "none" else None,
        compute_capabilities=tuple(compute_capability or ()),
        target=target,
        accept_known_faults=tuple(accept_known_fault or ()),
        random_weights=random_weights,
        revision=revision,
        tower=tower,
        trust=Trust(allow_pickle=allow_pickle, remote_code=trust_remote_code),
        overwrite=overwrite,
        check=check,
    )
    bundle = export_tower(checkpoint, out, options, progress)
    if bundle.manifest.source.random_weights:
        say(console, "  random weights: this bundle is a rehearsal; its features are meaningless")
    say(console, str(bundle.path))
    code = show_verdict(console, bundle) if bundle.manifest.certificate else 0
    deployment = bundle.manifest.target
    if code == 0 and deployment and not bundle.manifest.plans:
        notes = bundle.path / BUILD_NOTES
        say(console, f"Build its plan on the machine that serves it ({deployment.name}): {notes} says how.")
    elif code == 0:
        say(console, describe_loading(bundle))
    return code


def build(
    bundle: BundleArgument,
    flavour: BuildFlavourOption = "auto",
    compute_capability: CapabilityOption = None,
    workspace_mib: Annotated[
        int | None, typer.Option(metavar="MIB", help="GPU memory that a layer may use, in MiB. Default: all of it.")
    ] = None,
    optimization_level: OptimizationLevelOption = None,
    hardware_compatible: HardwareCompatibleOption = False,
    version_compatible: Annotated[
        bool,
        typer.Option(
            "--version-compatible", help="Build a plan that TensorRT's lean runtime can run too. Only for tensorrt."
        ),
    ] = False,
    strip: Annotated[
        bool,
        typer.Option("--strip", help="Leave the weights out; loading takes them from the graph. Needs a GPU."),
    ] = False,
    accept_known_fault: KnownFaultOption = None,
    store: StoreOption = True,
) -> int:
    """Add a TensorRT plan to a bundle.

    Run it where the tower is served: it needs only the bundle and TensorRT, not the checkpoint.
    """
    from trtower_export.plan.build import add_plan
    from trtower_export.plan.store import find_store

    progress = ConsoleProgress(Console(stderr=True))
    settings = BuildSettings(
        workspace_mib=workspace_mib,
        optimization_level=optimization_level,
        hardware_compatible=hardware_compatible,
        version_compatible=version_compatible,
        stripped=strip,
    )
    opened, plans = Bundle.open(bundle), find_store(progress) if store else None
    built = add_plan(
        opened,
        flavour,
        tuple(compute_capability or ()),
        progress,
        settings=settings,
        store=plans,
        accept_known_faults=tuple(accept_known_fault or ()),
    )
    say(Console(), str(built))
    return 0


def demo(out: DemoOutOption = Path("engines")) -> int:
    """Run a demo on real weights, offline.

    Exports, checks and draws a pretrained tower on photographs, then times a full-size rehearsal.
    """
    for package in ("transformers", "onnxruntime", "skimage"):  # all now: one command installs every extra
        import_extra(package, extra="export,cpu,demo", purpose="the demo")
    from trtower_export.demo.demo import run_demo

    return run_demo(out, Console())
