"""The engine of a tower: opened on a device, lent to calls, moved, closed and reopened.

It stays open until the last call that uses it ends, and runs only in the process that opened it.
"""

import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from trtower.bundle.bundle import Bundle
from trtower.bundle.certificate import CHECK
from trtower.bundle.suggest import proof_command
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
"""Ids of the processes in which a runner was opened: this process, and those that it was forked from."""


def refuse_fork() -> None:
    """Raise BackendError in a fork of a process that had opened a runner: calls would hang there, even torch's."""
    if others := _opened_in - {os.getpid()}:
        raise BackendError(
            f"This process was forked from process {max(others)} after a tower had been loaded there; the threads of "
            "torch and of a backend do not survive a fork. Start processes with 'spawn', or load towers after forking."
        )


def _keep_inherited_runners() -> None:
    """Never free the runners that a fork inherits: that would wait for threads which only the other process has."""
    for runner in _opened:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(runner))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_inherited_runners)


class Engine:
    """Holds one runner of a bundle, or none, and keeps ``anchor`` on its device.

    Calls borrow the runner; it is closed only when no call uses it any more.
    """

    def __init__(self, name: str, bundle: Bundle, options: TowerOptions, anchor: Anchor) -> None:
        self.name = name
        self.runner: Runner | None = None
        self._process = os.getpid()
        self._calls: list[tuple[Runner, int]] = []
        self._calls_changed = threading.Condition()
        self._bundle, self._options, self._anchor = bundle, options, anchor
        self._requested_device = options.device
        self.changing = threading.RLock()  # held while the runner is replaced

    @property
    def device(self) -> torch.device:
        """The device it runs on; before it is opened, the device it was moved to."""
        runner = self.runner
        return self._anchor.empty.device if runner is None else runner.device

    def load(self, device_map: Any) -> None:
        """Open the bundle unless it is open already; raise BackendError if it is open on another device."""
        refuse_fork()
        requested = _read_device_map(device_map)
        if self.runner is None:
            with self.changing:
                if self.runner is None:
                    # accelerate moves the anchor without calling `.to` when it dispatches a model by its device_map.
                    placed = self.device if self.device.type != "cpu" else None
                    candidates = (requested, self._requested_device, placed)
                    self.open(next((device for device in candidates if device is not None), None))
                    self._requested_device = requested or self._requested_device
                    return
        if requested is not None and requested != self.device:
            raise BackendError(f"{self.name} is already loaded on {self.device}. To move it: .to({str(requested)!r})")
        logger.info("%s is already loaded, `load_model` called again, skipping.", self.name)

    def open(self, device: str | torch.device | None) -> Callable[[], None]:
        """Open the bundle on a device. Return a function that closes the previous runner once its calls have ended."""
        refuse_fork()
        self.refuse_own_call()
        runner = self._open_certified(device)
        close = self._swap(runner)
        self._anchor.place(runner.device)
        return close

    def _open_certified(self, device: str | torch.device | None) -> Runner:
        """Open the bundle, certified and verified if that is required; else only warn if a certificate failed."""
        bundle, options, certified = self._bundle, self._options, self._options.require_certificate
        if certified and (reason := bundle.uncertifiable()):
            raise _not_certified(bundle, reason, options.backend)
        runner = choose(bundle, options.backend, device, certified=certified, engine=options.engine)
        with ExitStack() as unless_served:
            unless_served.callback(runner.close)
            if certified and (reason := bundle.why_uncertified(runner.backend, runner.files)):
                raise _not_certified(bundle, reason, runner.backend, runner.files)
            if options.verify:
                from trtower.parity.verify import refuse_wrong  # most services do without, and start faster

                refuse_wrong(bundle, runner)
            unless_served.pop_all()
        certificate = bundle.find_certificate(runner.backend, runner.files[0])
        if certificate and not certificate.passed and not bundle.changed_since(certificate):
            message = "%s failed its %s on %s. To see which bounds it missed: trtower inspect %s"
            logger.warning(message, bundle.path, certificate.proof, runner.backend, bundle.path)
        return runner

    def move(self, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Move to where the function ``move`` puts tensors. If that fails, nothing has moved."""
        before = self.device
        after = self._device_after(move, before)
        if after == before == self._anchor.empty.device:
            return
        if self.runner is not None:
            refuse_fork()  # before the lock: another thread may have held it when this process was forked
        with self.changing:
            close_previous = self.open(after) if after != self.device and self.runner is not None else None
            self._anchor.place(after)
            if after not in (before, torch.device("meta")):
                self._requested_device = after
        if close_previous:
            close_previous()

    def _device_after(self, move: Callable[[torch.Tensor], torch.Tensor], before: torch.device) -> torch.device:
        """Return the device to which the function ``move`` would move this engine."""
        try:
            return move(torch.empty(0, dtype=self._anchor.empty.dtype, device=before)).device
        except (AssertionError, RuntimeError) as err:  # what torch raises for a device that is not here
            raise BackendError(f"{self.name} cannot be moved from {before}: {one_line(err)}. It stays there.") from err

    @contextmanager
    def lend(self) -> Iterator[Runner]:
        """Lend the runner to one call of a tower; raise BackendError if there is none, or it cannot run now."""
        if self._forked():
            raise BackendError(
                f"{self.name} was loaded in process {self._process}; this process is a fork of it, where no backend "
                "runs. Start processes with 'spawn', and load the tower in each."
            )
        with self._calls_changed:
            runner = self.runner
            if runner is None:
                raise BackendError(f"{self.name} is not loaded, or was closed. Call load_model().")
            if torch._C._is_tracing():  # torch.jit.is_tracing, which has no types
                raise BackendError(
                    f"{self.name} cannot be traced by torch.jit: the trace would contain an empty tensor instead of "
                    "the engine. Trace what comes before and after the tower separately."
                )
            if _is_captured(runner.device):
                raise BackendError(
                    f"{self.name} cannot run inside a CUDA graph capture: its calls share memory that the graph does "
                    "not know about. Capture what comes before and after the tower separately."
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
        """Raise BackendError inside a call of this engine: closing there would wait for that same call to end."""
        with self._calls_changed:
            if any(thread == threading.get_ident() for _, thread in self._calls):
                raise BackendError(f"{self.name} cannot be closed or moved inside its own call. Do it after the call.")

    def _swap(self, runner: Runner | None) -> Callable[[], None]:
        """Set the runner that later calls get, or None. Return a function that closes the previous runner.

        That function waits until no call uses the previous runner, so do not hold a lock that a call may need.
        """
        with self._calls_changed:
            before, self.runner = self.runner, runner
            if runner is not None:
                self._process = os.getpid()  # may be a fork of the process that made this engine without a runner
                _opened.add(runner)
                _opened_in.add(self._process)

        def close() -> None:
            with self._calls_changed:
                self._calls_changed.wait_for(lambda: all(each is not before for each, _ in self._calls))
            if before is not None:
                before.close()

        return close

    def close(self) -> None:
        """Close the runner, but never in a fork. Raises BackendError inside a call of this engine."""
        if not self._forked():
            self.refuse_own_call()
            with self.changing:
                close = self._swap(None)
            close()

    def _forked(self) -> bool:
        return os.getpid() != self._process

    def warm_up(self, batches: Iterable[int] | None) -> None:
        """Run each batch size once, by default those that the profiles name, and keep what was compiled."""
        manifest = self._bundle.manifest
        chosen = profile_batches(manifest.profiles) if batches is None else batches
        chosen = [*chosen] if isinstance(chosen, Iterable) else [chosen]
        if not all(type(batch) is int and batch > 0 for batch in chosen):
            raise ConfigError(f"warmup expects numbers of images, such as [1, 8]; got {batches!r}.")
        with self.lend() as runner:
            for batch in chosen:
                shape = (batch, *manifest.input.row)
                pixel_values = torch.zeros(shape, dtype=runner.pixel_dtype, device=runner.device)
                run_batch(runner, manifest.batch, manifest.output, pixel_values)
            if runner.device.type == "cuda":
                torch.cuda.current_stream(runner.device).synchronize()
            runner.keep()


def _is_captured(device: torch.device) -> bool:
    """Return whether the current stream of a GPU is being captured into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _not_certified(bundle: Bundle, reason: str, backend: str, executed: Sequence[str] = ()) -> BundleError:
    certificate = bundle.find_certificate(backend, executed[0]) if executed else None
    if bundle.manifest.source.random_weights:
        next_step = "Export the checkpoint itself."
    elif certificate and not certificate.passed and certificate.kind == CHECK:
        next_step = f"See where it errs: trtower check {bundle.path} --backend {backend} --report DIR"
    else:
        next_step = f"Certify what runs here: {proof_command(bundle, backend)}"
    return BundleError(f"{bundle.path} is not certified: {reason}. {next_step}")


def _read_device_map(device_map: Any) -> torch.device | None:
    """Return the device that a map names for the tower, or None if it leaves that open."""
    if isinstance(device_map, dict):
        named = [key for key in device_map if str(key).rpartition(".")[2] == "vision_tower"]
        devices = [*device_map.values()]
        is_one_device = all(device == devices[0] for device in devices)
        named = named or ([*device_map][:1] if is_one_device else [*device_map.keys() & {""}])
        if len(named) != 1:
            raise ConfigError(
                f"device_map={device_map} splits the tower or leaves it out, but an engine runs on one device. Pass "
                "{'': device}, or a map with one entry that ends in vision_tower."
            )
        device_map = device_map[named[0]]
    return None if isinstance(device_map, str) and device_map == "auto" else parse_device(device_map)
