"""A tower as the vision encoder of NVIDIA Dynamo's vLLM worker: what `--custom-encoder-class` names.

    class Encoder(TowerBackend):
        bundle = "/models/llava-1.5-7b-hf"
        image_token_id = 32000
        dtype = torch.float16

Dynamo sends a client the words of a ValueError or TypeError, and of nothing else. So errors of a picture are
InputError, which is a ValueError and names no path of ours, and all that fails in a batch is a RuntimeError.
"""

import asyncio
import base64
import binascii
import importlib
import logging
from collections.abc import Sequence
from typing import Any

import torch

from trtower.bundle.bundle import Bundle
from trtower.errors import ConfigError, InputError, MissingExtraError
from trtower.serving.projected import projector_of
from trtower.tower.encoded import describe, open_encoded
from trtower.tower.prepare import count_threads, prepare
from trtower.tower.vision_tower import VisionTower

try:
    contract: Any = importlib.import_module("dynamo.vllm.multimodal_utils.custom_encoder.backend")
    aiohttp_client = importlib.import_module("dynamo.common.http.aiohttp_client")
    errors: Any = importlib.import_module("dynamo.common.http.base")
    media = importlib.import_module("dynamo.common.http.media_reference")
    urls = importlib.import_module("dynamo.common.http.url_validator")
except ModuleNotFoundError as err:
    raise MissingExtraError(
        f"TowerBackend runs inside Dynamo's vLLM worker, and {err.name} is not installed here: install trtower, with a "
        "backend, into that worker's environment (ai-dynamo[vllm] 1.6 or later)."
    ) from err

logger = logging.getLogger(__name__)

TIMEOUT_S = 30.0
"""How long a picture may take to arrive, as in Dynamo's own loader."""


class TowerBackend(contract.VisionEncoderBackend):  # type: ignore[misc]
    """A bundle with a projector behind Dynamo's `VisionEncoderBackend`. Derive a class, and set what it serves.

    Attributes:
        bundle: The bundle of the model whose language model Dynamo serves, exported with `--head projector`.
        image_token_id: The token that stands for a picture in prompts; Dynamo's linear adapter wants it.
        dtype: The language model's dtype, which Dynamo demands of the features; None keeps the bundle's.
        backend: The backend, as in `VisionTower.load`.
        allow_uncertified: Serve a bundle without a certificate for the backend that runs, and a rehearsal.
        max_batch_cost: Pictures in one batch at most. Default: the most that the bundle's profiles accept.
        preprocess_concurrency: Threads that fetch and prepare pictures. Default: one for each processor, at most 8.

    Raises:
        ConfigError: No bundle is set, or it has no projector.
        BundleError: The folder is no bundle.
    """

    bundle: str = ""
    image_token_id: int | None = None
    dtype: torch.dtype | None = None
    backend: str = "auto"
    allow_uncertified: bool = False
    max_batch_cost: int | None = None
    preprocess_concurrency: int = 0

    def __init__(self) -> None:
        if not self.bundle:
            raise ConfigError(f"{type(self).__name__}.bundle is not set: derive a class, and name the bundle in it.")
        opened = Bundle.open(self.bundle)
        projector_of(opened, "Dynamo")
        most = opened.manifest.batch.max
        self.max_batch_cost = most if self.max_batch_cost is None else self.max_batch_cost
        if not 1 <= self.max_batch_cost <= most:
            raise ConfigError(
                f"max_batch_cost={self.max_batch_cost}; expected 1 to {most}, as in the bundle's profiles."
            )
        self.preprocess_concurrency = self.preprocess_concurrency or count_threads(None)
        self._tower = VisionTower(
            self.bundle,
            backend=self.backend,
            require_certificate=not self.allow_uncertified,
            check_finite=False,  # it prepares all pixels itself
        )

    def build(self, model_id: str) -> None:
        """Load the bundle, and run every batch of its profiles once. ``model_id`` names the language model."""
        self._tower.load_model()
        self._tower.warmup()
        logger.info("the vision tower of %s is %s on %s", model_id, self._tower.bundle.path, self._tower.backend)

    def preprocess(self, raw: str) -> Any:
        """Fetch a picture from its URL, https: or data:, by Dynamo's rules, and prepare it. Raises ValueError."""
        content = _fetch(raw)
        try:
            with open_encoded(content) as image:
                return contract.Preprocessed(item=prepare(self._tower.image_processor, image))
        except (InputError, OSError) as err:
            raise InputError(describe(err)) from err
        except Exception as err:
            logger.exception("a picture could not be prepared")
            raise RuntimeError("a picture could not be prepared") from err

    def forward_batch(self, items: Sequence[torch.Tensor], target_bucket: int | None = None) -> list[torch.Tensor]:
        """Run prepared pictures as one batch; return features (tokens, width) of each on the CPU."""
        try:
            features = _as_dtype(self._tower.run_prepared(torch.cat([*items])), self.dtype)
        except Exception as err:
            logger.exception("the tower failed")
            raise RuntimeError("the vision tower failed") from err
        return [each.clone() for each in features]

    def close(self) -> None:
        """Free the engine."""
        self._tower.close()


def _as_dtype(features: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Return features on the CPU in the language model's dtype; raise ValueError if that cannot hold them."""
    cast = features.to("cpu", dtype)
    if not bool(cast.isfinite().all()):
        raise ValueError(f"features in {features.dtype} are not finite as {cast.dtype}")
    return cast


def _fetch(url: str) -> bytes:
    """Return the bytes behind a URL.

    Raises InputError, or what Dynamo itself tells clients of: a ValueError of its rules, or an HttpStatusError.
    """
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        return _decode(url)
    if scheme not in ("http", "https"):
        raise InputError("an image must be an https: or a data: URL")
    return asyncio.run(_download(url))


def _decode(url: str) -> bytes:
    asyncio.run(urls.validate_url(url, urls.UrlValidationPolicy.from_env()))  # limits its length
    kind, _, content = url.partition(",")
    if not kind.endswith(";base64"):
        raise InputError("a data: URL of an image must be in base64")
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as err:
        raise InputError("a data: URL holds no base64") from err


async def _download(url: str) -> bytes:
    client = aiohttp_client.AiohttpClient()  # Dynamo's own is bound to the loop of its worker
    try:
        policy = urls.UrlValidationPolicy.from_env()
        content: bytes = await client.fetch_bytes(url, TIMEOUT_S, policy=policy, max_bytes=media.max_media_bytes())
    except (errors.HttpConnectionError, errors.HttpTimeoutError) as err:
        raise InputError("the image could not be fetched from its URL") from err
    finally:
        await client.close()
    return content
