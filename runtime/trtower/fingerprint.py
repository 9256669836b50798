"""Tell whether a tower has the weights that a bundle was made of, in whichever dtype it holds them.

A checkpoint in FP32 is served in FP16, and one in FP16 in BF16, so an identity of the stored numbers alone would not
know most towers again. A bundle has one for each dtype that a tower may be rounded to.
"""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

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

    That goes on beside what else the program does, and ``tower`` may be cast meanwhile.
    """
    parameters = [parameter.detach() for parameter in read_parameters(tower, spec)]  # of what is in them now
    executor = ThreadPoolExecutor(max_workers=1)
    future = executor.submit(lambda: {name: weights_sha256(parameters, dtype) for name, dtype in DTYPES.items()})
    executor.shutdown(wait=False)
    return future


def weights_sha256(parameters: Iterable[Tensor], dtype: torch.dtype = torch.float32) -> str:
    """Hash a tower's weights, rounded to ``dtype``, whatever the installed transformers calls them.

    The sha256 of the sorted sha256 of each parameter's shape and bytes: names changed between releases of
    transformers, values did not, but for DINOv2's SwiGLU, whose one tensor became two with 5.x.
    """
    digests = []
    for parameter in parameters:
        digest = hashlib.sha256(str(tuple(parameter.shape)).encode())
        digest.update(parameter.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data)
        digests.append(digest.hexdigest())
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def read_parameters(tower: nn.Module, spec: TowerSpec) -> Iterator[Tensor]:
    """Return the parameters of a full tower of transformers that the states a bundle holds depend on.

    What is known not to be on the way to them is left out, so that whatever was added to a tower counts.
    """
    return (parameter for name, parameter in tower.named_parameters() if spec.reads(name))
