"""Put a bundle into a loaded model with one call, and take it out again.

find -> match -> load -> compare -> reach -> stand in -> drop. If a step fails, the model stays as it was. A bundle with
a projector replaces both the tower and the model's projector.
"""

import json
import logging
import os
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import CONFIG
from trtower.bundle.not_a_bundle import read_folder
from trtower.errors import ConfigError
from trtower.installation.compare import check_answers
from trtower.installation.find import Slot, find_tower, find_towers
from trtower.installation.match import check_match, check_replaceable
from trtower.installation.original import give_memory_back
from trtower.installation.policies import check_loop, methods_together
from trtower.installation.projector import check_projection, check_served, find_replaceable
from trtower.installation.reach import check_reached, methods_around
from trtower.runners.base import EngineOptions
from trtower.spec import MB
from trtower.tower.options import TowerOptions
from trtower.tower.vision_tower import VisionTower

if TYPE_CHECKING:
    from trtower.installation.stand_in import Replacement

logger = logging.getLogger(__name__)

_changing = threading.RLock()
"""Only one model is changed at a time, because two models may share a tower."""


class Installation:
    """A bundle in a model, until `uninstall` or the end of a `with` block.

    Attributes:
        model: The model.
        path: The tower's place in the model, such as "model.vision_tower".
        tower: The compiled tower, with its `backend`, `warmup` and `on_batch`.
        freed: The bytes that the replaced tower's weights took; 0 if they were kept.
    """

    def __init__(self, model: nn.Module, path: str, tower: VisionTower, options: dict[str, Any]) -> None:
        self.model, self.path, self.tower, self.freed = model, path, tower, 0
        self._options = options
        self._holders = 0
        self._methods: list[tuple[nn.Module, str, Any]] = []  # of the model, which others replace meanwhile
        self._projector: tuple[Slot, Replacement] | None = None

    @property
    def is_installed(self) -> bool:
        """Whether the bundle is still in the model."""
        return bool(self._places())

    def uninstall(self) -> None:
        """Take this bundle out of the model, but no other; see the function `uninstall`.

        Raises:
            ConfigError: The bundle was taken out before, or the tower's weights cannot be read back.
            BackendError: It was called inside a call of the tower, such as in `on_batch`.
        """
        with _changing:
            self._check_installed()
            for place in self._places():
                _take_out(place)

    def _check_installed(self) -> None:
        if not self.is_installed:
            raise ConfigError(f"{self.tower.bundle.path} is no longer in {self._where}: it was already taken out.")

    def _places(self) -> list[Slot]:
        return [place for place in find_towers(self.model) if place.installation is self]

    def __enter__(self) -> "Installation":
        """Enter a `with` block, whose end takes the bundle out. The block of a repeated `install` leaves it in.

        Returns:
            This installation.

        Raises:
            ConfigError: The bundle was already taken out.
        """
        with _changing:
            self._check_installed()
            self._holders += 1
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bundle out, unless that was done in the block or another call of `install` still holds it."""
        with _changing:
            self._holders -= 1
            if not self._holders and self.is_installed:
                self.uninstall()

    def __repr__(self) -> str:
        if not self.is_installed:
            return f"<{self.tower.bundle.path}, taken out of {self._where}>"
        weights = f"freed {self.freed / MB:.1f} MB" if self.freed else "the eager tower is kept"
        return f"<{self.tower.bundle.path} in {self._where}, on {self.tower.backend}; {weights}>"

    @property
    def _where(self) -> str:
        projector = f" and {self._projector[0].path}" if self._projector else ""
        return f"{type(self.model).__name__}.{self.path}{projector}"

    def _install_again(self, options: dict[str, Any]) -> "Installation":
        """Return itself for a repeated call of `install`, and reopen the tower if it was closed.

        Raises ConfigError if the options differ from those of the first call, or the bundle has changed on disk.
        """
        changed = ", ".join(f"{name}={value}" for name, value in options.items() if value != self._options[name])
        if not changed and Bundle.open(options["bundle"]).manifest.files != self.tower.bundle.manifest.files:
            changed = "the bundle has changed on disk"
        if changed:
            raise ConfigError(
                f"{self.path} of this model already has {self.tower.bundle.path} installed, and this call differs from "
                f"the first ({changed}): call trtower.uninstall(model) first."
            )
        self.tower.load_model()  # opens it again if it was closed
        self._holders = self._holders or 1  # if the first call has no `with` block, count it, so that ours leaves it in
        return self


def install(
    model: nn.Module,
    bundle: str | os.PathLike[str],
    *,
    backend: str = "auto",
    engine: EngineOptions | None = None,
    require_certificate: bool = False,
    keep_original: bool = False,
    offload_folder: str | os.PathLike[str] | None = None,
    allow_other_weights: bool = False,
    allow_random_weights: bool = False,
    tower: str | None = None,
) -> Installation:
    """Replace a loaded model's vision tower with a bundle. If anything fails, the model stays as it was.

    A bundle that was exported with ``--head projector`` replaces the model's projector as well.

    Args:
        model: A model of transformers, an original LLaVA, LLaVA-NeXT, VILA or tinychat, a robot policy of LeRobot or
            openpi, or OpenVLA. No call may be in flight.
        bundle: The folder that `trtower export` wrote. It runs on the tower's device.
        backend: The backend, as in `VisionTower.load`.
        engine: How the bundle is run on a GPU, as in `VisionTower.load`.
        require_certificate: Refuse the bundle unless it is certified, as in `VisionTower.load`.
        keep_original: Keep the tower's weights in memory, instead of freeing them.
        offload_folder: The folder of the file that keeps the tower's weights for `uninstall` and `save_pretrained`.
            None is the folder for temporary files.
        allow_other_weights: Accept a bundle of other weights than the tower's; the bundle's are used. The outputs of
            bundle and tower are not compared then.
        allow_random_weights: Accept a rehearsal, whose outputs mean nothing and are not compared either.
        tower: The path of the tower, if the model has several. If a tower is named, install only warns, and does not
            raise, when the model's code does not call it.

    Returns:
        The installation; the end of its `with` block takes the bundle out. A repeated call returns the same one.

    Raises:
        ConfigError: The bundle is of another tower (family, size, layers, weights), the model has no tower or several,
            the tower cannot be replaced, or this model already has a bundle and the options differ.
        BundleError: The folder is not a bundle, is damaged or not certified, or is a rehearsal.
        BackendError: No requested backend can run the bundle here.
    """
    with _changing:
        place = find_tower(model, tower)
        tower_options = TowerOptions(backend=backend, engine=engine, require_certificate=require_certificate)
        allowed = {"allow_other_weights": allow_other_weights, "allow_random_weights": allow_random_weights}
        path = read_folder(bundle, "bundle").resolve()
        folder = None if offload_folder is None else read_folder(offload_folder, "offload_folder").resolve()
        options = {
            "bundle": path,
            **vars(tower_options),
            "keep_original": keep_original,
            "offload_folder": folder,
            **allowed,
        }
        if isinstance(place.installation, Installation):
            return place.installation._install_again(options)
        check_replaceable(model, place, dropped=not keep_original)
        check_loop(model, place)
        opened, compared = Bundle.open(bundle), not any(allowed.values())
        place = replace(place, made_of=json.loads(opened.read(CONFIG)))
        check_match(model, place, opened, **allowed)
        projector = find_replaceable(model, opened, dropped=not keep_original, compared=compared)
        on_its_device = replace(tower_options, device=next(place.module.parameters()).device)
        every_token = None if projector else "cls_patch"
        compiled = VisionTower.load(bundle, select_feature=every_token, **vars(on_its_device))
        with ExitStack() as undo:
            undo.callback(compiled.close)
            check_answers(place, compiled, compared=compared)
            check_reached(model, place, named=tower is not None)
            installation = Installation(model, place.path, compiled, options)
            replacements = _make_replacements(place, projector, installation, compared=compared)
            _put_in(replacements, installation, folder, keep_original=keep_original)
            undo.pop_all()
    if installation.freed:
        give_memory_back(compiled.device)
    logger.info("%r", installation)
    return installation


def _make_replacements(
    place: Slot, projector: Slot | None, installation: Installation, *, compared: bool
) -> "list[tuple[Slot, Replacement]]":
    """Make the stand-in of a tower, and for a bundle with a projector that of the model's, after a comparison."""
    # Imported here because it imports transformers, which a model with a tower has already imported.
    from trtower.installation.stand_in import ProjectorStandIn, make_replacement, make_stand_in

    tower = installation.tower
    replacements: list[tuple[Slot, Replacement]] = [(place, make_stand_in(place, tower, installation))]
    if projector and (head := tower.spec.head):
        found = check_projection(installation.model, place, projector, tower, compared=compared)
        of_head = {"_layers": tower.spec.layers, "_projected": found, "_divisor": head.divisor}
        stand_in = make_replacement(projector, ProjectorStandIn, installation, **of_head)
        installation._projector = (projector, stand_in)
        replacements.append(installation._projector)
    return replacements


