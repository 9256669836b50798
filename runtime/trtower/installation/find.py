"""Find the vision tower in a loaded model, wherever it hangs.

LLaVA, VILA and tinychat hang a wrapper of their own into the model and, inside, a vision model of transformers; models
of transformers hang that in directly. So there is one thing to look for. What surrounds it stays as it is, and with it
every member of a wrapper that model code touches.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from trtower.errors import ConfigError
from trtower.tower.vision_model import VisionModel
from trtower.tower.vision_tower import VisionTower


@dataclass(frozen=True, kw_only=True)
class TowerSlot:
    """A vision model of transformers (``module``) in a model, where it hangs, and the module that it hangs in.

    ``paths`` are all its names; it is called by the first. ``slots`` are dicts and lists, each with its key there.
    """

    module: Any
    paths: list[str]
    slots: list[tuple[Any, Any]]
    holder: nn.Module

    @property
    def path(self) -> str:
        """Where it is, such as "model.vision_tower"."""
        return self.paths[0]

    @property
    def installation(self) -> Any:
        """What `trtower.install` has returned for the bundle that is here; None if an eager tower is."""
        return vars(self.module).get("installation")

    def put(self, module: nn.Module) -> None:
        """Hang another module in every slot, or if that fails in none."""
        with ExitStack() as undo:
            for container, key in self.slots:
                before = container[key]
                container[key] = module
                undo.callback(container.__setitem__, key, before)
            undo.pop_all()


def find_tower(model: nn.Module, path: str | None = None) -> TowerSlot:
    """Find the one tower in a model, or the one at ``path``; raise ConfigError where there is none, or two."""
    places = find_towers(model)
    if not isinstance(path, str | None):
        raise ConfigError(f"tower is of type {type(path).__name__}; its path in the model is expected.")
    name, found = type(model).__name__, " and ".join(place.path for place in places)
    if path is not None:
        places = [place for place in places if path in place.paths]
        if not places:
            raise ConfigError(f"{name} has no vision tower at {path!r}; it has {found or 'none'}.")
    if len(places) > 1:
        raise ConfigError(f"{name} has {len(places)} vision towers, {found}: say which with tower={places[0].path!r}.")
    if not places:
        raise ConfigError(f"{name} {_say_absent(model)}")
    return places[0]


def find_towers(model: nn.Module) -> list[TowerSlot]:
    """List the vision models of transformers in a model, the outermost of each, those that stand in for one too."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is of type {type(model).__name__}; a loaded model, a torch.nn.Module, is expected.")
    found = _collect(model, "")
    if not found and isinstance(wrapper := _wrapper(model), nn.Module):  # should it hang out of sight
        found = _collect(wrapper, "get_vision_tower().")
    return found


def _collect(root: nn.Module, prefix: str) -> list[TowerSlot]:
    found: dict[int, TowerSlot] = {}
    for place in _walk(root, prefix, set()):
        known = found.setdefault(id(place.module), place)
        if known is not place:
            known.slots.extend(place.slots)
            known.paths.extend(place.paths)
    return list(found.values())


def _wrapper(model: Any) -> Any:
    get = getattr(model, "get_vision_tower", None)
    return get() if callable(get) else None


def _walk(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[TowerSlot]:
    if id(module) in seen:
        return
    seen.add(id(module))
    for container, key, name, child in _children(module):
        path = f"{prefix}{name}"
        if _is_tower(child):
            yield TowerSlot(module=child, paths=[path], slots=[(container, key)], holder=module)
        else:
            yield from _walk(child, f"{path}.", seen)


def _children(module: nn.Module) -> Iterator[tuple[Any, Any, str, nn.Module]]:
    """Return what hangs in a module, registered or not, in a list as under FSDP or not."""
    if (saved := _trained_copy(module)) is not None:
        yield saved
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


def _trained_copy(module: Any) -> tuple[Any, Any, str, nn.Module] | None:
    """Return the one module that PEFT's wrapper of `modules_to_save` calls: a copy that it trains, or the original."""
    if type(module).__name__ != "ModulesToSaveWrapper":
        return None
    copies, active = module.modules_to_save, [*module.active_adapters]
    if module.disable_adapters or not active or any(name not in copies for name in active):
        return module._modules, "original_module", "original_module", module.original_module
    return copies._modules, active[0], f"modules_to_save.{active[0]}", copies[active[0]]


def _is_tower(module: nn.Module) -> bool:
    """Whether this is an eager model of transformers that takes pixels and holds no other that does."""
    if isinstance(module, VisionModel):
        return False
    # Where transformers was never imported no module is one of its models.
    pretrained = getattr(sys.modules.get("transformers.modeling_utils"), "PreTrainedModel", None)
    if pretrained is None or not isinstance(module, pretrained):
        return False
    config = getattr(module, "config", None)
    return getattr(module, "main_input_name", None) == "pixel_values" and not hasattr(config, "vision_config")


def _say_absent(model: nn.Module) -> str:
    """Say what there is in the place of a tower that can be replaced."""
    if _is_tower(model):
        return "is a vision tower itself, in no model: trtower.VisionTower.load(…) serves its bundle."
    served = next((name for name, module in model.named_modules() if isinstance(module, VisionTower)), None)
    wrapper = _wrapper(model)
    if isinstance(wrapper, nn.Module) and _is_tower(wrapper):
        return "gives its vision tower, which hangs in no module or list of it and cannot be replaced."
    if served or isinstance(wrapper, VisionTower):
        return f"is served by a compiled tower already, at {served or 'get_vision_tower()'}."
    if wrapper is not None and not getattr(wrapper, "is_loaded", True):
        return (
            f"has a {type(wrapper).__name__} that is not loaded: get_vision_tower().load_model() first, or build "
            "it with trtower.build_vision_tower, which never loads the eager tower."
        )
    has = f"its {type(wrapper).__name__} holds none" if wrapper is not None else "it holds none"
    return f"has no vision tower: a model of transformers that takes pixel_values is looked for, and {has}."
