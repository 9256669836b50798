"""What `trtower tune` found out: how long the backends that run a bundle's graph take on one device."""

import dataclasses
import math
import re
import statistics
from collections.abc import Mapping

from trtower.errors import ConfigError
from trtower.names import check_name

KINDS = ("cpu", "cuda")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackendTimes:
    """How long one backend took. ``runner`` is its name with its version; ``seconds`` has a median for each batch."""

    backend: str
    runner: str
    seconds: tuple[float, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """A race of backends on one device, as the manifest keeps it.

    ``device`` is the GPU's name, or the processor's with the number of threads, and ``kind`` that of the device, "cpu"
    or "cuda". ``versions`` are those of the packages whose speed was measured. ``backends`` stand in the order of their
    geometric means over the ``batches``, the fastest first.
    """

    kind: str
    device: str
    versions: dict[str, str]
    batches: tuple[int, ...]
    backends: tuple[BackendTimes, ...]
    date: str

    def __post_init__(self) -> None:
        check_name("kind of device in a tuning", self.kind, KINDS)
        if not self.backends or not self.batches:
            raise ConfigError(f"the tuning on {self.device} timed no backend or no batch.")
        if min(self.batches) < 1 or len({*self.batches}) < len(self.batches):
            raise ConfigError(f"the tuning on {self.device} has the batches {self.batches}; expected different ones.")
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", self.date):
            raise ConfigError(f"the tuning on {self.device} is of {self.date!r}; expected a day such as 2026-11-30.")
        names = [each.backend for each in self.backends]
        if len(set(names)) < len(names):
            raise ConfigError(f"the tuning on {self.device} has a backend twice.")
        for each in self.backends:
            if len(each.seconds) != len(self.batches) or not all(math.isfinite(s) and s > 0 for s in each.seconds):
                raise ConfigError(
                    f"the tuning on {self.device} has the seconds {each.seconds} of {each.backend}; expected one above "
                    f"0 for each of the batches {self.batches}."
                )
        means = [statistics.geometric_mean(each.seconds) for each in self.backends]
        if means != sorted(means):
            raise ConfigError(f"the tuning on {self.device} does not have its backends in the order of their times.")

    @property
    def subject(self) -> tuple[str, str]:
        """What was tuned: one tuning each."""
        return self.kind, self.device

    def why_ignored(self, device: str | None, versions: Mapping[str, str]) -> str | None:
        """Say why this tuning says nothing about a device and installed packages; None if it does.

        ``device`` is None if there is no device of this kind.
        """
        if device != self.device:
            return f"this is {device}" if device else "there is no such device here"
        changed = [
            f"{name} was {self.versions.get(name, 'not installed')}, and is {versions.get(name, 'not installed')}"
            for name in sorted({*self.versions, *versions})
            if self.versions.get(name) != versions.get(name)
        ]
        return "; ".join(changed) or None

    def describe(self) -> str:
        """Return the race in one line: "torch-cuda 2.0, 7.9 ms; onnxruntime-cuda 3.6, 11.3 ms; at batch 1, 8"."""
        times = [
            f"{each.backend} {', '.join(f'{second * 1e3:.1f}' for second in each.seconds)} ms" for each in self.backends
        ]
        return f"{'; '.join(times)}; at batch {', '.join(map(str, self.batches))}"
