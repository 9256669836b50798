"""Put a bundle into a loaded model, in one line, and take it out again.

find -> match -> load -> stand in -> drop. Until the bundle hangs in the model nothing of the model is changed, so
whatever fails before leaves it as it was.
"""

import copy
import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from trtower.bundle import Bundle
from trtower.errors import ConfigError
from trtower.living.find import Place, find_tower, find_towers
from trtower.living.match import check_match
from trtower.runners.tensorrt import EngineOptions
from trtower.tower import VisionTower

MB = 1e6

logger = logging.getLogger(__name__)


class Installation:
    """A bundle in a model, until `uninstall` or the end of a `with` block.

    ``tower`` is what runs, with its `backend`, `warmup` and `on_batch`; ``path`` says where in the model it is, and
    ``freed`` how many bytes the weights of the tower took whose place it has, 0 where they were kept.
    """

    def __init__(self, model: nn.Module, path: str, tower: VisionTower, options: dict[str, Any], freed: int) -> None:
        self.model, self.path, self.tower, self.freed = model, path, tower, freed
        self._options = options
        self._taken_out_at_exit = True

    def uninstall(self) -> None:
        """Take this bundle out of the model; see `uninstall`."""
        uninstall(self.model, tower=self.path)

    def __enter__(self) -> "Installation":
        """Give itself. The end of the block takes the bundle out, unless it was installed before."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bundle out."""
        if self._taken_out_at_exit:
            self.uninstall()

    def __repr__(self) -> str:
        weights = f"freed {self.freed / MB:.1f} MB" if self.freed else "the eager tower is kept"
        where = f"{type(self.model).__name__}.{self.path}"
        return f"<{self.tower.bundle.path} in {where}, on {self.tower.backend}; {weights}>"

    def again(self, options: dict[str, Any]) -> "Installation":
        """Give what a second call gets; raise ConfigError where it asks for something else."""
        others = [name for name, value in options.items() if value != self._options[name]]
        if others:
            asked = ", ".join(f"{name}={options[name]}" for name in others)
            raise ConfigError(
                f"{self.path} of this model has {self.tower.bundle.path} installed, and {asked} is asked for: "
                "trtower.uninstall(model) first."
            )
        logger.info("%r is already installed", self)
        second = copy.copy(self)
        second._taken_out_at_exit = False
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
    options = {
        "bundle": Path(bundle).expanduser().resolve(),
        "backend": backend,
        "engine": engine,
        "require_certificate": require_certificate,
        "keep_original": keep_original,
    }
    place = find_tower(model, tower)
    if (installed := _installed(place)) is not None:
        return installed.again(options)
    allowed = {"allow_other_weights": allow_other_weights, "allow_random_weights": allow_random_weights}
    check_match(model, place, Bundle.open(bundle), **allowed)
    device = next(place.module.parameters()).device
    ran = VisionTower.load(
        bundle, backend, device, select_feature="cls_patch", require_certificate=require_certificate, engine=engine
    )
    installation = Installation(model, place.path, ran, options, freed=0)
    try:
        # Here and not above: it imports transformers, which such a model has imported already.
        from trtower.living.stand_in import make_stand_in

        stand_in = make_stand_in(place, ran, installation)
        if not keep_original:
            stand_in.original.write(Path(offload_folder) if offload_folder else None)
        place.put(stand_in)
    except BaseException:
        ran.close()
        raise
    if not keep_original:
        installation.freed = stand_in.original.drop()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # for TensorRT, whose memory is not torch's
    logger.info("%r", installation)
    return installation


def uninstall(model: nn.Module, *, tower: str | None = None) -> None:
    """Bring back the eager tower that a bundle took the place of, and free the engine.

    It is the very same module, where and in which dtype the model is by now. ``tower`` is its path; without it every
    bundle is taken out. Raises ConfigError where none is installed.
    """
    places = [place for place in find_towers(model) if _installed(place) and tower in (None, place.path)]
    if not places:
        raise ConfigError(f"{type(model).__name__} has no bundle installed{f' at {tower!r}' if tower else ''}.")
    for place in places:
        stand_in = place.module
        stand_in.original.bring_back(stand_in.anchor.device, stand_in.anchor.dtype)
        place.put(stand_in.original.module)
        stand_in.installation.tower.close()
        logger.info("%s: the eager tower is back", place.path)


def _installed(place: Place) -> Installation | None:
    """Give the installation that a tower in a model is the stand-in of; None where it is an eager one."""
    installation: Installation | None = vars(place.module).get("installation")
    return installation
