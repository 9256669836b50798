"""Race the backends that run a bundle's graph on this device, and write the result into the bundle for `auto`."""

import datetime
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial

import torch

from trtower.bundle.bundle import Bundle
from trtower.bundle.staging import WAIT_S, check_writable, disk_errors, locked
from trtower.bundle.tuning import BackendTimes, Tuning
from trtower.errors import BackendError, ConfigError, one_line
from trtower.runners.base import EngineOptions, Runner
from trtower.runners.choose import BACKENDS, auto_choice, candidates, find_backend
from trtower.runners.device import describe_device, device_obstacle, parse_device
from trtower.runners.fastest import installed_versions, runs_graphs
from trtower.runners.race import UNEVEN, batches_to_time, draw_inputs, race

ROUNDS = {"cpu": 5, "cuda": 50}
"""How often each backend runs each batch, by kind of device."""

OnStep = Callable[[str], None]
"""Called with a line of text about every step, and about every backend that is not timed."""


def tune_bundle(
    bundle: Bundle,
    *,
    device: str | torch.device | None = None,
    batches: Sequence[int] | None = None,
    on_step: OnStep = lambda line: None,
) -> Bundle:
    """Race the backends that can run a bundle's graph here, and write the times into it, for `auto` to follow.

    They take turns, so that a change in the machine's speed affects all alike, and need memory for all of them. Plans
    do not take part: `auto` prefers them to any graph. A race replaces an earlier one on the same device.

    Args:
        bundle: The bundle; its folder must be writable.
        device: Where to run, "cuda", "cuda:INDEX" or "cpu". Default: the GPU if torch can use one, else the CPU.
        batches: The batches to time, each within the profiles. Default: those that the profiles name; on a CPU only
            the smallest.
        on_step: Called with a line of text about every step, and about every backend that is not timed.

    Returns:
        The bundle with its new tuning, which is the last of `bundle.manifest.tunings`.

    Raises:
        BackendError: There is no such device, or no backend runs the graph on it.
        BundleError: A file was altered, or the folder is read-only or being written by another process.
        ConfigError: ``device`` is unknown, or a batch is outside the profiles.
    """
    check_writable(bundle.path, "tune a writable copy.")
    here = parse_device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    assert here is not None  # noqa: S101 - None is parsed to None only
    if obstacle := device_obstacle(here):
        raise BackendError(f"cannot use device {here}: {obstacle}.")
    sizes = _sizes(bundle, here, batches)
    with ExitStack() as stack:
        if here.type == "cuda":
            stack.enter_context(torch.cuda.device(here))  # whose events are recorded, and in whose streams calls run
        runners = {each.backend: stack.enter_context(closing(each)) for each in _open(bundle, here, on_step)}
        times = _race(bundle, runners, sizes, here, on_step)
    if not times:
        raise BackendError(f"no backend ran the graph of {bundle.path} on {here}, so there is nothing to compare.")
    tuning = Tuning(
        kind=here.type,
        device=describe_device(here),
        versions=installed_versions(BACKENDS),
        batches=tuple(sizes),
        backends=tuple(sorted(times, key=lambda each: statistics.geometric_mean(each.seconds))),
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    )
    with disk_errors(bundle.path), locked(bundle.path, wait_s=WAIT_S):
        return bundle.add_tuning(tuning)


def _sizes(bundle: Bundle, device: torch.device, batches: Sequence[int] | None) -> list[int]:
    profile = bundle.manifest.batch
    if batches is None:
        return batches_to_time(bundle.manifest, device.type)
    for batch in batches:
        if not profile.min <= batch <= profile.max:
            raise ConfigError(
                f"batch {batch} is not within the profiles of {bundle.path}: {profile.min} to {profile.max}."
            )
    if not batches:
        raise ConfigError("batches is empty; expected at least one.")
    return sorted({*batches})


def _open(bundle: Bundle, device: torch.device, on_step: OnStep) -> Iterator[Runner]:
    """Open the backends for graphs on this kind of device; say which of them cannot run here, and why."""
    for each in candidates(bundle, device):
        backend = find_backend(each.backend)
        if backend.kind != device.type or not runs_graphs(backend):
            continue
        if each.obstacle:
            on_step(f"{each.backend} is not timed: {each.obstacle}")
            continue
        on_step(f"loading {each.backend} …")
        try:
            yield each.open(bundle, EngineOptions())
        except BackendError as err:
            on_step(f"{each.backend} is not timed: {err}")


def _race(
    bundle: Bundle, runners: dict[str, Runner], sizes: Sequence[int], device: torch.device, on_step: OnStep
) -> list[BackendTimes]:
    """Time every batch on every runner that can run it. Those that fail at one are left out."""
    found: dict[str, list[float]] = {name: [] for name in runners}

    def drop(name: str, err: Exception) -> None:
        on_step(f"{name} is not timed, because it failed: {one_line(err)}")
        del found[name]

    for size in sizes:
        on_step(f"timing batch {size} …")
        calls = {}
        for name in found:
            runner = runners[name]
            images = draw_inputs(bundle.manifest, size).to(runner.device, runner.pixel_dtype)
            features = torch.empty((size, *bundle.manifest.output.row), dtype=runner.dtype, device=runner.device)
            calls[name] = partial(runner.run, images, features)
        on_gpu = device.type == "cuda"
        for name, seconds in race(calls, rounds=ROUNDS[device.type], drop=drop, on_gpu=on_gpu).items():
            found[name].append(statistics.median(seconds))
            if not on_gpu and max(seconds) > UNEVEN * found[name][-1]:
                times = max(seconds) / found[name][-1]
                on_step(
                    f"{name} took up to {times:.1f} times its median: if the machine was busy, tune again when idle"
                )
    return [
        BackendTimes(backend=name, runner=runners[name].name, seconds=tuple(seconds)) for name, seconds in found.items()
    ]


def as_text(bundle: Bundle, tuning: Tuning, device: str | torch.device | None = None) -> str:
    """Return a tuning as a table, and what `auto` makes of it on its ``device``; None is torch's current one."""
    width = max(len(each.backend) for each in tuning.backends)
    lines = [f"{'batch':<{width}}{''.join(f'{size:>10}' for size in tuning.batches)}"]
    for each in tuning.backends:
        lines.append(f"{each.backend:<{width}}{''.join(f'{s * 1e3:>10.2f}' for s in each.seconds)}  ms  {each.runner}")
    listed = candidates(bundle, tuning.kind if device is None else device)
    choice = auto_choice(listed)
    lines.append(f"Timed on {tuning.device}. There auto runs {choice.backend if choice else 'nothing'}.")
    if choice and choice.plan:
        lines.append("It prefers a plan to any graph; the order above is for when no plan runs.")
        return "\n".join(lines)
    order = [each.backend for each in tuning.backends]
    slower = order[order.index(choice.backend) :] if choice and choice.backend in order else []
    lines += [
        f"It passes over {each.backend}: {each.reservation}"
        for each in listed
        if each.reservation and each.backend in order and each.backend not in slower
    ]
    return "\n".join(lines)
