"""What Ray Serve runs: one tower in a process of its own, called by other deployments.

Requests gather in Ray's event loop by `@serve.batch`, and run in one thread beside it, so that the loop goes on to
answer Ray. open_inference.py adds what clients call over gRPC.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from trtower.dtypes import PIXEL_DTYPES
from trtower.errors import BackendError, ConfigError, InputError
from trtower.extras import import_extra
from trtower.parity.golden import Golden
from trtower.parity.verify import refuse_wrong
from trtower.serving.ray.options import PURPOSE, RayOptions
from trtower.serving.tensors import IMAGE, PIXEL_VALUES, as_array
from trtower.tower.encoded import describe, no_limit_of_pillow, open_encoded
from trtower.tower.prepare import joined, prepare
from trtower.tower.same import open_same

ray = import_extra("ray", extra="ray", purpose=PURPOSE)
serve = import_extra("ray.serve", extra="ray", purpose=PURPOSE)

logger = logging.getLogger(__name__)

T = TypeVar("T")


class UnhealthyError(BackendError):
    """The engine's answers were wrong when they were last compared with the bundle's."""


class TowerReplica:
    """A tower in one replica."""

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        options: RayOptions | None = None,
    ) -> None:
        """Load the bundle, compare it with its golden answers, and warm it up; Ray sends no request before.

        Args:
            bundle: The folder that `trtower export` wrote; every node sees it at this path.
            options: What to do with it. Default: `RayOptions()`.

        Raises:
            BundleError: The bundle is damaged, not certified, or without golden answers.
            BackendError: No requested backend can run it here, or its answers are wrong.
            ConfigError: It is another bundle, an option is invalid, or GPUs of the cluster would stay idle.
        """
        options = options or RayOptions()
        resources = _assigned_resources()
        _refuse_idle_gpus(options.backend, resources)
        self.tower = open_same(
            bundle,
            options.tower_sha256,
            threads=max(1, int(resources.get("CPU", 1))),
            backend=options.backend,
            select_layer=options.select_layer,
            select_feature=options.select_feature,
            require_certificate=not options.allow_uncertified,
            check_finite=False,  # each request is checked by itself, before it joins others
        )
        self._dtype = PIXEL_DTYPES[self.tower.bundle.manifest.input.dtype]
        self.name = options.name or self.tower.bundle.path.resolve().name
        self._golden = Golden.read(self.tower.bundle)  # once: what is at its path later says nothing of this engine
        self._engine_is_free = asyncio.Event()
        self._engine_is_free.set()
        self.is_healthy = False
        self._engine = ThreadPoolExecutor(1, "trtower-engine")
        self._preparers = ThreadPoolExecutor(torch.get_num_threads(), "trtower-prepare")
        self._compare()
        self.tower.warmup()
        self._run.set_max_batch_size(self.tower.bundle.manifest.batch.max)
        self._run.set_batch_wait_timeout_s(options.batch_wait_ms / 1000)
        logger.info("%s runs on %s", self.name, self.tower.backend)

    async def __call__(self, pixel_values: Any) -> Any:
        """Turn prepared pictures (B, 3, S, S) into features (B, N, D) on the CPU.

        An array gives an array, and a tensor a tensor. B is at most the largest batch of the bundle's profiles.

        Raises:
            InputError: The pictures have another shape, or a dtype that the tower does not take, or hold NaN.
            UnhealthyError: The engine's last check failed.
        """
        if isinstance(pixel_values, torch.Tensor):
            return await self.infer(pixel_values)
        return as_array(await self.infer(as_tensor(pixel_values)))

    async def encode(self, pictures: Sequence[bytes]) -> torch.Tensor:
        """Turn encoded pictures, such as the bytes of JPEGs, into features (B, N, D) on the CPU.

        Raises InputError, which names the picture by its place, and what `__call__` raises.
        """
        self._refuse_many(len(pictures), IMAGE)
        loop = asyncio.get_running_loop()
        with no_limit_of_pillow():
            prepared = await asyncio.gather(
                *(loop.run_in_executor(self._preparers, self._prepare, each) for each in enumerate(pictures))
            )
        return await self.infer(joined(prepared))

    async def infer(self, images: torch.Tensor) -> torch.Tensor:
        """Turn prepared pictures into features, together with other requests."""
        self._refuse_unhealthy()
        manifest = self.tower.bundle.manifest
        self._refuse_many(len(images) if images.ndim else 0, PIXEL_VALUES)
        if images.shape[1:] != manifest.input.row:
            expected = ", ".join(map(str, ("B", *manifest.input.row)))
            raise InputError(f"{PIXEL_VALUES} has shape {tuple(images.shape)}; expected ({expected})")
        if images.dtype != torch.uint8 if self._dtype == torch.uint8 else not images.is_floating_point():
            raise InputError(f"{PIXEL_VALUES} is {images.dtype}; expected {manifest.input.dtype}")
        images = images.to("cpu", self._dtype)
        if images.is_floating_point() and not bool(images.isfinite().all()):
            raise InputError(f"{PIXEL_VALUES} holds NaN or infinity, as {manifest.input.dtype}")
        await self._engine_is_free.wait()  # so that all who wait become one batch: Ray would close several meanwhile
        features: torch.Tensor = await self._run(images)
        return features

    async def check_health(self) -> None:
        """Compare the engine with the bundle's golden answers; Ray replaces a replica that keeps failing."""
        await self._in_engine(self._compare)

    def __del__(self) -> None:
        """Free the engine. Ray calls this when it has waited for the requests in flight."""
        if hasattr(self, "_engine"):
            self._engine.shutdown()
            self._preparers.shutdown()
            self.tower.close()

    @serve.batch(batch_size_fn=lambda requests: sum(map(len, requests)))  # type: ignore[untyped-decorator]
    async def _run(self, requests: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run several requests as one batch."""
        self._engine_is_free.clear()
        try:
            features = await self._in_engine(self._encode, torch.cat([*requests]))
        finally:
            self._engine_is_free.set()
        # Copies: a view would be sent with all that it is a view of, which is other clients'.
        return [each.clone() for each in features.split([*map(len, requests)])]

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        """Run the engine, in its thread, unless its last check failed."""
        self._refuse_unhealthy()
        return self.tower.run_prepared(images).cpu()

    async def _in_engine(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._engine, work, *args)

    def _compare(self) -> None:
        """Raise BackendError if the engine's answers are wrong; then no request is answered until they are right."""
        if (runner := self.tower.runner) is None:
            raise BackendError(f"{self.name} is closed.")
        try:
            refuse_wrong(self.tower.bundle, runner, self._golden)
        except Exception:
            self.is_healthy = False
            raise
        self.is_healthy = True

    def _prepare(self, picture: tuple[int, bytes]) -> torch.Tensor:
        place, content = picture
        try:
            with open_encoded(content) as image:
                return prepare(self.tower.image_processor, image)
        except (InputError, OSError) as err:
            raise InputError(f"{IMAGE}[{place}]: {describe(err)}") from err

    def _refuse_unhealthy(self) -> None:
        if not self.is_healthy:
            raise UnhealthyError(f"{self.name} failed its last check, and is being replaced")

    def _refuse_many(self, count: int, name: str) -> None:
        most = self.tower.bundle.manifest.batch.max
        if not 1 <= count <= most:
            raise InputError(f"{name} holds {count} pictures; a request may have 1 to {most}: send several requests")


def as_tensor(array: Any) -> torch.Tensor:
    """Return an array as a tensor, without copying it where torch may write to it."""
    try:
        return torch.from_numpy(array if array.flags.writeable else array.copy())
    except (TypeError, AttributeError) as err:
        found = getattr(array, "dtype", type(array).__name__)
        raise InputError(f"{PIXEL_VALUES} is {found}; expected an array or a tensor of numbers") from err


def _assigned_resources() -> Mapping[str, float]:
    try:
        resources: Mapping[str, float] = ray.get_runtime_context().get_assigned_resources()
    except AssertionError as err:  # Ray's own, in a process that is no worker
        raise ConfigError("a TowerDeployment runs in replicas of Ray only, not in Serve's local testing mode.") from err
    return resources


def _refuse_idle_gpus(backend: str, resources: Mapping[str, float]) -> None:
    """Raise ConfigError if the tower would run on a CPU only because nobody asked Ray for a GPU."""
    if backend == "auto" and not resources.get("GPU") and ray.cluster_resources().get("GPU"):
        raise ConfigError(
            "the cluster has GPUs, and this replica was given none: set num_gpus, such as 0.5, in ray_actor_options, "
            "or name a backend that runs on a CPU."
        )
