"""The entrants of a race: the bundle, LLaVA's eager tower, and other ways to run the cut tower on this device."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trtower import VisionTower
from trtower.bundle.bundle import Bundle
from trtower.bundle.manifest import PREPROCESSOR
from trtower.dtypes import DTYPES, PIXEL_DTYPES
from trtower.errors import BackendError
from trtower.flavour import FLAVOURS
from trtower.runners import choose
from trtower.runners.base import EngineOptions, Runner
from trtower.runners.processor import multiplies_bf16
from trtower.runners.race import draw_inputs
from trtower.spec import BY_DTYPE, PRECISIONS
from trtower.tower.image_processor import ImageProcessor
from trtower_export.bench.results import COMPILED
from trtower_export.check.certify import check_weights
from trtower_export.checkpoint.checkpoint import Checkpoint
from trtower_export.graph.pixels import PixelsFromBytes
from trtower_export.graph.reference import UncutTower
from trtower_export.graph.truncate import TruncatedTower

TRTOWER, LLAVA = "trtower", "llava"

PYTORCH = ("eager", "sdpa", "sdpa-bf16", "compile", "compile-bf16", "cudagraph")
"""The ways of running the cut tower in PyTorch."""


def competitors() -> tuple[str, ...]:
    """List the competitors besides LLaVA's tower: PyTorch, and the bundle's own graph on each backend.

    A CPU backend and its CUDA counterpart are one competitor.
    """
    graph = [each for each in choose.BACKENDS if each.name not in FLAVOURS]
    compiled = {f"{each.common_name}{COMPILED}" for each in graph if each.compiles}
    return (*PYTORCH, *sorted({each.common_name for each in graph} | compiled))


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One way to compute features of images. ``backend`` is trtower's name for the backend, None for PyTorch."""

    name: str
    runs_on: str
    arithmetic: str
    backend: str | None
    prepare: Callable[[Tensor], Tensor]
    call: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Arena:
    """What entrants share: the bundle, loaded (``ran``), and the full model and the cut tower in FP32."""

    bundle: Bundle
    ran: VisionTower | None
    uncut: UncutTower
    cut: TruncatedTower
    device: torch.device

    @classmethod
    def open(cls, bundle: Bundle, checkpoint: Checkpoint, backend: str = "auto") -> "Arena":
        """Load everything.

        Raises BackendError if the bundle cannot run here, CheckpointError if it was exported from other weights.
        """
        ran = VisionTower.load(bundle.path, backend)
        arena = cls.open_torch(bundle, checkpoint, ran.device)
        check_weights(arena.uncut, bundle.manifest)
        return replace(arena, ran=ran)

    @classmethod
    def open_torch(cls, bundle: Bundle, checkpoint: Checkpoint, device: torch.device) -> "Arena":
        """Load only what PyTorch runs, not the bundle."""
        uncut = UncutTower.load(checkpoint, bundle.manifest.spec)
        return cls(bundle=bundle, ran=None, uncut=uncut, cut=uncut.cut(), device=device)

    @property
    def tower(self) -> VisionTower:
        """The loaded bundle."""
        assert self.ran is not None  # noqa: S101 - None only in a process that times PyTorch
        return self.ran

    def draw(self, batch: int) -> Tensor:
        """Draw random images on the device."""
        return draw_inputs(self.bundle.manifest, batch).to(self.device)

    def for_bundle(self, images: Tensor) -> Tensor:
        """Cast images that `draw_inputs` drew to what the engine takes."""
        return images.to(PIXEL_DTYPES[self.bundle.manifest.input.dtype])

    def for_torch(self, images: Tensor) -> Tensor:
        """Prepare images that `draw_inputs` drew for PyTorch, which takes floats (B, 3, S, S)."""
        spec = self.bundle.manifest.spec
        if spec.takes_floats:
            return images
        processor = ImageProcessor.from_file(self.bundle.verify(PREPROCESSOR))
        prepared: Tensor = PixelsFromBytes(processor, spec.layout).to(images.device)(images)
        return prepared

    @torch.no_grad()
    def reference(self, images: Tensor) -> Tensor:
        """Return the features of the cut tower in FP32, (B, N, D), for images that `draw_inputs` drew."""
        images = self.for_torch(images).to(next(self.cut.parameters()).device, torch.float32)
        features: Tensor = self.cut(images)
        return self.tokens(features).to(self.device)

    def tokens(self, hidden_states: Tensor) -> Tensor:
        """Keep the same tokens as the bundle's feature, (B, P + N, D) -> (B, N, D); a head has chosen already."""
        spec = self.bundle.manifest.spec
        if spec.head:
            return hidden_states
        return hidden_states[:, spec.first_token(spec.select_feature) :]

    @property
    def precision(self) -> str:
        """PyTorch's precision: the bundle's dtype on a GPU, FP32 on a CPU, where its FP16 takes many times as long."""
        return "fp32" if self.device.type == "cpu" else BY_DTYPE[self.bundle.manifest.output.dtype].name


