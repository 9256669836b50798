"""Turn a checkpoint into a bundle: the whole story. Start reading here.

checkpoint -> truncate -> precision -> graph -> bundle -> plan -> check
"""

from pathlib import Path

from trtower.bundle.bundle import Bundle
from trtower.bundle.staging import disk_errors, refuse_existing, staged
from trtower.bundle.suggest import build_command
from trtower.errors import BuildError, TrtowerError
from trtower.spec import merge_profiles
from trtower.tower.image_processor import ImageProcessor
from trtower_export.bundling import check_space, write_bundle
from trtower_export.check.certify import check_bundle
from trtower_export.check.samples import CHECK_PHOTOGRAPHS, load_for_export, make_golden_inputs, make_samples
from trtower_export.checkpoint.checkpoint import open_checkpoint
from trtower_export.checkpoint.head import describe_tower
from trtower_export.checkpoint.preprocessor import fit_preprocessor, stop_at_pixels
from trtower_export.checkpoint.remarks import say_what_is_read
from trtower_export.console import LoggedProgress, Progress
from trtower_export.graph.load import load_and_cut
from trtower_export.graph.truncate import release
from trtower_export.options import ExportOptions as ExportOptions
from trtower_export.plan.build import build_into
from trtower_export.plan.choice import PlanChoice
from trtower_export.plan.deployment import check_first_plan, choose_first_plan
from trtower_export.precision.program import trace_in_precision

ENGINES = Path("engines")


def export_tower(
    source: str,
    out: Path | None = None,
    options: ExportOptions | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a checkpoint's tower into a bundle, add a plan and check the result.

    The bundle appears whole or not at all. If only its plan fails, the bundle stays and serves without a plan.

    Args:
        source: A hub id, a local folder, an OpenCLIP file, or the name of a recipe.
        out: The bundle's folder. Default: engines/NAME, with -projector or -embedding for a bundle with a head, and
            -uint8 for one that takes bytes.
        options: What to export, and how. Default: `ExportOptions()`.
        progress: Receives every step. Default: the log, at level INFO.

    Returns:
        The bundle. If it was checked, `bundle.manifest.certificate.passed` is the result; a failed check does not
        raise.

    Raises:
        ConfigError: An option is invalid for this checkpoint or machine.
        CheckpointError: The checkpoint cannot be found, read or trusted.
        BundleError: ``out`` may not be replaced, cannot be written, or is being written by another process.
        InputError: ``options.images`` is not a folder, or has no readable image.
        BackendError: The GPU that the plan must be built on is missing, or nothing here can run the bundle to check it.
        BuildError: The graph or the plan cannot be built, or the disk is full.
        MissingExtraError: A package is missing; the message names the extra that installs it.
    """
    options, progress = options or ExportOptions(), progress or LoggedProgress()
    target, choice, reason = choose_first_plan(options)
    photographs = load_for_export(options, progress)
    checkpoint = open_checkpoint(source, **options.of_checkpoint)
    spec = describe_tower(checkpoint, options)
    check_first_plan(target, choice, spec.family, options, progress)
    profiles = options.profiles or checkpoint.profiles
    out = out or ENGINES / f"{checkpoint.bundle_name}{spec.suffix}"
    refuse_existing(out, overwrite=options.overwrite)
    preprocessor = stop_at_pixels(fit_preprocessor(checkpoint, spec.image_size, progress), spec)
    processor = ImageProcessor(preprocessor)
    say_what_is_read(checkpoint, spec, options, reason, progress)

    with disk_errors(out), staged(out, overwrite=options.overwrite) as folder:  # renamed to `out` at the end
        golden = make_golden_inputs(processor, spec, options.graph_precision)
        loaded = load_and_cut(checkpoint, spec, processor, golden, progress)
        check_space(loaded.tower, options.graph_precision, folder, plans=choice is not None)
        samples = make_samples(options, photographs, processor, spec)
        traced = trace_in_precision(loaded.tower, spec, merge_profiles(profiles), options, samples, progress)
        with progress.step("Write ONNX"):
            traced.write(spec, folder)
        release(loaded.tower, traced.program)  # the plan's build needs the memory
        write_bundle(
            folder, out.name, checkpoint, spec, profiles, preprocessor, loaded, traced, target, options, progress
        )

    bundle = Bundle.open(out)
    if choice:
        bundle = _add_first_plan(bundle, choice, options, progress)
    if options.check and photographs:
        progress.say(f"{out} is complete; checking it")
        bundle = check_bundle(bundle, checkpoint, photographs.first(CHECK_PHOTOGRAPHS), progress, quick=True)
    return bundle


def _add_first_plan(bundle: Bundle, choice: PlanChoice, options: ExportOptions, progress: Progress) -> Bundle:
    """Add the first plan to a complete bundle. If that fails, name the command that adds it later."""
    progress.say(f"{bundle.path} is complete, and serves without a plan; building its plan")
    try:
        return build_into(bundle, choice, progress, options.store)
    except (TrtowerError, OSError) as err:
        later = build_command(
            bundle.path,
            choice.flavour,
            compute_capabilities=choice.compute_capabilities,
            accept_known_faults=options.accept_known_faults,
        )
        raise BuildError(
            f"{str(err).rstrip('.')}. {bundle.path} is complete and serves without a plan, but was not checked. To add "
            f"a plan later: {later}"
        ) from err
