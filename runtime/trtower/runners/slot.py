"""What one engine call needs on the GPU: scratch memory, contexts that share it, and captured CUDA graphs."""

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from trtower.errors import BackendError
from trtower.runners.base import OnStart
from trtower.spec import BatchProfile, profile_batches

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Shared:
    """What the slots of an engine share: how to make contexts, and whether and in which stream to capture graphs.

    ``make_context`` returns None if TensorRT has no memory for a context. ``names`` are those of the input and output
    tensors. ``captures`` says whether CUDA graphs are captured; it turns False as soon as any capture fails.

    Only one call at a time captures, in a stream that nothing else uses: work that another thread queued there during
    the capture would become part of the graph.
    """

    make_context: Callable[[], Any]
    scratch_bytes: int
    profiles: Sequence[BatchProfile]
    names: tuple[str, str]
    device: torch.device
    captures: bool

    def __post_init__(self) -> None:
        self.turn = threading.Lock()
        # Torch may hand out a stream twice. Few programs use high-priority ones, so this one is probably not shared.
        self.stream: Any = torch.cuda.Stream(self.device, priority=-1) if self.captures else None


class Slot:
    """Serves one call at a time. Its calls follow one another on the GPU, whatever streams they come from.

    Every profile and every graph has its own context, so that no other call changes what a graph captured. The contexts
    share one block of scratch memory, because no two of them run at once. Torch allocates the block, so it can reuse
    memory that the program has freed. ``stream`` is the handle of the stream that last used the slot, or None.
    Raises BackendError if there is not enough memory.
    """

    def __init__(self, shared: Shared) -> None:
        self.stream: int | None = None
        self._shared = shared
        self._to_capture = profile_batches(shared.profiles)
        try:
            self._scratch = allocate(shared.scratch_bytes, shared.device)
        except torch.OutOfMemoryError as err:
            raise BackendError(
                f"no room for an execution context on {shared.device}; it needs {shared.scratch_bytes} bytes of GPU "
                "memory."
            ) from err
        here = torch.cuda.current_stream(shared.device)
        self._graphs: dict[int, Graph] = {}
        self._contexts = [self._new_context(index, here.cuda_stream) for index in range(len(shared.profiles))]
        # Torch may reuse memory that this stream is still using, which is safe only in this stream. Calls come in other
        # streams, so the first one waits for this event.
        self._last_use = torch.cuda.Event()
        self._last_use.record(here)

    def enqueue(
        self, images: torch.Tensor, features: torch.Tensor, stream: Any, on_start: OnStart | None = None
    ) -> None:
        """Queue a call in ``stream``, after the slot's previous call; raise BackendError if TensorRT refuses it."""
        stream.wait_event(self._last_use)
        try:
            if on_start:
                on_start(stream)
            if graph := self._graph_for(images, features, stream):
                graph.replay(images, features, stream)
            else:
                self._launch(self._contexts[self._profile_for(len(images))], images, features, stream.cuda_stream)
        finally:
            self._last_use.record(stream)
            self.stream = stream.cuda_stream

    def close(self) -> None:
        """Wait for the last call, then free everything."""
        self._last_use.synchronize()
        self._graphs.clear()
        self._contexts.clear()
        del self._scratch

    def _graph_for(self, images: torch.Tensor, features: torch.Tensor, stream: Any) -> "Graph | None":
        """Return the graph for this batch size, captured now if it is new; None if the call runs without one."""
        batch, shared = len(images), self._shared
        if shared.captures and batch in self._to_capture and batch not in self._graphs:
            with shared.turn:
                try:
                    if shared.captures:
                        self._graphs[batch] = self._capture_graph(images, features, stream)
                except (RuntimeError, BackendError) as err:  # CUDA, or torch if memory is full, raises RuntimeError
                    shared.captures = False
                    message = "CUDA graphs are off, and calls are launched without them: capturing batch %d failed: %s"
                    logger.warning(message, batch, err)
        return self._graphs.get(batch)

    def _capture_graph(self, images: torch.Tensor, features: torch.Tensor, stream: Any) -> "Graph":
        """Capture a call on new tensors, after what is already in ``stream`` and before what enters it next."""
        private = self._shared.stream
        # The graph also serves calls outside inference mode, where tensors made inside it could not be written to.
        with torch.cuda.stream(private), torch.inference_mode(mode=False):
            private.wait_stream(stream)
            try:
                context = self._new_context(self._profile_for(len(images)), private.cuda_stream)
                inputs, outputs = torch.zeros_like(images), torch.empty_like(features)
                # TensorRT requires that the first call with a shape is not captured.
                self._launch(context, inputs, outputs, private.cuda_stream)
                graph = torch.cuda.CUDAGraph()
                with _no_collection():
                    graph.capture_begin(capture_error_mode="thread_local")
                    try:
                        self._launch(context, inputs, outputs, private.cuda_stream)
                    finally:
                        graph.capture_end()
            except BaseException:
                private.synchronize()  # before the context is freed
                raise
            finally:
                stream.wait_stream(private)
        return Graph(graph, context, inputs, outputs)

    def _profile_for(self, batch: int) -> int:
        """Return the index of the profile tuned nearest to a batch size; of two equally near, the narrower."""
        profiles = self._shared.profiles
        fitting = [
            (abs(each.opt - batch), each.max - each.min, index)
            for index, each in enumerate(profiles)
            if each.min <= batch <= each.max
        ]
        if not fitting:
            raise BackendError(f"no profile of the plan accepts {batch} images; its profiles are {profiles}.")
        return min(fitting)[-1]

    def _new_context(self, profile: int, stream: int) -> Any:
        shared = self._shared
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

    def _launch(self, context: Any, images: torch.Tensor, features: torch.Tensor, stream: int) -> None:
        inputs, outputs = self._shared.names
        accepted = (
            context.set_input_shape(inputs, tuple(images.shape))
            and context.set_tensor_address(inputs, images.data_ptr())
            and context.set_tensor_address(outputs, features.data_ptr())
            and context.execute_async_v3(stream)
        )
        if not accepted:
            raise BackendError(f"TensorRT could not run a batch of {tuple(images.shape)}; its reason is in the log.")


class Graph:
    """A captured call with its own tensors: a graph only reads and writes the addresses that it captured."""

    def __init__(self, graph: Any, context: Any, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        self._graph, self._context, self._inputs, self._outputs = graph, context, inputs, outputs

    def replay(self, images: torch.Tensor, features: torch.Tensor, stream: Any) -> None:
        """Run the call on ``images``, at the cost of two copies on the GPU."""
        with torch.cuda.stream(stream):
            self._inputs.copy_(images)
            self._graph.replay()
            features.copy_(self._outputs)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause Python's garbage collection: freeing an object may wait for the GPU, which ends a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def allocate(size: int, device: torch.device) -> torch.Tensor:
    """Allocate bytes of GPU memory, aligned as TensorRT needs."""
    return torch.empty(max(size, 1), dtype=torch.uint8, device=device)