def runner_of(tower: VisionTower) -> Runner:
    """Return the runner of a loaded tower."""
    runner = tower.runner
    assert runner is not None  # noqa: S101 - a loaded tower has one
    return runner


def enter(arena: Arena, name: str) -> Entrant:
    """Create an entrant; raise BackendError with the reason if it cannot run here."""
    if name == TRTOWER:
        return _enter_bundle(arena, name, arena.tower)
    if name == LLAVA:
        return _enter_torch(arena, name, arena.precision, _llava(arena))
    if name not in PYTORCH:
        compiled = name.endswith(COMPILED)
        named = [each for each in choose.BACKENDS if each.common_name == name.removesuffix(COMPILED)]
        backend = next((each for each in named if each.kind == arena.device.type), named[0]).name
        if runner_of(arena.tower).backend == backend and not compiled:
            raise BackendError("the bundle itself already runs on this backend here")
        engine = EngineOptions(compile=compiled)
        return _enter_bundle(arena, name, VisionTower.load(arena.bundle.path, backend, arena.device, engine=engine))
    kind, _, suffix = name.partition("-")
    precision = suffix or arena.precision
    if suffix and arena.device.type == "cuda":
        raise BackendError(f"on a GPU PyTorch runs only in the bundle's own dtype, {arena.precision}")
    if suffix and not multiplies_bf16():
        raise BackendError("this processor has no BF16 arithmetic")
    if kind == "cudagraph" and arena.device.type != "cuda":
        raise BackendError("CUDA graphs need a GPU")
    copied: Any = _copy_of(arena, precision)
    copied.model.config._attn_implementation = "eager" if kind == "eager" else "sdpa"
    tower: Callable[[Tensor], Tensor] = copied.cut()
    if kind == "compile":
        from torch._inductor import select_algorithm

        select_algorithm.PRINT_AUTOTUNE = False  # on a GPU it prints pages of candidates, which bury the result
        tower = torch.compile(tower, mode="max-autotune", dynamic=False)
    if kind == "cudagraph":
        tower = _captured(tower)
    return _enter_torch(arena, name, precision, tower)


def _enter_bundle(arena: Arena, name: str, tower: VisionTower) -> Entrant:
    runner = runner_of(tower)
    return Entrant(
        name=name,
        runs_on=runner.name,
        arithmetic=choose.find_backend(runner.backend).computes_in(arena.bundle.manifest.precision),
        backend=runner.backend,
        prepare=arena.for_bundle,
        call=tower,
    )


def _enter_torch(arena: Arena, name: str, precision: str, tower: Callable[[Tensor], Tensor]) -> Entrant:
    dtype = DTYPES[PRECISIONS[precision].dtype]

    @torch.no_grad()
    def call(images: Tensor) -> Tensor:
        return arena.tokens(tower(images))

    return Entrant(
        name=name,
        runs_on=f"PyTorch {torch.__version__}",
        arithmetic=precision,
        backend=None,
        prepare=lambda images: arena.for_torch(images).to(dtype),
        call=call,
    )


def _llava(arena: Arena) -> Callable[[Tensor], Tensor]:
    """Run as LLaVA's tower does: every layer runs, every state is kept, the selected ones are read."""
    copied = _copy_of(arena, arena.precision)

    def run(images: Tensor) -> Tensor:
        return copied.read(copied.checkpoint.family.read_states(copied.model, images))

    return run


def _copy_of(arena: Arena, precision: str) -> UncutTower:
    """Copy the uncut tower to the device in ``precision``; on a CPU in the same dtype, the copy shares the weights."""
    uncut = arena.uncut
    both = nn.ModuleList([uncut.model, uncut.head or nn.Identity()])
    dtype = DTYPES[PRECISIONS[precision].dtype]
    if arena.device.type != "cpu" or dtype != next(both.parameters()).dtype:
        model, head = copy.deepcopy(both).to(arena.device, dtype)
    else:
        model, head = copy.deepcopy(both, {id(each): each for each in (*both.parameters(), *both.buffers())})
    return replace(uncut, model=model, head=head if uncut.head else None)


def _captured(tower: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Replay PyTorch's own CUDA graphs, one for each batch, each with its own inputs and outputs."""
    graphs: dict[int, tuple[Any, Tensor, Tensor]] = {}

    def run(images: Tensor) -> Tensor:
        if len(images) not in graphs:
            inputs = images.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    tower(inputs)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                features = tower(inputs)
            graphs[len(images)] = (graph, inputs, features)
        graph, inputs, features = graphs[len(images)]
        inputs.copy_(images)
        graph.replay()
        return features

    return run
