"""Embed shards on Ray: a pool of actors, each with a tower of its own, fed by Ray Data.

Every node needs trtower with the extra ``ray``, and sees the bundle, the pictures and the output at the same paths.
"""

import logging
import pickle
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trtower.embedding.engines import Runs
from trtower.embedding.folder import Description
from trtower.embedding.options import EmbedOptions
from trtower.embedding.shards import Done, Shard, Tick, Work, embed_shards
from trtower.errors import BackendError, ConfigError, TrtowerError, one_line
from trtower.extras import import_extra
from trtower.tower.same import open_same
from trtower.tower.vision_tower import VisionTower

logger = logging.getLogger(__name__)

LOCAL, AUTO = "local", "auto"
ANSWERS_WITHIN_S, HEALTHY_WITHIN_S = 5.0, 20.0
STARTS_WITHIN_S = 120.0
"""Seconds until an engine must have been placed and loaded."""

STOPS_WITHIN_S = 30.0
"""Seconds until Ray Data's threads must have ended, also after an error."""

LONGEST = 500
"""Characters of Ray's own errors that are quoted: the last ones, for they begin with a traceback."""

MOST_CORES = 8
BLOCKS_OF_AN_ENGINE = 8
"""Into how many blocks of shards an engine's part is divided: few, because an engine idles between two."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """How many engines run, and what each has of the cluster."""

    workers: int
    cores: int
    gpus: int


@dataclass(frozen=True, kw_only=True)
class Opens:
    """Opens the same tower in any process. It can be pickled."""

    bundle: str
    tower_sha256: str
    options: EmbedOptions
    backend: str
    share: Share

    def open(self) -> VisionTower:
        """Load the tower; raise ConfigError if this node sees another bundle at its path."""
        return open_same(
            self.bundle,
            self.tower_sha256,
            threads=self.share.cores,
            select_layer=self.options.select_layer,
            select_feature=self.options.select_feature,
            backend=self.backend,
            require_certificate=not self.options.allow_uncertified,
        )


class Actor:
    """One engine. What trtower raises is returned as a row: Ray would keep its words, and lose its kind."""

    def __init__(self, opens: Opens, work: Work) -> None:
        self._work = replace(work, threads=opens.options.threads or opens.share.cores)
        self._error = b""
        try:
            self._tower = opens.open()
            _refuse_another(work.folder, opens.tower_sha256)
        except TrtowerError as err:
            self._error = pickle.dumps(err)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Embed the shards of a block."""
        done, error = list[Done](), self._error
        if not error:
            shards = [pickle.loads(each) for each in batch["shard"]]  # noqa: S301 - this module pickled them
            try:
                done.extend(embed_shards(self._tower, self._work, shards, lambda number: None))
            except TrtowerError as err:
                error = pickle.dumps(err)
        rows = [*map(asdict, done), *([asdict(Done(index=-1, pictures=0, left_out=0))] if error else [])]
        columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in rows[0]}
        return {**columns, "error": [b""] * len(done) + ([error] if error else [])}


def _refuse_another(folder: Path, tower_sha256: str) -> None:
    """Raise ConfigError unless this node sees the folder that the job writes to."""
    found = Description.read(folder).tower_sha256 if folder.is_dir() else None
    if found != tower_sha256:
        raise ConfigError(
            f"{folder} on {socket.gethostname()} is not the folder that was named: all nodes must share it."
        )


@dataclass(frozen=True, kw_only=True)
class OnRay:
    """Engines on a cluster."""

    ray: Any
    opens: Opens
    runs: Runs

    def embed(self, work: Work, shards: Sequence[Shard], tick: Tick) -> Iterator[Done]:
        """Write the file of each shard, in any order."""
        share = self.opens.share
        blocks = min(len(shards), share.workers * BLOCKS_OF_AN_ENGINE)
        rows = [{"shard": pickle.dumps(shard)} for shard in shards]
        data = self.ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            Actor,
            batch_size=None,
            fn_constructor_args=(self.opens, work),
            compute=self.ray.data.ActorPoolStrategy(size=min(share.workers, blocks)),
            num_cpus=share.cores,
            num_gpus=share.gpus,
        )
        with _errors_of_ray():
            for row in data.iter_rows():
                if error := row.pop("error"):
                    raise pickle.loads(error)  # noqa: S301 - of our own actor
                tick(row["pictures"] + row["left_out"])
                yield Done(**row)


def import_ray() -> Any:
    """Import Ray with Ray Data; raise MissingExtraError if they are not installed."""
    import_extra("ray.data", extra="ray", purpose="embedding on Ray")
    return import_extra("ray", extra="ray", purpose="embedding on Ray")


