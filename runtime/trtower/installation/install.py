"""Put a bundle into a loaded model, in one line, and take it out again.

find -> match -> load -> compare -> reach -> stand in -> drop. Whatever fails on the way leaves the model as it was.
"""

import logging
import os
import threading
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from trtower.bundle.bundle import Bundle, read_folder
from trtower.errors import ConfigError
from trtower.installation.compare import check_answers
from trtower.installation.find import TowerSlot, find_tower, find_towers
from trtower.installation.match import check_match, check_replaceable
from trtower.installation.original import give_memory_back
from trtower.installation.reach import check_reached
from trtower.runners.base import EngineOptions
from trtower.spec import MB
from trtower.tower.options import TowerOptions
from trtower.tower.vision_tower import VisionTower

logger = logging.getLogger(__name__)

_changing = threading.RLock()
"""One model is changed at a time: two of them may share a tower."""


class Installation:
    """A bundle in a model, until `uninstall` or the end of a `with` block.

    ``tower`` is what runs, with its `backend`, `warmup` and `on_batch`; ``path`` says where in the model it is, and
    ``freed`` how many bytes the weights of the tower took whose place it has, 0 where they were kept.
    """

    def __init__(self, model: nn.Module, path: str, tower: VisionTower, options: dict[str, Any]) -> None:
        self.model, self.path, self.tower, self.freed = model, path, tower, 0
        self._options = options
        self._holders = 0

    @property
    def is_installed(self) -> bool:
        """Whether the bundle is in the model still."""
        return bool(self._places())

    def uninstall(self) -> None:
        """Take this bundle out of the model, and no other; see `uninstall`."""
        with _changing:
            self._check_installed()
            for place in self._places():
                _take_out(place)

    def _check_installed(self) -> None:
        if not self.is_installed:
            raise ConfigError(f"{self.tower.bundle.path} is no longer in {self._where}: it was taken out before.")

    def _places(self) -> list[TowerSlot]:
        return [place for place in find_towers(self.model) if place.installation is self]

    def __enter__(self) -> "Installation":
        """Return itself. The end of the block takes the bundle out, unless a call before the block put it in.

        Raises ConfigError where it was taken out before the block.
        """
        with _changing:
            self._check_installed()
            self._holders += 1
        return self

    def __exit__(self, *_: object) -> None:
        """Take the bundle out, where that was not done in the block."""
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
        return f"{type(self.model).__name__}.{self.path}"

    def _ask_again(self, options: dict[str, Any]) -> "Installation":
        """Return itself, for a second call; raise ConfigError if that asks for something else."""
        asked = ", ".join(f"{name}={value}" for name, value in options.items() if value != self._options[name])
        if not asked and Bundle.open(options["bundle"]).manifest.files != self.tower.bundle.manifest.files:
            asked = "the same bundle as it is by now, exported or built anew,"
        if asked:
            raise ConfigError(
                f"{self.path} of this model has {self.tower.bundle.path} installed, and {asked} is asked for: "
                "trtower.uninstall(model) first."
            )
        self.tower.load_model()  # should it have been closed
        self._holders = self._holders or 1  # the first call, if it was in no block
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
    """Put a bundle in the place of a loaded model's vision tower, and let go of the tower's weights.

    The model is one of transformers, or an original LLaVA, LLaVA-NeXT, VILA or tinychat, with no call in flight; the
    bundle runs on the device where the tower is. ``backend``, ``engine`` and ``require_certificate`` are those of
    `VisionTower.load`. The weights are written to a file without a name in ``offload_folder``, by default where
    temporary files go, from where `uninstall` and `save_pretrained` read them; ``keep_original`` leaves them where they
    are. ``tower`` is the path of the tower in a model that has several.

    Raises ConfigError where the bundle is not of this tower: its family, size, layers, or weights, which
    ``allow_other_weights`` permits; BundleError for a rehearsal, unless ``allow_random_weights``; BackendError where it
    cannot run. The model is then as it was. A second call with the same arguments returns what the first did.
    """
    with _changing:
        place = find_tower(model, tower)
        served = TowerOptions(backend=backend, engine=engine, require_certificate=require_certificate)
        allowed = {"allow_other_weights": allow_other_weights, "allow_random_weights": allow_random_weights}
        path = read_folder(bundle, "bundle").resolve()
        options = {"bundle": path, **vars(served), "keep_original": keep_original, **allowed}
        folder = None if offload_folder is None else read_folder(offload_folder, "offload_folder")
        if isinstance(place.installation, Installation):
            return place.installation._ask_again(options)
        check_replaceable(model, place, dropped=not keep_original)
        check_match(model, place, Bundle.open(bundle), **allowed)
        on_its_device = replace(served, device=next(place.module.parameters()).device)
        ran = VisionTower.load(bundle, select_feature="cls_patch", **vars(on_its_device))
        with ExitStack() as undo:
            undo.callback(ran.close)
            check_answers(place, ran, compared=not any(allowed.values()))
            check_reached(model, place, named=tower is not None)
            installation = Installation(model, place.path, ran, options)
            _put_in(place, installation, folder, keep_original=keep_original)
            undo.pop_all()
    if installation.freed:
        give_memory_back(ran.device)
    logger.info("%r", installation)
    return installation


def _put_in(place: TowerSlot, installation: Installation, folder: Path | None, *, keep_original: bool) -> None:
    """Hang a stand-in in the place of the tower, and drop the tower's weights; if that fails, neither."""
    # Here and not above: it imports transformers, which such a model has imported already.
    from trtower.installation.stand_in import make_stand_in

    stand_in = make_stand_in(place, installation.tower, installation)
    with ExitStack() as undo:
        if not keep_original:
            stand_in.original.write(folder)
            undo.callback(stand_in.take_back)
        place.put(stand_in)
        undo.callback(place.put, place.module)
        if not keep_original:
            installation.freed = stand_in.original.drop()
        undo.pop_all()


def uninstall(model: nn.Module, *, tower: str | None = None) -> None:
    """Bring back the eager tower that a bundle took the place of, and free the engine.

    It is the very same module, where, in which dtype and in which mode the model is by now. ``tower`` is its path;
    without it every bundle is taken out. Raises ConfigError where none is installed.
    """
    with _changing:
        places = [place for place in find_towers(model) if place.installation and tower in (None, *place.paths)]
        if not places:
            raise ConfigError(f"{type(model).__name__} has no bundle installed{f' at {tower!r}' if tower else ''}.")
        for place in places:
            _take_out(place)


def _take_out(place: TowerSlot) -> None:
    stand_in, tower = place.module, place.module.installation.tower
    tower._engine.refuse_own_call()
    place.put(stand_in.take_back())
    tower.close()
    logger.info("%s: the eager tower is back", place.path)
