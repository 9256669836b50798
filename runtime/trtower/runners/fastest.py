"""Order backends by what `trtower tune` measured on this device, if that still holds.

Only those that run the graph on the same kind of device change places: plans stay first and the CPU last, whatever was
measured. A backend that was not measured follows those that were.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch

from trtower.bundle.bundle import Bundle
from trtower.bundle.tuning import Tuning
from trtower.extras import installed_version
from trtower.flavour import FLAVOURS
from trtower.runners.base import Backend
from trtower.runners.device import default_device, describe_device, device_obstacle


@dataclass(frozen=True, kw_only=True)
class KnownTuning:
    """A tuning of a bundle, and why it is ``ignored`` here; None if `auto` follows it."""

    tuning: Tuning
    ignored: str | None


def runs_graphs(backend: Backend) -> bool:
    """Whether a backend runs the bundle's graph, and not a plan."""
    return backend.name not in FLAVOURS


def installed_versions(backends: Iterable[Backend]) -> dict[str, str]:
    """Read the versions of trtower and of every package that runs graphs, without importing any."""
    names = sorted({"trtower", *(each.package for each in backends if runs_graphs(each))})
    return {name: number for name in names if (number := installed_version(name))}


def known_tunings(
    bundle: Bundle, backends: Iterable[Backend], kinds: Collection[str], requested: torch.device | None
) -> list[KnownTuning]:
    """List a bundle's tunings on some kinds of device, and which of them hold here.

    Only these kinds of device are looked at: to name a GPU, torch creates a CUDA context on it.
    """
    tunings = [each for each in bundle.manifest.tunings if each.kind in kinds]
    if not tunings:
        return []
    versions, devices = installed_versions(backends), dict[str, str | None]()
    for kind in {each.kind for each in tunings}:
        device = requested if requested and requested.type == kind else default_device(kind)
        devices[kind] = None if device_obstacle(device) else describe_device(device)
    return [KnownTuning(tuning=each, ignored=each.why_ignored(devices[each.kind], versions)) for each in tunings]


def kinds_to_order(backends: Iterable[Backend], requested: torch.device | None) -> set[str]:
    """Return the kinds of device on which several of these backends could run a graph."""
    graphs = Counter(each.kind for each in backends if runs_graphs(each))
    return {kind for kind, number in graphs.items() if number > 1 and (requested is None or requested.type == kind)}


def fastest_first(backends: Sequence[Backend], known: Iterable[KnownTuning]) -> list[Backend]:
    """Sort those that run graphs on one kind of device by the tuning that holds there; the others keep their places."""
    order = list(backends)
    for tuning in [each.tuning for each in known if not each.ignored]:
        places = [place for place, each in enumerate(order) if runs_graphs(each) and each.kind == tuning.kind]
        ranks = {each.backend: rank for rank, each in enumerate(tuning.backends)}
        ranked = sorted((order[place] for place in places), key=lambda each: ranks.get(each.name, len(ranks)))
        for place, each in zip(places, ranked, strict=True):
            order[place] = each
    return order
