"""Find the vision tower in a loaded model.

Models of transformers hold a vision model of transformers directly. LLaVA, VILA and tinychat hold it inside a wrapper.
So the vision model is what to look for; in OpenVLA, which has none, its vision backbone. Everything around it stays as
it is, including every member of a wrapper that model code touches.
"""

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from trtower.errors import ConfigError
from trtower.installation.prismatic import PrismaticView, for_backbone, for_engine, is_prismatic, pictures_of
from trtower.tower.vision_model import VisionModel
from trtower.tower.vision_tower import VisionTower


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A module of a model (``module``), such as its vision tower, and every place that holds it.

    ``paths`` are all its names; messages use the first. ``slots`` are the dicts and lists that hold it, each with its
    key. ``holder`` is the module around it. ``made_of`` is the vision config in the bundle that is to replace a tower.
    """

    module: Any
    paths: list[str]
    slots: list[tuple[Any, Any]]
    holder: nn.Module
    made_of: Mapping[str, Any] = field(default_factory=dict)

    @property
    def vision(self) -> Any:
        """The tower as a vision model of transformers."""
        return PrismaticView(self.module) if is_prismatic(self.module) else self.module

    def for_tower(self, pixel_values: Tensor) -> Tensor:
        """Return what the tower takes for an engine's pixels."""
        return for_backbone(pixel_values, self.made_of, pictures_of(self.module))

    def for_engine(self, pixel_values: Tensor) -> Tensor:
        """Return the engine's pixels of those that the tower is given."""
        return for_engine(pixel_values, self.made_of, pictures_of(self.module))

    @property
    def path(self) -> str:
        """The name of the place, such as "model.vision_tower"."""
        return self.paths[0]

    @property
    def installation(self) -> Any:
        """The `Installation` of the bundle that is here; None for an eager tower."""
        return vars(self.module).get("installation")

    def put(self, module: nn.Module) -> None:
        """Put another module into every slot; if one fails, restore the others."""
        with ExitStack() as undo:
            for container, key in self.slots:
                before = container[key]
                container[key] = module
                undo.callback(container.__setitem__, key, before)
            undo.pop_all()


def find_tower(model: nn.Module, path: str | None = None) -> Slot:
    """Find the only tower in a model, or the one at ``path``; raise ConfigError if there is none, or several."""
    places = find_towers(model)
    if not isinstance(path, str | None):
        raise ConfigError(f"tower is of type {type(path).__name__}; expected its path in the model, a str.")
    name, paths = type(model).__name__, " and ".join(place.path for place in places)
    if path is not None:
        places = [place for place in places if path in place.paths]
        if not places:
            raise ConfigError(f"{name} has no vision tower at {path!r}; it has {paths or 'none'}.")
    if len(places) > 1:
        raise ConfigError(
            f"{name} has {len(places)} vision towers, {paths}: choose one, as in tower={places[0].path!r}."
        )
    if not places:
        raise ConfigError(f"{name} {_explain_absence(model)}")
    return places[0]


def find_towers(model: nn.Module) -> list[Slot]:
    """List the towers in a model, including stand-ins; of nested ones, only the outermost."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is of type {type(model).__name__}; expected a loaded model, a torch.nn.Module.")
    places = _collect(model, "")
    if not places and isinstance(wrapper := _wrapper(model), nn.Module):  # held where _walk does not look
        places = _collect(wrapper, "get_vision_tower().")
    return places


def _collect(root: nn.Module, prefix: str) -> list[Slot]:
    places: dict[int, Slot] = {}
    for place in _walk(root, prefix, set()):
        known = places.setdefault(id(place.module), place)
        if known is not place:
            known.slots.extend(place.slots)
            known.paths.extend(place.paths)
    return list(places.values())


def _wrapper(model: Any) -> Any:
    get = getattr(model, "get_vision_tower", None)
    return get() if callable(get) else None


def _walk(module: nn.Module, prefix: str, visited: set[int]) -> Iterator[Slot]:
    if id(module) in visited:
        return
    visited.add(id(module))
    for container, key, name, child in _children(module):
        path = f"{prefix}{name}"
        if _is_tower(child):
            yield Slot(module=child, paths=[path], slots=[(container, key)], holder=module)
        else:
            yield from _walk(child, f"{path}.", visited)


def _children(module: nn.Module) -> Iterator[tuple[Any, Any, str, nn.Module]]:
    """List the modules that a module holds: registered, as plain attributes, or in lists, as under FSDP."""
    if (called := called_by_peft(module)) is not None:
        yield called
        return
    registered: dict[str, nn.Module | None] = module._modules
    for name, child in registered.items():
        if child is not None:
            yield registered, name, name, child
    for name, value in vars(module).items():
        if isinstance(value, nn.Module):
            yield vars(module), name, name, value
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, nn.Module):
                    yield value, index, f"{name}[{index}]", item


def called_by_peft(module: Any) -> tuple[Any, Any, str, nn.Module] | None:
    """Return the copy or original that PEFT's wrapper for `modules_to_save` calls; None for any other module."""
    if type(module).__name__ != "ModulesToSaveWrapper":
        return None
    copies, active = module.modules_to_save, [*module.active_adapters]
    if module.disable_adapters or not active or any(name not in copies for name in active):
        return module._modules, "original_module", "original_module", module.original_module
    return copies._modules, active[0], f"modules_to_save.{active[0]}", copies[active[0]]


def _is_tower(module: nn.Module) -> bool:
    """Whether this is a vision model of transformers, or its stand-in, and not the whole model around a tower."""
    if isinstance(module, VisionModel):
        return False
    if is_prismatic(module):
        return True
    # If transformers was never imported, no module can be one of its models.
    pretrained = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if pretrained is None or not isinstance(module, pretrained):
        return False
    config = getattr(module, "config", None)
    return _takes_pixels(module) and not hasattr(config, "vision_config")


def _takes_pixels(module: nn.Module) -> bool:
    """Whether a model's input is `pixel_values`. Idefics3's tower does not name its input, but has it as argument."""
    if getattr(module, "main_input_name", None) == "pixel_values":
        return True
    arguments = [*inspect.signature(type(module).forward).parameters]
    return arguments[1:2] == ["pixel_values"]  # after `self`


def _explain_absence(model: nn.Module) -> str:
    """Say why no tower was found that can be replaced, and what to do."""
    if _is_tower(model):
        return "is itself a vision tower, not a model with one: serve its bundle with trtower.VisionTower.load(…)."
    served = next((name for name, module in model.named_modules() if isinstance(module, VisionTower)), None)
    wrapper = _wrapper(model)
    if isinstance(wrapper, nn.Module) and _is_tower(wrapper):
        return (
            "has a vision tower that no attribute or list of its modules holds, so it cannot be replaced: serve the "
            "bundle with trtower.VisionTower.load(…)."
        )
    if served or isinstance(wrapper, VisionTower):
        return f"already has a compiled tower, at {served or 'get_vision_tower()'}: leave out trtower.install."
    if wrapper is not None and not getattr(wrapper, "is_loaded", True):
        return (
            f"has a {type(wrapper).__name__} that is not loaded: call get_vision_tower().load_model() first, or build "
            "the tower with trtower.build_vision_tower, which never loads the eager one."
        )
    where = f"in its {type(wrapper).__name__}" if wrapper is not None else "in it"
    return f"has no vision tower: expected a model of transformers that takes pixel_values {where}."
