"""The engine of a tower: opened where it was asked for, lent to calls, moved, closed, and opened again.

It lasts as long as a call needs it, in the process that opened it.
"""

import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from trtower.bundle.bundle import Bundle
from trtower.errors import BackendError, BundleError, ConfigError, one_line
from trtower.runners.base import Runner, run_batch
from trtower.runners.choose import choose
from trtower.runners.device import parse_device
from trtower.spec import profile_batches
from trtower.tower.anchor import Anchor
from trtower.tower.options import TowerOptions

logger = logging.getLogger(__name__)

_opened: "weakref.WeakSet[Runner]" = weakref.WeakSet()
_opened_in: set[int] = set()
"""Processes in which a runner was opened: this one, and those that it is a fork of."""


def refuse_fork() -> None:
    """Raise BackendError in a fork of a process that has opened a runner: its calls would hang, torch's own too."""
    if others := _opened_in - {os.getpid()}:
        raise BackendError(
            f"process {max(others)} has had a tower loaded before it forked this one, and neither torch's threads nor "
            "a backend's live on here: start processes with 'spawn', or load towers after the fork alone."
        )


def _never_let_go() -> None:
    """Keep what a fork has inherited: to free it would wait for threads that are in the other process."""
    for runner in _opened:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(runner))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_never_let_go)


