"""Who races: the bundle, LLaVA's eager tower, and what else could run the cut tower on this device."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trtower import VisionTower
from trtower.bundle.bundle import Bundle
from trtower.dtypes import DTYPES
from trtower.errors import BackendError
from trtower.flavour import FLAVOURS
from trtower.runners import choose
from trtower.runners.base import Backend, Runner
from trtower.spec import BY_DTYPE, PRECISIONS
from trtower_export.bench.environment import multiplies_bf16
from trtower_export.check.certify import check_weights
from trtower_export.checkpoint.checkpoint import Checkpoint
from trtower_export.graph.truncate import TruncatedTower, truncate

TRTOWER, LLAVA = "trtower", "llava"

PYTORCH = ("eager", "sdpa", "sdpa-bf16", "compile", "compile-bf16", "cudagraph")
"""The ways in which PyTorch can run the cut tower."""


def competitors() -> tuple[str, ...]:
    """List whom a bundle is raced against besides LLaVA's tower: PyTorch, and its own graph on each backend.

    A backend for the CPU and its counterpart for CUDA are one competitor.
    """
    return (*PYTORCH, *sorted({_competitor(each) for each in choose.BACKENDS if each.name not in FLAVOURS}))


def _competitor(backend: Backend) -> str:
    return backend.name.removesuffix(f"-{backend.kind}")


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """Something that makes features of images. ``backend`` is trtower's name for it, None of PyTorch's."""

    name: str
    runs_on: str
    arithmetic: str
    backend: str | None
    prepare: Callable[[Tensor], Tensor]
    call: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Arena:
    """What the entrants are made of: the bundle, loaded (``ran``), and the full model and the cut tower in FP32."""

    bundle: Bundle
    ran: VisionTower | None
    model: nn.Module
    cut: TruncatedTower
    checkpoint: Checkpoint
    device: torch.device

    @classmethod
    def open(cls, bundle: Bundle, checkpoint: Checkpoint, backend: str = "auto") -> "Arena":
        """Load all of it.

        Raises BackendError where the bundle cannot run here, CheckpointError where it is not of these weights.
        """
        ran = VisionTower.load(bundle.path, backend)
        arena = cls.open_torch(bundle, checkpoint, ran.device)
        check_weights(arena.model, bundle.manifest, checkpoint.source)
        return replace(arena, ran=ran)

    @classmethod
    def open_torch(cls, bundle: Bundle, checkpoint: Checkpoint, device: torch.device) -> "Arena":
        """Load what PyTorch runs, and not the bundle."""
        model = checkpoint.load_model(bundle.manifest.spec)
        cut = truncate(model, checkpoint.family, bundle.manifest.spec)
        return cls(bundle=bundle, ran=None, model=model, cut=cut, checkpoint=checkpoint, device=device)

    @property
    def tower(self) -> VisionTower:
        """The bundle, loaded."""
        assert self.ran is not None  # noqa: S101 - only a process that times PyTorch alone is without it
        return self.ran

    @torch.no_grad()
    def reference(self, images: Tensor) -> Tensor:
        """Give the features of the cut tower in FP32, (B, N, D)."""
        features: Tensor = self.cut(images.to(next(self.cut.parameters()).device, torch.float32))
        return self.tokens(features).to(self.device)

    def tokens(self, hidden_states: Tensor) -> Tensor:
        """Keep the tokens that the bundle's feature does: (B, P + N, D) -> (B, N, D)."""
        spec = self.bundle.manifest.spec
        return hidden_states[:, spec.first_token(spec.select_feature) :]

    @property
    def precision(self) -> str:
        """What PyTorch runs in: on a GPU the bundle's dtype, on a CPU FP32: its FP16 takes many times as long."""
        return "fp32" if self.device.type == "cpu" else BY_DTYPE[self.bundle.manifest.input.dtype].name


def runner_of(tower: VisionTower) -> Runner:
    """Return what runs a loaded tower."""
    runner = tower._runner
    assert runner is not None  # noqa: S101 - it was loaded
    return runner


def enter(arena: Arena, name: str) -> Entrant:
    """Make an entrant; raise BackendError saying why it cannot run here."""
    if name == TRTOWER:
        return _enter_bundle(arena, name, arena.tower)
    if name == LLAVA:
        return _enter_torch(arena, name, arena.precision, _llava(arena))
    if name not in PYTORCH:
        named = [each for each in choose.BACKENDS if _competitor(each) == name]
        backend = next((each for each in named if each.kind == arena.device.type), named[0]).name
        if runner_of(arena.tower).backend == backend:
            raise BackendError("it is what trtower runs here")
        return _enter_bundle(arena, name, VisionTower.load(arena.bundle.path, backend, arena.device))
    kind, _, suffix = name.partition("-")
    precision = suffix or arena.precision
    if suffix and arena.device.type == "cuda":
        raise BackendError(f"on a GPU all of PyTorch is raced in the bundle's own dtype, {arena.precision}")
    if suffix and not multiplies_bf16():
        raise BackendError("this processor has no BF16 products")
    if kind == "cudagraph" and arena.device.type != "cuda":
        raise BackendError("CUDA graphs need a GPU")
    model = _copy_of_model(arena, precision)
    model.config._attn_implementation = "eager" if kind == "eager" else "sdpa"
    tower: Callable[[Tensor], Tensor] = truncate(model, arena.checkpoint.family, arena.bundle.manifest.spec)
    if kind == "compile":
        from torch._inductor import select_algorithm

        select_algorithm.PRINT_AUTOTUNE = False  # on a GPU pages of candidates, in which the result is lost
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
        prepare=lambda images: images.to(tower.dtype),
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
        prepare=lambda images: images.to(dtype),
        call=call,
    )


def _llava(arena: Arena) -> Callable[[Tensor], Tensor]:
    """Do what LLaVA's tower does: run every layer, keep every state, read those that are selected."""
    model = _copy_of_model(arena, arena.precision)
    layers, family = arena.bundle.manifest.spec.layers, arena.checkpoint.family

    def run(images: Tensor) -> Tensor:
        states = family.read_states(model, images)
        return torch.cat([states[layer] for layer in layers], dim=-1)

    return run


def _copy_of_model(arena: Arena, precision: str) -> Any:
    """Copy the model in ``precision`` onto the device; if it is that already, the copy shares its weights."""
    model = arena.model
    dtype = DTYPES[PRECISIONS[precision].dtype]
    if arena.device.type != "cpu" or dtype != next(model.parameters()).dtype:
        return copy.deepcopy(model).to(arena.device, dtype)
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _captured(tower: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Replay PyTorch's own CUDA graphs: one for each batch, with inputs and outputs of its own."""
    graphs: dict[int, tuple[Any, Tensor, Tensor]] = {}

    def run(images: Tensor) -> Tensor:
        if len(images) not in graphs:
            given = images.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    tower(given)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                features = tower(given)
            graphs[len(images)] = (graph, given, features)
        graph, given, features = graphs[len(images)]
        given.copy_(images)
        graph.replay()
        return features

    return run