def _put_in(
    replacements: "list[tuple[Slot, Replacement]]",
    installation: Installation,
    folder: Path | None,
    *,
    keep_original: bool,
) -> None:
    """Replace modules by their stand-ins, and drop their weights. If anything fails, undo all of it."""
    with ExitStack() as undo:
        for place, stand_in in replacements:
            if not keep_original:
                stand_in.original.write(folder)
                undo.callback(stand_in.take_back)
            place.put(stand_in)
            undo.callback(place.put, place.module)
        undo.callback(_restore_methods, installation)
        _replace_methods(installation, replacements[0][0])
        if installation.tower.spec.head:
            check_served(installation.model, replacements[0][0], replacements[1][1])
        if not keep_original:
            installation.freed = sum(stand_in.original.drop() for _, stand_in in replacements)
        undo.pop_all()


def _replace_methods(installation: Installation, place: Slot) -> None:
    """Let the cameras of a robot policy run together, and keep torch.compile away from what carries features."""
    model, replaced = installation.model, methods_together(installation.model, place)
    kept_eager = methods_around(model, place) if installation.tower.spec.head else ()
    eager = ((module, name, torch.compiler.disable(getattr(module, name))) for module, name, _ in kept_eager)
    for module, name, method in (*replaced, *eager):
        if name not in vars(module):
            vars(module)[name] = method
            installation._methods.append((module, name, method))