class Engine:
    """Holds one runner of a bundle, or none, on the device that ``anchor`` tells model code.

    Calls borrow the runner, and it is closed when no call has it any more.
    """

    def __init__(self, name: str, bundle: Bundle, options: TowerOptions, anchor: Anchor) -> None:
        self.name = name
        self.runner: Runner | None = None
        self._process = os.getpid()
        self._calls: list[tuple[Runner, int]] = []
        self._calls_changed = threading.Condition()
        self._bundle, self._options, self._anchor = bundle, options, anchor
        self._asked_device = options.device
        self.changing = threading.RLock()  # held while another runner takes the place of this one

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
                    self._asked_device = asked or self._asked_device
                    return
        if asked is not None and asked != self.device:
            raise BackendError(f"{self.name} is loaded on {self.device}: .to({str(asked)!r}) moves it.")
        logger.info("%s is already loaded, `load_model` called again, skipping.", self.name)

    def open(self, device: str | torch.device | None) -> Callable[[], None]:
        """Open the bundle on a device; return what closes what was open before, once its calls have ended."""
        refuse_fork()
        self.refuse_own_call()
        runner = self._open_certified(device)
        close = self._swap(runner)
        self._anchor.place(runner.device)
        return close

    def _open_certified(self, device: str | torch.device | None) -> Runner:
        """Open the bundle, certified if that is demanded; if not, one that failed its check runs with a warning."""
        bundle, options, certified = self._bundle, self._options, self._options.require_certificate
        if certified and (reason := bundle.uncertifiable()):
            raise _not_certified(bundle, reason, options.backend)
        runner = choose(bundle, options.backend, device, certified=certified, engine=options.engine)
        with ExitStack() as unless_served:
            unless_served.callback(runner.close)
            if certified and (reason := bundle.why_uncertified(runner.backend, runner.files)):
                raise _not_certified(bundle, reason, runner.backend)
            unless_served.pop_all()
        found = bundle.find_certificate(runner.backend, runner.files[0])
        if found and not found.passed and not bundle.changed_since(found):
            said = "%s failed its check on %s: `trtower inspect` says what was missed."
            logger.warning(said, bundle.path, runner.backend)
        return runner

    def move(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Follow a function that moves tensors. Raises before anything has moved."""
        before = self.device
        after = self._device_after(move, before)
        if after == before == self._anchor.empty.device:
            return
        if self.runner is not None:
            refuse_fork()  # before the lock, which another thread may have held when this process was forked
        with self.changing:
            close_previous = self.open(after) if after != self.device and self.runner is not None else None
            self._anchor.place(after)
            if after not in (before, torch.device("meta")):
                self._asked_device = after
        if close_previous:
            close_previous()

    def _device_after(self, move: Callable[[torch.Tensor], torch.Tensor], before: torch.device) -> torch.device:
        """Ask a function that moves tensors where it would move this engine."""
        try:
            return move(torch.empty(0, dtype=self._anchor.empty.dtype, device=before)).device
        except (AssertionError, RuntimeError) as err:  # torch's words for a device that is not here
            raise BackendError(f"{self.name} cannot be moved from {before}: {one_line(err)}. It stays there.") from err

    @contextmanager
    def lend(self) -> Iterator[Runner]:
        """Lend the runner for one call of a tower; raise BackendError where there is none that can run."""
        if self._forked():
            raise BackendError(
                f"{self.name} was loaded in process {self._process}, and this is a fork of it, where no backend runs: "
                "start processes with 'spawn', and load it in each."
            )
        with self._calls_changed:
            runner = self.runner
            if runner is None:
                raise BackendError(f"{self.name}: this tower is not loaded, or closed: call load_model().")
            if torch._C._is_tracing():  # torch.jit.is_tracing, which has no types
                raise BackendError(
                    f"{self.name} cannot be traced by torch.jit: the trace would have an empty tensor in the place of "
                    "the engine. Trace what comes before and after it."
                )
            if _is_captured(runner.device):
                raise BackendError(
                    f"{self.name} cannot run while a CUDA graph is captured around it, for its calls share memory that "
                    "the graph knows nothing of: capture what comes before and after it."
                )
            call = (runner, threading.get_ident())
            self._calls.append(call)
        try:
            yield runner
        finally:
            with self._calls_changed:
                self._calls.remove(call)
                self._calls_changed.notify_all()

    def refuse_own_call(self) -> None:
        """Raise BackendError inside a call of the runner that is held, which would wait for itself to end."""
        with self._calls_changed:
            if any(thread == threading.get_ident() for _, thread in self._calls):
                raise BackendError(f"{self.name} is not closed or moved inside a call of its own: do so after it.")

    def _swap(self, runner: Runner | None) -> Callable[[], None]:
        """Hold another runner, or none, which later calls get; return what closes the one before.

        That waits until no call has it: call it with no lock held that a call may want.
        """
        with self._calls_changed:
            before, self.runner = self.runner, runner
            if runner is not None:
                self._process = os.getpid()  # which may be a fork of the one that made this engine, with no runner yet
                _opened.add(runner)
                _opened_in.add(self._process)

        def close() -> None:
            with self._calls_changed:
                self._calls_changed.wait_for(lambda: all(each is not before for each, _ in self._calls))
            if before is not None:
                before.close()

        return close

    def close(self) -> None:
        """Hold none. A fork lets go of nothing. Raises BackendError inside a call of its own."""
        if not self._forked():
            self.refuse_own_call()
            with self.changing:
                close = self._swap(None)
            close()

    def _forked(self) -> bool:
        return os.getpid() != self._process

    def warm_up(self, batches: Iterable[int] | None) -> None:
        """Run each number of images once, by default those that the profiles name, and keep what was compiled."""
        manifest = self._bundle.manifest
        side = manifest.spec.image_size
        chosen = profile_batches(manifest.profiles) if batches is None else batches
        chosen = [*chosen] if isinstance(chosen, Iterable) else [chosen]
        if not all(type(batch) is int and batch > 0 for batch in chosen):
            raise ConfigError(f"warmup takes numbers of images, such as [1, 8]; got {batches!r}.")
        with self.lend() as runner:
            for batch in chosen:
                pixel_values = torch.zeros((batch, 3, side, side), dtype=runner.dtype, device=runner.device)
                run_batch(runner, manifest.batch, manifest.output, pixel_values)
            if runner.device.type == "cuda":
                torch.cuda.current_stream(runner.device).synchronize()
            runner.keep()


def _is_captured(device: torch.device) -> bool:
    """Whether the current stream of a GPU is being captured into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _not_certified(bundle: Bundle, reason: str, backend: str) -> BundleError:
    check = f"trtower check {bundle.path} --backend {backend}"
    rehearsal = bundle.manifest.source.random_weights
    mend = "Export the checkpoint itself" if rehearsal else f"{check} certifies what runs here"
    return BundleError(f"{bundle.path} is not certified: {reason}. {mend}.")


def _read_device_map(device_map: Any) -> torch.device | None:
    """Return the device that a map has for the tower; None if it leaves that open."""
    if isinstance(device_map, dict):
        named = [key for key in device_map if str(key).rpartition(".")[2] == "vision_tower"]
        devices = [*device_map.values()]
        one = all(device == devices[0] for device in devices)
        named = named or ([*device_map][:1] if one else [*device_map.keys() & {""}])
        if len(named) != 1:
            raise ConfigError(
                f"device_map={device_map} splits the tower or leaves it out; an engine is whole: pass {{'': device}}, "
                "or a map with one entry that ends in vision_tower."
            )
        device_map = device_map[named[0]]
    return None if isinstance(device_map, str) and device_map == "auto" else parse_device(device_map)
