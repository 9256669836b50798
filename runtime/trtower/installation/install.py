"""Put a bundle into a loaded model, in one line, and take it out again.

find -> match -> load -> compare -> reach -> stand in -> drop. Whatever fails on the way leaves the model as it was.
"""

import copy
import logging
import os
import threading
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from trtower.bundle.bundle import Bundle
from trtower.errors import ConfigError
from trtower.installation.compare import check_answers
from trtower.installation.find import TowerSlot, check_is_model, find_tower, find_towers
from trtower.installation.match import check_match, check_replaceable
from trtower.installation.original import give_memory_back
from trtower.installation.reach import check_reached
from trtower.runners.base import EngineOptions
from trtower.spec import MB
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
        self._is_first = True

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
        return [place for place in find_towers(self.model) if (it := _installed(place)) and it.tower is self.tower]

    def __enter__(self) -> "Installation":
        """Give itself. The end of the block takes the bundle out, unless a call before put it in.

        Raises ConfigError where it was taken out before the block.
        """
        self._check_installed()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bundle out, where that was not done in the block."""
        if self._is_first and self.is_installed:
            self.uninstall()

    def __repr__(self) -> str:
        if not self.is_installed:
            return f"<{self.tower.bundle.path}, taken out of {self._where}>"
        weights = f"freed {self.freed / MB:.1f} MB" if self.freed else "the eager tower is kept"
        before = "" if self._is_first else "; was installed before"
        return f"<{self.tower.bundle.path} in {self._where}, on {self.tower.backend}; {weights}{before}>"

    @property
    def _where(self) -> str:
        return f"{type(self.model).__name__}.{self.path}"

    def again(self, options: dict[str, Any]) -> "Installation":
        """Give what a second call gets; raise ConfigError where it asks for something else."""
        others = [name for name, value in options.items() if value != self._options[name]]
        asked = ", ".join(f"{name}={options[name]}" for name in others)
        if not others and Bundle.open(options["bundle"]).manifest.files != self.tower.bundle.manifest.files:
            asked = "the same bundle as it is by now, exported or built anew,"
        if asked:
            raise ConfigError(
                f"{self.path} of this model has {self.tower.bundle.path} installed, and {asked} is asked for: "
                "trtower.uninstall(model) first."
            )
        self.tower.load_model()  # should it have been closed
        second = copy.copy(self)
        second._is_first = False
        logger.info("%r", second)
        return second


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
    cannot run. The model is then as it was. A second call with the same arguments does nothing.
    """
    check_is_model(model)
    options = {
        "bundle": _path(bundle, "bundle").resolve(),
        "backend": backend,
        "engine": engine,
        "require_certificate": require_certificate,
        "keep_original": keep_original,
        "allow_other_weights": allow_other_weights,
        "allow_random_weights": allow_random_weights,
    }
    folder = None if offload_folder is None else _path(offload_folder, "offload_folder")
    if not isinstance(engine, EngineOptions | None):
        raise ConfigError(f"engine is {engine!r}; EngineOptions are expected.")
    if not isinstance(tower, str | None):
        raise ConfigError(f"tower is of type {type(tower).__name__}; its path in the model is expected.")
    with _changing:
        place = find_tower(model, tower)
        if (installed := _installed(place)) is not None:
            return installed.again(options)
        check_replaceable(model, place, dropped=not keep_original)
        allowed = {"allow_other_weights": allow_other_weights, "allow_random_weights": allow_random_weights}
        check_match(model, place, Bundle.open(bundle), **allowed)
        device = next(place.module.parameters()).device
        ran = VisionTower.load(
            bundle, backend, device, select_feature="cls_patch", require_certificate=require_certificate, engine=engine
        )
        installation = Installation(model, place.path, ran, options)
        with ExitStack() as undo:
            undo.callback(ran.close)
            check_answers(place, ran, compared=not any(allowed.values()))
            check_reached(model, place, named=tower is not None)
            # Here and not above: it imports transformers, which such a model has imported already.
            from trtower.installation.stand_in import make_stand_in

            stand_in = make_stand_in(place, ran, installation)
            if not keep_original:
                stand_in.original.write(folder)
                undo.callback(stand_in.take_back)
            place.put(stand_in)
            undo.callback(place.put, place.module)
            if not keep_original:
                installation.freed = stand_in.original.drop()
            undo.pop_all()
    if installation.freed:
        give_memory_back(device)
    logger.info("%r", installation)
    return installation


def uninstall(model: nn.Module, *, tower: str | None = None) -> None:
    """Bring back the eager tower that a bundle took the place of, and free the engine.

    It is the very same module, where, in which dtype and in which mode the model is by now. ``tower`` is its path;
    without it every bundle is taken out. Raises ConfigError where none is installed.
    """
    with _changing:
        places = [
            place for place in find_towers(model) if _installed(place) and (tower is None or tower in place.paths)
        ]
        if not places:
            raise ConfigError(f"{type(model).__name__} has no bundle installed{f' at {tower!r}' if tower else ''}.")
        for place in places:
            _take_out(place)


def _take_out(place: TowerSlot) -> None:
    stand_in, tower = place.module, place.module.installation.tower
    tower.refuse_own_call()
    place.put(stand_in.take_back())
    tower.close()
    logger.info("%s: the eager tower is back", place.path)


def _path(value: Any, name: str) -> Path:
    try:
        return Path(value).expanduser()
    except (TypeError, RuntimeError) as err:
        said = f"{value!r}" if isinstance(value, str) else f"of type {type(value).__name__}"
        raise ConfigError(f"{name} is {said}; the path of a folder is expected.") from err


def _installed(place: TowerSlot) -> Installation | None:
    """Give the installation that a tower in a model is the stand-in of; None where it is an eager one."""
    installation: Installation | None = vars(place.module).get("installation")
    return installation