def _restore_methods(installation: Installation) -> None:
    """Undo `_replace_methods`."""
    for module, name, method in installation._methods:
        if vars(module).get(name) is method:  # nobody has patched it since
            del vars(module)[name]
    installation._methods.clear()


def _put_back(place: Slot, stand_in: "Replacement") -> bool:
    """Put a module back wherever its stand-in still is; return whether it was anywhere."""
    still = [(container, key) for container, key in place.slots if dict.get(container, key) is stand_in]
    for container, key in still:
        container[key] = place.module
    return bool(still)


def uninstall(model: nn.Module, *, tower: str | None = None) -> None:
    """Bring back the eager tower that a bundle replaced, and free the engine.

    The tower is the same module as before, on the device and in the dtype and mode that the model now has.

    Args:
        model: The model with a bundle installed.
        tower: The path of the tower. None takes every bundle out.

    Raises:
        ConfigError: No bundle is installed, or the tower's weights cannot be read back.
        BackendError: It was called inside a call of the tower, such as in `on_batch`.
    """
    with _changing:
        places = [place for place in find_towers(model) if place.installation and tower in (None, *place.paths)]
        if not places:
            raise ConfigError(f"{type(model).__name__} has no bundle installed{f' at {tower!r}' if tower else ''}.")
        for place in places:
            _take_out(place)


def _take_out(place: Slot) -> None:
    installation: Installation = place.module.installation
    tower, projector = installation.tower, installation._projector
    tower._engine.refuse_own_call()
    restored = place.module.take_back(), projector[1].take_back() if projector else None
    place.put(restored[0])
    if projector and not _put_back(*projector):
        logger.warning("%s is no longer the one that the bundle replaced, so it stays as it is.", projector[0].path)
    _restore_methods(installation)
    tower.close()
    logger.info("%s: the eager tower is back", place.path)
