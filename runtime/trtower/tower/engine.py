"""The engine of a tower: opened where it was asked for, moved, closed, and opened again."""

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from trtower.bundle.bundle import Bundle
from trtower.errors import BackendError, BundleError, ConfigError, one_line
from trtower.runners.base import Runner, run_batch
from trtower.runners.choose import choose
from trtower.runners.device import parse_device
from trtower.runners.holder import Holder, refuse_fork
from trtower.spec import profile_batches
from trtower.tower.anchor import Anchor
from trtower.tower.options import TowerOptions

logger = logging.getLogger(__name__)


class Engine(Holder):
    """Holds what runs a bundle, or nothing yet, on the device that ``anchor`` tells model code."""

    def __init__(self, name: str, bundle: Bundle, options: TowerOptions, anchor: Anchor) -> None:
        super().__init__(name)
        self._bundle, self._options, self._anchor = bundle, options, anchor
        self._asked_device = options.device
        self.changing = threading.RLock()

    @property
    def device(self) -> torch.device:
        """Where it runs; before it is opened, where it was moved to."""
        runner = self.runner
        return self._anchor.empty.device if runner is None else runner.device

    def load(self, device_map: Any) -> None:
        """Open the bundle, unless it is open already. Raises BackendError if it is open on another device."""
        refuse_fork()
        asked = _read_device_map(device_map)
        if self.runner is None:
            with self.changing:
                if self.runner is None:
                    # Where accelerate has put the anchor, past `.to`, as it dispatches a model by its device_map.
                    placed = self.device if self.device.type != "cpu" else None
                    known = (asked, self._asked_device, placed)
                    self.open(next((device for device in known if device is not None), None))
                    return
        if asked is not None and parse_device(asked) != self.device:
            raise BackendError(f"{self.name} is loaded on {self.device}: .to({str(asked)!r}) moves it.")
        logger.info("%s is already loaded, `load_model` called again, skipping.", self.name)

    def open(self, device: str | torch.device | None) -> Callable[[], None]:
        """Open the bundle on a device; return what closes what was open before, once its calls have ended."""
        refuse_fork()
        self.refuse_own_call()
        runner = self._open_certified(device)
        close = self.swap(runner)
        self._anchor.place(runner.device)
        return close

    def _open_certified(self, device: str | torch.device | None) -> Runner:
        """Open the bundle, certified if that is demanded; if not, one that failed its check runs with a warning."""
        bundle, options, certified = self._bundle, self._options, self._options.require_certificate
        if certified and (reason := bundle.uncertifiable()):
            raise _not_certified(bundle, reason, options.backend)
        runner = choose(bundle, options.backend, device, certified=certified, engine=options.engine)
        if certified and (reason := bundle.why_uncertified(runner.backend, runner.files)):
            runner.close()
            raise _not_certified(bundle, reason, runner.backend)
        found = bundle.find_certificate(runner.backend, runner.files[0])
        if found and not found.passed and not bundle.changed_since(found):
            said = "%s failed its check on %s: `trtower inspect` says what was missed."
            logger.warning(said, bundle.path, runner.backend)
        return runner

    def move(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Follow a function that moves tensors. Raises before anything has moved."""
        before = self.device
        after = self._device_after(move, before)
        closes: Callable[[], None] | None = None
        if after != before and self.runner is not None:
            refuse_fork()
            with self.changing:
                closes = self.open(after)
        if self._anchor.empty.device != after:
            self._anchor.place(after)
        if after not in (before, torch.device("meta")):
            self._asked_device = after
        if closes:
            closes()

    def _device_after(self, move: Callable[[torch.Tensor], torch.Tensor], before: torch.device) -> torch.device:
        """Ask a function that moves tensors where it would move this engine."""
        try:
            return move(torch.empty(0, dtype=self._anchor.empty.dtype, device=before)).device
        except (AssertionError, RuntimeError) as err:  # torch's words for a device that is not here
            raise BackendError(f"{self.name} cannot be moved from {before}: {one_line(err)}. It stays there.") from err

    def warm_up(self, batches: Iterable[int] | None) -> None:
        """Run each number of images once, by default those that the profiles name, and keep what was compiled."""
        manifest = self._bundle.manifest
        side = manifest.spec.image_size
        with self.lend() as runner:
            for batch in profile_batches(manifest.profiles) if batches is None else batches:
                pixel_values = torch.zeros((batch, 3, side, side), dtype=runner.dtype, device=runner.device)
                run_batch(runner, manifest.batch, manifest.output, pixel_values)
            if runner.device.type == "cuda":
                torch.cuda.current_stream(runner.device).synchronize()
            runner.keep()


def _not_certified(bundle: Bundle, reason: str, backend: str) -> BundleError:
    check = f"trtower check {bundle.path} --backend {backend}"
    rehearsal = bundle.manifest.source.random_weights
    mend = "Export the checkpoint itself" if rehearsal else f"{check} certifies what runs here"
    return BundleError(f"{bundle.path} is not certified: {reason}. {mend}.")


def _read_device_map(device_map: Any) -> str | torch.device | None:
    if isinstance(device_map, dict):
        named = [key for key in device_map if str(key).rpartition(".")[2] == "vision_tower"]
        named = named or ([*device_map][:1] if len(set(device_map.values())) == 1 else [*device_map.keys() & {""}])
        if len(named) != 1:
            raise ConfigError(
                f"device_map={device_map} splits the tower or leaves it out; an engine is whole: pass {{'': device}}, "
                "or a map with one entry that ends in vision_tower."
            )
        device_map = device_map[named[0]]
    if device_map is None or device_map == "auto":
        return None
    return torch.device("cuda", device_map) if isinstance(device_map, int) else device_map
