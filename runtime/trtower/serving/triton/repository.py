"""Write a model repository for Triton: for each bundle a model, and for one that takes bytes also an ensemble.

    REPOSITORY/
      NAME/config.pbtxt
      NAME/1/model.py, NAME/1/bundle/           the tower, run by trtower
      NAME/1/model.plan                         or a plan, run by Triton's TensorRT backend
      NAME-prepare/, NAME-encoded/              for bytes: decoding and preparing, and both together

A model is written beside the repository and renamed into it, so that a server that polls never sees half of one.
"""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import PREPROCESSOR, PlanEntry
from trtower.bundle.not_a_bundle import read_folder
from trtower.bundle.staging import disk_errors, locked
from trtower.bundle.suggest import how_to_certify
from trtower.errors import BundleError, ConfigError
from trtower.serving.triton import config as configs
from trtower.serving.triton.config import PLAN, PYTHON, TritonOptions, as_text
from trtower.tower.encoded import LARGEST_FILE, LARGEST_PICTURE
from trtower.tower.vision_tower import VisionTower

CONFIG = "config.pbtxt"
CODE = "model.py"
BUNDLE = "bundle"
"""The folder, beside the code of a model, that holds the bundle."""

TOWER_CODE = '''"""A vision tower, run by trtower. The bundle beside this file has everything about it."""

from trtower.serving.triton.tower_model import TritonPythonModel  # noqa: F401
'''
PICTURES_CODE = '''"""Encoded pictures into bytes, prepared by trtower."""

from trtower.serving.triton.pictures_model import TritonPythonModel  # noqa: F401
'''


