"""What is known to be wrong with a TensorRT, on which GPUs and for which towers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from trtower.errors import ConfigError
from trtower.flavour import is_before
from trtower.names import check_name
from trtower.spec import EIGHT_BIT
from trtower_export.targets import read_rows


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault of data-centre TensorRT. A field that is empty limits nothing.

    Attributes:
        name: What `--accept-known-fault` takes.
        what: What goes wrong, as a clause.
        since: The first version that has it.
        fixed: The first version that was reported right; "" if none was.
        families: The families of towers that it hits.
        precisions: The precisions that it hits.
        compute_capabilities: The GPUs that it hits.
        platform: The platform that it hits.
        refuse: Whether results are wrong, or nothing is built. Otherwise it is worth a warning.
        instead: What to do instead.
        source: The page where it was reported.
        read: The day when that was read.
    """

    name: str
    what: str
    since: str
    fixed: str = ""
    families: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    compute_capabilities: tuple[str, ...] = ()
    platform: str = ""
    refuse: bool
    instead: str
    source: str
    read: str

    def hits(self, version: str, capabilities: Sequence[str], platform: str, family: str, precision: str) -> bool:
        """Return whether a plan would have this fault. GPUs and a platform that are unknown are taken to be hit."""
        half = ("fp16",) if precision in EIGHT_BIT else ()  # all but its linear layers
        return (
            not is_before(version, self.since)
            and (not self.fixed or is_before(version, self.fixed))
            and (not self.families or family in self.families)
            and (not self.precisions or not {*self.precisions}.isdisjoint({precision, *half}))
            and (not self.platform or platform in ("", self.platform))
            and (
                not self.compute_capabilities
                or not capabilities
                or bool({*capabilities} & {*self.compute_capabilities})
            )
        )

    def is_certain(self, capabilities: Sequence[str], platform: str) -> bool:
        """Return whether the fault hits every GPU that the plan may run on, as far as is known."""
        hits_all = bool(capabilities) and {*capabilities} <= {*self.compute_capabilities}
        return (hits_all or not self.compute_capabilities) and bool(platform or not self.platform)

    def __str__(self) -> str:
        until = f" to before {self.fixed}" if self.fixed else " and later"
        gpus = f", compute capability {' or '.join(self.compute_capabilities)}" if self.compute_capabilities else ""
        return f"{self.name}: {self.what} (reported for TensorRT {self.since}{until}{gpus}: {self.source})"


@cache
def all_faults() -> tuple[Fault, ...]:
    """Read all faults, in the order of faults.toml."""
    return tuple(Fault(**row) for row in read_rows("faults.toml"))


def check_accepted(names: Sequence[str]) -> None:
    """Raise ConfigError for the name of a fault that does not exist."""
    for name in names:
        check_name("fault", name, [fault.name for fault in all_faults()])


def find_faults(version: str, capabilities: Sequence[str], platform: str, family: str, precision: str) -> list[Fault]:
    """List the faults that a plan of ``family`` may have, built by a version of data-centre TensorRT; "" has none."""
    if not version:
        return []
    return [fault for fault in all_faults() if fault.hits(version, capabilities, platform, family, precision)]


def check_faults(
    version: str,
    capabilities: Sequence[str],
    platform: str,
    family: str,
    precision: str,
    accepted: Sequence[str],
    warn: Callable[[str], object],
) -> None:
    """Warn of the known faults that a plan of ``family`` would have; refuse those that make it useless.

    ``accepted`` names faults to warn of only. A fault of certain GPUs is a warning too if ``capabilities`` are open or
    hold others. Raises ConfigError for a fault that is not accepted.
    """
    for fault in find_faults(version, capabilities, platform, family, precision):
        if fault.refuse and fault.is_certain(capabilities, platform) and fault.name not in accepted:
            raise ConfigError(
                f"TensorRT {version} has a known fault, {fault}. Use {fault.instead}, or accept it with "
                f"--accept-known-fault {fault.name}"
            )
        warn(f"WARNING: known fault {fault}; instead: {fault.instead}")
