"""From a checkpoint to a bundle: the whole story. A reader starts here.

checkpoint -> truncate -> precision -> graph -> bundle -> plan -> check
"""

from pathlib import Path

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import GRAPH
from trtower.bundle.staging import disk_errors, refuse_existing, staged
from trtower.bundle.suggest import build_command
from trtower.errors import BuildError, TrtowerError
from trtower.spec import merge_profiles
from trtower_export.bundling import check_space, write_bundle
from trtower_export.check.certify import check_bundle
from trtower_export.check.samples import CHECK_PHOTOGRAPHS, load_for_export, make_samples
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.checkpoint.preprocessor import fit_preprocessor
from trtower_export.checkpoint.remarks import say_what_is_read
from trtower_export.console import LoggedProgress, Progress
from trtower_export.graph.load import load_and_cut
from trtower_export.graph.truncate import release
from trtower_export.options import ExportOptions as ExportOptions
from trtower_export.plan.build import build_into
from trtower_export.plan.targets import Target, choose_target
from trtower_export.precision.program import trace_in_precision

ENGINES = Path("engines")


def export_tower(
    source: str,
    out: Path | None = None,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a checkpoint into a bundle, which exists whole or not at all, and add a plan to it.

    Args:
        source: a hub id, a folder, an OpenCLIP file, or a recipe's name.
        out: the bundle's folder; engines/NAME unless given.
        options: what to make of the checkpoint.
        progress: who is told of every step; the log unless given.

    Returns: the bundle; if it was checked, its certificate says whether the check passed.

    Raises a TrtowerError, by its kind for what was asked for, what is missing or what failed. Whatever keeps the plan
    from being built is a BuildError that says so: the bundle is there then, whole, and only its plan is missing.
    """
    options, progress = options or ExportOptions(), progress or LoggedProgress()
    target, reason = choose_target(options.flavour, options.compute_capabilities, options.graph_precision)
    photographs = load_for_export(options, progress)
    checkpoint = open_checkpoint(source, **options.of_checkpoint)
    spec = checkpoint.spec(options.select_layer, options.select_feature, options.image_size)
    profiles = options.profiles or checkpoint.profiles
    out = out or ENGINES / checkpoint.bundle_name
    refuse_existing(out, overwrite=options.overwrite)
    preprocessor = fit_preprocessor(checkpoint, spec.image_size, progress)
    say_what_is_read(checkpoint, spec, options, reason, progress)

    with disk_errors(out), staged(out, overwrite=options.overwrite) as folder:  # it is named `out` after the block
        loaded = load_and_cut(checkpoint, spec, progress)
        check_space(loaded.tower, options.graph_precision, folder, plans=target is not None)
        samples = make_samples(options, photographs, preprocessor, spec.image_size)
        traced = trace_in_precision(loaded.tower, spec, merge_profiles(profiles), options, samples, progress)
        with progress.step("Write ONNX"):
            traced.write(spec, folder / GRAPH)
        release(loaded.tower, traced.program)  # for the plan's build, which needs the room
        manifest = write_bundle(folder, out.name, checkpoint, spec, profiles, preprocessor, loaded, traced)
        progress.say(f"keeps {manifest.cut.describe_cut(manifest.full, manifest.precision)}")

    bundle = Bundle.open(out)
    if target:
        bundle = _add_first_plan(bundle, target, options, progress)
    if options.check and photographs:
        progress.say(f"{out} is complete; the check follows")
        bundle = check_bundle(bundle, checkpoint, photographs.first(CHECK_PHOTOGRAPHS), progress, quick=True)
    return bundle


def _add_first_plan(bundle: Bundle, target: Target, options: ExportOptions, progress: Progress) -> Bundle:
    """Add the first plan to a bundle that is whole; if that fails, say so, and which command adds it later."""
    progress.say(f"{bundle.path} is whole, and serves without a plan; the plan follows")
    try:
        return build_into(bundle, target, progress, options.store)
    except (TrtowerError, OSError) as err:
        later = build_command(bundle.path, options.flavour, options.compute_capabilities)
        raise BuildError(
            f"{str(err).rstrip('.')}. {bundle.path} is whole, and serves without a plan; it was not checked. To add a "
            f"plan later: {later}"
        ) from err