def write_repository(
    bundles: Iterable[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    options: TritonOptions | None = None,
    *,
    version: int = 1,
    overwrite: bool = False,
) -> list[Path]:
    """Write a model repository that `tritonserver --model-repository` takes.

    Args:
        bundles: The folders that `trtower export` wrote. A model has the name of its folder.
        out: The repository: new, or one that gets these models as well.
        options: How they are served. Default: `TritonOptions()`.
        version: The number under which the models are written. A higher one than the repository has is what a server
            turns to; the models' configs are replaced then.
        overwrite: Replace models, or versions of them, that are there.

    Returns:
        The folders of the models that a client may call, in the order of the bundles.

    Raises:
        ConfigError: An option is invalid, a bundle cannot be served so, or a model exists.
        BundleError: A bundle is damaged, or not certified.
        BuildError: The disk is full.
        MissingExtraError: Triton's messages are not installed.
    """
    options = options or TritonOptions()
    configs.messages()
    if type(version) is not int or version < 1:
        raise ConfigError(f"version={version!r}; expected a number of at least 1.")
    repository = read_folder(out, "out")
    opened: dict[str, Bundle] = {}
    for path in bundles:
        bundle = Bundle.open(path)
        name = bundle.path.resolve().name
        if name in opened:
            raise ConfigError(f"two bundles are called {name}: {opened[name].path} and {bundle.path}. Rename one.")
        opened[name] = bundle
        _refuse(bundle, options)
        for model in _models(name, bundle, options):
            place = repository / model / str(version)
            if place.exists() and not overwrite:
                raise ConfigError(f"{place} exists: write another --version, or replace it with --overwrite.")
    if not opened:
        raise ConfigError("no bundles: pass at least one.")
    with disk_errors(repository), locked(repository):
        repository.mkdir(exist_ok=True)
        return [_write(name, bundle, repository, options, version) for name, bundle in opened.items()]


def _models(name: str, bundle: Bundle, options: TritonOptions) -> list[str]:
    """Name the models that are written for a bundle; the last one is what clients call."""
    is_ensemble = options.platform == PYTHON and not bundle.manifest.spec.takes_floats
    return [name, *([f"{name}-prepare", f"{name}-encoded"] if is_ensemble else [])]


def _refuse(bundle: Bundle, options: TritonOptions) -> None:
    """Raise BundleError or ConfigError if a bundle cannot be served so, or should not."""
    advice = f"{how_to_certify(bundle, options.backend)}; or serve it anyway"
    if options.platform == PLAN:
        for plan in _plans(bundle).values():
            reason = bundle.why_uncertified(plan.flavour, [plan.file])
            if reason and not options.allow_uncertified:
                raise BundleError(f"{bundle.path} is not certified: {reason}. {advice} with --allow-uncertified.")
    elif (reason := bundle.uncertifiable()) and not options.allow_uncertified:
        raise BundleError(f"{bundle.path} is not certified: {reason}. {advice} with --allow-uncertified.")


def _plans(bundle: Bundle) -> dict[str, PlanEntry]:
    """Return the plans that Triton can run, by compute capability; "" is for any."""
    plans = [plan for plan in bundle.manifest.plans if plan.flavour == "tensorrt"]
    if not plans:
        raise ConfigError(
            f"{bundle.path} has no plan of data-centre TensorRT, and Triton's backend runs no other. Build one on the "
            f"GPU that serves it (trtower build {bundle.path} --flavour tensorrt), or leave --platform out."
        )
    found: dict[str, PlanEntry] = {}
    for plan in plans:
        if plan.settings.stripped:
            raise ConfigError(f"{plan.file} has no weights, and Triton cannot add them: build it without --strip.")
        for capability in plan.compute_capabilities or ("",):
            other = found.setdefault(capability, plan)
            if other is not plan:
                raise ConfigError(
                    f"{bundle.path} has two plans for {capability or 'all GPUs'}, {other.file} and {plan.file}, and "
                    "Triton takes one: keep the one of its own TensorRT in a copy of the bundle."
                )
    return found


def _write(name: str, bundle: Bundle, repository: Path, options: TritonOptions, version: int) -> Path:
    """Write the models of a bundle; return the folder of the one that clients call."""
    manifest = bundle.manifest
    tower, *others = _models(name, bundle, options)
    row = VisionTower(bundle.path).feature_shape
    with _staged(repository, tower, version) as staging:
        if options.platform == PLAN:
            plans = _plans(bundle)
            for file in {plan.file for plan in plans.values()}:
                shutil.copyfile(bundle.verify(file), staging / Path(file).name)
            files = {capability: Path(plan.file).name for capability, plan in plans.items()}
            config = configs.plan_config(tower, manifest, files, options)
        else:
            bundle.copy_to(staging / BUNDLE)
            for lock in staging.glob(".*.lock"):
                lock.unlink()
            (staging / CODE).write_text(TOWER_CODE, encoding="utf-8")
            config = configs.tower_config(tower, manifest, row, options)
        (staging.parent / CONFIG).write_text(as_text(config), encoding="utf-8")
    if others:
        prepare, encoded = others
        with _staged(repository, prepare, version) as staging:
            shutil.copyfile(bundle.verify(PREPROCESSOR), staging / PREPROCESSOR)
            (staging / CODE).write_text(PICTURES_CODE, encoding="utf-8")
            limits = {"max_bytes": LARGEST_FILE, "max_pixels": LARGEST_PICTURE}
            config = configs.pictures_config(prepare, manifest, options, limits)
            (staging.parent / CONFIG).write_text(as_text(config), encoding="utf-8")
        with _staged(repository, encoded, version) as staging:
            config = configs.ensemble_config(encoded, prepare, tower, manifest, row)
            (staging.parent / CONFIG).write_text(as_text(config), encoding="utf-8")
    return repository / (others or [tower])[-1]


@contextmanager
def _staged(repository: Path, model: str, version: int) -> Iterator[Path]:
    """Yield the folder of a version of a model, beside the repository; move it in at the end of the block.

    The config of the model is beside that folder, and replaces one that the model has.
    """
    staging = repository.parent / f".{repository.name}.staging"
    shutil.rmtree(staging, ignore_errors=True)
    folder = staging / str(version)
    folder.mkdir(parents=True)
    try:
        yield folder
        place = repository / model
        if not place.exists():
            staging.rename(place)
            return
        old = place / str(version)
        if old.exists():
            shutil.rmtree(old)
        folder.rename(old)
        (staging / CONFIG).replace(place / CONFIG)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
