"""Tell whether a tower has the weights that a bundle was made of, in whichever dtype it holds them.

A checkpoint in FP32 is served in FP16, and one in FP16 in BF16, so an identity of the stored numbers alone would not
know most towers again. A bundle has one for each dtype that a tower may be rounded to.
"""

import hashlib
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future

import torch
from torch import Tensor, nn

from trtower.dtypes import DTYPES
from trtower.spec import Naming, TowerSpec


def count_layers(tower: nn.Module, naming: Naming) -> int:
    """Count the transformer layers of a full tower of transformers, which may be fewer than its config says."""
    found = (naming.find_layer(name) for name, _ in tower.named_parameters())
    return 1 + max((layer for layer in found if layer is not None), default=-1)


def hash_later(tower: nn.Module, spec: TowerSpec) -> Future[dict[str, str]]:
    """Begin to hash what ``spec`` reads of a full tower of transformers, in every dtype, as a manifest has it.

    It goes on beside what else the program does, which may cast ``tower`` meanwhile, and ends with the program.
    """
    parameters = [parameter.detach() for parameter in read_parameters(tower, spec)]  # what is in them now
    future: Future[dict[str, str]] = Future()

    def hash_each() -> None:
        digests: dict[str, list[str]] = {name: [] for name in DTYPES}
        try:
            while parameters:  # each is let go of once it is hashed
                parameter = parameters.pop()
                for name, dtype in DTYPES.items():
                    digests[name].append(_digest(parameter, dtype))
            future.set_result({name: _join(each) for name, each in digests.items()})
        except BaseException as err:  # noqa: BLE001 - raised where the result is asked for
            future.set_exception(err)

    threading.Thread(target=hash_each, daemon=True).start()
    return future


def weights_sha256(parameters: Iterable[Tensor], dtype: torch.dtype = torch.float32) -> str:
    """Hash a tower's weights, rounded to ``dtype``, whatever the installed transformers calls them.

    The sha256 of the sorted sha256 of each parameter's shape and bytes: names changed between releases of
    transformers, values did not, but for DINOv2's SwiGLU, whose one tensor became two with 5.x.
    """
    return _join([_digest(parameter, dtype) for parameter in parameters])


def _digest(parameter: Tensor, dtype: torch.dtype) -> str:
    digest = hashlib.sha256(str(tuple(parameter.shape)).encode())
    digest.update(parameter.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _join(digests: list[str]) -> str:
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def read_parameters(tower: nn.Module, spec: TowerSpec) -> Iterator[Tensor]:
    """Return the parameters of a full tower of transformers that the states a bundle holds depend on.

    What is known not to be on the way to them is left out, so that whatever was added to a tower counts.
    """
    return (parameter for name, parameter in tower.named_parameters() if spec.reads(name))