@contextmanager
def on_ray(tower: VisionTower, options: EmbedOptions) -> Iterator[OnRay]:
    """Connect to Ray, and find out what the engines run on there, by loading one."""
    ray = import_ray()
    with _connected(ray, str(options.ray)):
        share = divide([node["Resources"] for node in ray.nodes() if node["Alive"]], options)
        opens = Opens(
            bundle=str(tower.bundle.path.absolute()),
            tower_sha256=tower.bundle.manifest.tower_sha256,
            options=options,
            backend=options.backend,
            share=share,
        )
        with _errors_of_ray():
            probe = ray.remote(num_cpus=share.cores, num_gpus=share.gpus, max_retries=0)(_probe)
            runs = ray.get(probe.remote(opens), timeout=STARTS_WITHIN_S)
        yield OnRay(ray=ray, opens=replace(opens, backend=runs.backend), runs=runs)


def _probe(opens: Opens) -> Runs:
    with opens.open() as tower:
        return Runs.of(tower)


def divide(nodes: Sequence[Mapping[str, float]], options: EmbedOptions) -> Share:
    """Divide the nodes of a cluster between engines: one for each GPU, or without GPUs one for every few processors.

    ``nodes`` are the resources of each. Raises ConfigError if they have not enough of either.
    """
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    usable = [node for node in nodes if node.get("CPU", 0) >= 1 and (node.get("GPU", 0) >= 1 or not gpus)]
    shares = [int(node["CPU"] // max(1, node.get("GPU", 0))) for node in usable]
    cores = options.cores or max(1, min([MOST_CORES, *shares]))
    room = sum(int(min(node["CPU"] // cores, node.get("GPU", 0) if gpus else node["CPU"])) for node in usable)
    workers = options.workers or room
    if not 1 <= workers <= room:
        raise ConfigError(
            f"the cluster has room for {room} engines of {cores} processors{' and a GPU' if gpus else ''}, not for "
            f"{max(1, workers)}: ask for fewer workers or cores, or add nodes."
        )
    return Share(workers=workers, cores=cores, gpus=1 if gpus else 0)


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    """Be connected to a cluster inside the `with` block; a process that is connected already stays so."""
    if ray.is_initialized():
        yield
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        ray.init(address=LOCAL, include_dashboard=False, **quiet)
    else:
        if address != AUTO:
            _refuse_silent(address)
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as err:
            raise BackendError(f"cannot connect to Ray at {address}: {one_line(err)}") from err
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    others = set(threading.enumerate())
    try:
        yield
    finally:
        if _threads_end(others):
            ray.shutdown()
        else:
            logger.warning("Ray Data did not stop within %.0f s: this process stays connected to Ray.", STOPS_WITHIN_S)


def _threads_end(others: Collection[threading.Thread]) -> bool:
    """Wait until no thread runs Ray Data's code, except ``others``; return False if one still does after a while.

    A thread that calls Ray after its shutdown ends the whole process.
    """
    deadline = time.monotonic() + STOPS_WITHIN_S
    while any(_runs_ray_data(thread) for thread in threading.enumerate() if thread not in others):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _runs_ray_data(thread: threading.Thread) -> bool:
    """Say if a thread runs Ray Data's code. One that only waits for another does not: nobody is left to wake it."""
    frame = sys._current_frames().get(thread.ident or 0)
    modules = [each.f_globals.get("__name__", "") for each, _ in traceback.walk_stack(frame)] if frame else [""]
    return modules[0] != "threading" and any(name.startswith("ray.data.") for name in modules)


def _refuse_silent(address: str) -> None:
    """Raise BackendError if nobody answers at HOST:PORT: Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ConfigError(f"--ray {address}: expected {LOCAL}, {AUTO}, or HOST:PORT.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERS_WITHIN_S).close()
    except (OSError, OverflowError) as err:
        raise BackendError(
            f"no answer from Ray at {address} ({getattr(err, 'strerror', None) or one_line(err)}): start it there with "
            f"`ray start --head`, or use --ray {LOCAL}."
        ) from err
    try:  # in a process that can be ended, for Ray itself waits for minutes if something else answers
        command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
        subprocess.run(command, check=True, capture_output=True, timeout=HEALTHY_WITHIN_S)
    except subprocess.SubprocessError as err:
        raise BackendError(f"what answers at {address} is not Ray, or not healthy: see `ray status`.") from err


@contextmanager
def _errors_of_ray() -> Iterator[None]:
    """Raise what one of our own functions raised in an actor, without Ray's wrapping."""
    try:
        yield
    except Exception as err:
        cause: BaseException | None = err
        while cause is not None:
            inner = getattr(cause, "cause", None)
            if isinstance(cause, TrtowerError) and inner is None:  # Ray's wrapping is one, too, and has a cause
                raise type(cause)(*cause.args) from err
            cause = inner if isinstance(inner, BaseException) else cause.__cause__
        if type(err).__name__ == "GetTimeoutError":
            raise BackendError(
                f"no engine was loaded on Ray within {STARTS_WITHIN_S:.0f} s: the cluster may be busy, or no node has "
                "enough processors and GPUs; see `ray status`."
            ) from err
        if type(err).__module__.startswith("ray."):
            raise BackendError(f"embedding on Ray failed: {one_line(err)[-LONGEST:]}") from err
        raise
