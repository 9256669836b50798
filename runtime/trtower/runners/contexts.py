"""What one call of a TensorRT engine needs on the GPU: scratch memory, and contexts that share it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from trtower.errors import BackendError
from trtower.runners.slot import Launch, Shared, Slot


@dataclass(kw_only=True)
class SharedEngine(Shared):
    """What the slots of an engine share.

    ``make_context`` returns None if TensorRT has no memory for a context. ``names`` are those of the input and output
    tensors.
    """

    make_context: Callable[[], Any]
    scratch_bytes: int
    names: tuple[str, str]


class ContextSlot(Slot):
    """A slot with one context for each profile and each graph, so that no other call changes what a graph captured.

    The contexts share one block of scratch memory, because no two of them run at once. Torch allocates the block, so it
    can reuse memory that the program has freed. Raises BackendError if there is not enough memory.
    """

    def __init__(self, shared: SharedEngine) -> None:
        self._engine = shared
        try:
            self._scratch = allocate(shared.scratch_bytes, shared.device)
        except torch.OutOfMemoryError as err:
            raise BackendError(
                f"no room for an execution context on {shared.device}; it needs {shared.scratch_bytes} bytes of GPU "
                "memory."
            ) from err
        here = torch.cuda.current_stream(shared.device)
        self._contexts = [self._new_context(index, here.cuda_stream) for index in range(len(shared.profiles))]
        super().__init__(shared)

    def launch(self, images: torch.Tensor, features: torch.Tensor, stream: Any) -> None:
        """See Slot.launch."""
        self._launch(self._contexts[self._profile_for(len(images))], images, features, stream)

    def prepare_capture(self, batch: int, stream: Any) -> Launch:
        """See Slot.prepare_capture."""
        return partial(self._launch, self._new_context(self._profile_for(batch), stream.cuda_stream))

    def close(self) -> None:
        """See Slot.close."""
        super().close()
        self._contexts.clear()
        del self._scratch

    def _profile_for(self, batch: int) -> int:
        """Return the index of the profile tuned nearest to a batch size; of two equally near, the narrower."""
        profiles = self._engine.profiles
        fitting = [
            (abs(each.opt - batch), each.max - each.min, index)
            for index, each in enumerate(profiles)
            if each.min <= batch <= each.max
        ]
        if not fitting:
            raise BackendError(f"no profile of the plan accepts {batch} images; its profiles are {profiles}.")
        return min(fitting)[-1]

    def _new_context(self, profile: int, stream: int) -> Any:
        shared = self._engine
        context = shared.make_context()
        if context is None:
            raise BackendError(
                f"could not create an execution context on {shared.device}: not enough GPU memory besides its "
                f"{shared.scratch_bytes} bytes of scratch memory; TensorRT's reason is in the log."
            )
        context.set_device_memory(self._scratch.data_ptr(), shared.scratch_bytes)
        if profile and not context.set_optimization_profile_async(profile, stream):
            raise BackendError(f"could not select profile {profile} of the plan; TensorRT's reason is in the log.")
        return context

    def _launch(self, context: Any, images: torch.Tensor, features: torch.Tensor, stream: Any) -> None:
        inputs, outputs = self._engine.names
        accepted = (
            context.set_input_shape(inputs, tuple(images.shape))
            and context.set_tensor_address(inputs, images.data_ptr())
            and context.set_tensor_address(outputs, features.data_ptr())
            and context.execute_async_v3(stream.cuda_stream)
        )
        if not accepted:
            raise BackendError(f"TensorRT could not run a batch of {tuple(images.shape)}; its reason is in the log.")


def allocate(size: int, device: torch.device) -> torch.Tensor:
    """Allocate bytes of GPU memory, aligned as TensorRT needs."""
    return torch.empty(max(size, 1), dtype=torch.uint8, device=device)
