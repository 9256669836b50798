"""Hash a tower's weights, so that a bundle can recognise the tower that it was exported from.

Models often hold their weights in another dtype than the checkpoint: FP32 is served in FP16, FP16 in BF16. A hash of
the stored numbers would miss those towers, so a bundle holds one hash per dtype that a tower may be rounded to.
"""

import atexit
import hashlib
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor, nn

from trtower.dtypes import DTYPES
from trtower.spec import Naming, TowerSpec


def count_layers(tower: Any, naming: Naming) -> int:
    """Count the layers of a transformers vision model, which may be fewer than its config says."""
    indices = (naming.find_layer(name) for name, _ in tower.named_parameters())
    return 1 + max((index for index in indices if index is not None), default=-1)


def hash_later(tower: nn.Module, spec: TowerSpec) -> Future[dict[str, str]]:
    """Hash the weights that ``spec`` reads, in every dtype, in a background thread; return a future of the hashes.

    ``tower`` is the full vision model of transformers. It may be cast or moved while the thread runs: the hashes are of
    the weights at the time of this call. If the process ends first, the thread stops after the current parameter, and
    the future is cancelled.
    """
    parameters = [parameter.detach() for parameter in read_parameters(tower, spec)]  # keeps the present values
    future: Future[dict[str, str]] = Future()

    def hash_each() -> None:
        digests: dict[str, list[str]] = {name: [] for name in DTYPES}
        try:
            while parameters and not future.cancelled():
                parameter = parameters.pop()  # freed once it is hashed
                for name, dtype in DTYPES.items():
                    digests[name].append(_digest(parameter, dtype))
        except BaseException as err:  # noqa: BLE001 - result() raises it
            if future.set_running_or_notify_cancel():
                future.set_exception(err)
        else:
            if future.set_running_or_notify_cancel():
                future.set_result({name: _join(each) for name, each in digests.items()})
        finally:
            del _HASHING[future]

    _HASHING[future] = threading.Thread(target=hash_each, daemon=True)
    _HASHING[future].start()
    return future


_HASHING: dict[Future[dict[str, str]], threading.Thread] = {}
"""The futures of `hash_later` that are not done, and their threads."""


@atexit.register
def _stop_hashing() -> None:
    """Stop the threads before Python does: one that is still in torch then aborts the process (SIGABRT)."""
    for future, thread in list(_HASHING.items()):
        future.cancel()
        thread.join()


def weights_sha256(parameters: Iterable[Tensor], dtype: torch.dtype = torch.float32) -> str:
    """Hash weights, rounded to ``dtype``, independently of their names.

    The result is the sha256 of the sorted sha256 of each parameter's shape and bytes. Names are left out because they
    changed between releases of transformers. Values did not, except in DINOv2's SwiGLU: 5.x splits one tensor in two.
    """
    return _join([_digest(parameter, dtype) for parameter in parameters])


def _digest(parameter: Tensor, dtype: torch.dtype) -> str:
    digest = hashlib.sha256(str(tuple(parameter.shape)).encode())
    digest.update(parameter.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _join(digests: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def read_parameters(tower: Any, spec: TowerSpec) -> Iterator[Tensor]:
    """Return the parameters of a transformers vision model that the hidden states in ``spec`` depend on.

    Only parameters known to be irrelevant are left out, so anything that was added to the tower counts.
    """
    return (parameter for name, parameter in tower.named_parameters() if spec.reads(name))
