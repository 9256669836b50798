"""The pair of towers in OpenVLA and Prismatic: DINOv2, and SigLIP or CLIP, whose patches stand side by side.

Both see the same picture, each normalised in its own way. The pair takes the pixels of the second tower, and turns them
into those of the first. Counted from the end, layer k of one runs beside layer k of the other; before the first layer
of the tower with fewer, its state 0 waits. A hidden state of the pair holds the patches of one of each, side by side,
and none of the tokens before them: nobody reads those.

Source: `PrismaticVisionBackbone` of OpenVLA, whose names of the two towers are kept.
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from trtower.installation.prismatic import PAIR, PARTS, normalised_again
from trtower.spec import Naming
from trtower_export.families import clip, dinov2, dinov2_with_registers, siglip
from trtower_export.families.base import Family, Pieces, replaced

FIRST, SECOND = PARTS
FAMILIES_IN_PAIRS: dict[str, Family] = {
    each.FAMILY.model_types[0]: each.FAMILY for each in (dinov2, dinov2_with_registers, siglip, clip)
}

State = tuple[Tensor, Tensor]
"""A hidden state of each tower, (B, P + N, D) with its own P and D."""


class PrismaticConfig(PretrainedConfig):
    """The config of a pair: those of its towers, and how each normalises the colours of a picture.

    ``image_means`` and ``image_stds`` have three numbers for each tower.
    """

    model_type = PAIR

    def __init__(
        self,
        featurizer: dict[str, Any] | None = None,
        fused_featurizer: dict[str, Any] | None = None,
        image_means: Any = ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5)),
        image_stds: Any = ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5)),
        **others: Any,
    ) -> None:
        self.featurizer: Any = AutoConfig.for_model(**(featurizer or {"model_type": "dinov2_with_registers"}))
        self.fused_featurizer: Any = AutoConfig.for_model(**(fused_featurizer or {"model_type": "siglip_vision_model"}))
        self.image_means, self.image_stds = image_means, image_stds
        self.hidden_size = sum(part.hidden_size for part in self.parts)
        self.num_hidden_layers = max(part.num_hidden_layers for part in self.parts)
        self.image_size, self.patch_size = self.featurizer.image_size, self.featurizer.patch_size
        super().__init__(**others)

    @property
    def parts(self) -> tuple[Any, Any]:
        """The configs of both towers."""
        return self.featurizer, self.fused_featurizer

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        return super().to_dict() | {name: getattr(self, name).to_dict() for name in PARTS}


class PrismaticVisionModel(nn.Module):
    """Both towers, as transformers has them."""

    config_class = PrismaticConfig

    def __init__(self, config: PrismaticConfig, *towers: nn.Module) -> None:
        super().__init__()
        self.config = config
        made = towers or [_family(part).vision_class(part) for part in config.parts]
        for name, tower in zip(PARTS, made, strict=True):
            self.add_module(name, tower)

    @classmethod
    def _from_config(cls, config: PrismaticConfig, **options: Any) -> "PrismaticVisionModel":
        return cls(config, *(_family(part).vision_class._from_config(part, **options) for part in config.parts))

    @classmethod
    def from_pretrained(
        cls, source: None, *, config: PrismaticConfig, state_dict: Mapping[str, Tensor], **options: Any
    ) -> tuple["PrismaticVisionModel", dict[str, list[Any]]]:
        """Load each tower with the class that it has in transformers; return the pair, and what both reported.

        ``state_dict`` has the names of the towers before those of their tensors. Other arguments are transformers' own.
        """
        towers, report = [], dict[str, list[Any]]()
        for name, part in zip(PARTS, config.parts, strict=True):
            family, begin = _family(part), f"{name}."
            weights = {key.removeprefix(begin): value for key, value in state_dict.items() if key.startswith(begin)}
            weights = family.named_in(family.vision_class, part, weights)
            tower, found = family.vision_class.from_pretrained(source, config=part, state_dict=weights, **options)
            towers.append(tower)
            for kind, keys in found.items():
                report.setdefault(kind, []).extend(_inside(name, key) for key in keys)
        return cls(config, *towers), report


def _inside(name: str, key: Any) -> Any:
    """Put a tower's name before what transformers reports: the name of a tensor, or a tuple that begins with it."""
    return f"{name}.{key}" if isinstance(key, str) else (f"{name}.{key[0]}", *key[1:])


def _family(part: Any) -> Family:
    return FAMILIES_IN_PAIRS[part.model_type]


def _normalised_again(config: PrismaticConfig) -> tuple[Tensor, Tensor]:
    """Return what turns the second tower's pixels into the first's: a factor and a summand, (3, 1, 1)."""
    return normalised_again(config.image_means, config.image_stds)


def _accept_pixels_of_second(tower: nn.Module, config: PrismaticConfig) -> nn.Module:
    """Return the first tower with a patch embedding that takes the second's pixels. Patches have no padding."""
    family = _family(config.featurizer)
    (path,) = (name for name, _ in tower.named_parameters() if name.endswith(family.patch_embedding))
    path = path.removesuffix(".weight")
    embedding: Any = tower.get_submodule(path)
    factor, summand = (each.double() for each in _normalised_again(config))
    weight = embedding.weight.double()
    bias = (weight * summand).sum((1, 2, 3)) + (0 if embedding.bias is None else embedding.bias.double())
    folded = replaced(
        embedding,
        weight=nn.Parameter((weight * factor).to(embedding.weight.dtype), requires_grad=False),
        bias=nn.Parameter(bias.to(embedding.weight.dtype), requires_grad=False),
    )
    return _replaced_at(tower, path, folded)


def _replaced_at(module: nn.Module, path: str, inner: nn.Module) -> nn.Module:
    """Return a copy of a module with another module at ``path``; it shares everything else."""
    name, _, rest = path.partition(".")
    copied: nn.Module = replaced(
        module, **{name: _replaced_at(module.get_submodule(name), rest, inner) if rest else inner}
    )
    return copied


class _Both(nn.Module):
    """Runs a module of each tower, or passes on the state of one that has none here yet."""

    def __init__(self, run: tuple[Callable[..., Tensor], ...], *modules: nn.Module | None) -> None:
        super().__init__()
        self._run = run
        self.featurizer, self.fused_featurizer = modules

    def forward(self, states: State) -> State:
        first, second = (
            state if module is None else run(module, state)
            for run, module, state in zip(self._run, (self.featurizer, self.fused_featurizer), states, strict=True)
        )
        return first, second


class _Stem(nn.Module):
    """Gives both towers the same pixels."""

    def __init__(self, *stems: nn.Module) -> None:
        super().__init__()
        self.featurizer, self.fused_featurizer = stems

    def forward(self, pixel_values: Tensor) -> State:
        return self.featurizer(pixel_values), self.fused_featurizer(pixel_values)


def _join(states: State, num_patches: int) -> Tensor:
    """Put the patches of both side by side: (B, N, D of one + D of the other)."""
    return torch.cat([state[:, state.shape[1] - num_patches :] for state in states], dim=-1)


def _take_apart(model: Any, image_size: int) -> Pieces:
    families = [_family(part) for part in model.config.parts]
    towers = (_accept_pixels_of_second(model.featurizer, model.config), model.fused_featurizer)
    pieces = [family.take_apart(tower, image_size) for family, tower in zip(families, towers, strict=True)]
    run = tuple(family.run_layer for family in families)
    from_the_end = zip_longest(*(reversed(each.layers) for each in pieces))
    return Pieces(
        stem=_Stem(*(each.stem for each in pieces)),
        layers=nn.ModuleList(reversed([_Both(run, *layers) for layers in from_the_end])),
        final_norm=_Both((_call, _call), *(each.final_norm for each in pieces)),
        join=partial(_join, num_patches=(image_size // model.config.patch_size) ** 2),
    )


def _call(module: nn.Module, state: Tensor) -> Tensor:
    called: Tensor = module(state)
    return called


def _read_states(model: Any, pixel_values: Tensor) -> tuple[Tensor, ...]:
    first, second = model.config.parts
    factor, summand = _normalised_again(model.config)
    *states, last = _family(first).read_states(model.featurizer, pixel_values * factor + summand)
    *others, other_last = _family(second).read_states(model.fused_featurizer, pixel_values)
    longest = max(len(states), len(others))
    waiting = ([each[0]] * (longest - len(each)) + each for each in (states, others))
    num_patches = (pixel_values.shape[-1] // model.config.patch_size) ** 2
    return tuple(_join(pair, num_patches) for pair in (*zip(*waiting, strict=True), (last, other_last)))


def _obstacle(config: PrismaticConfig) -> str | None:
    if unknown := next((part.model_type for part in config.parts if part.model_type not in FAMILIES_IN_PAIRS), None):
        return f"one of its two towers is a {unknown}; trtower exports pairs of {', '.join(FAMILIES_IN_PAIRS)}"
    sizes = [(part.image_size, part.patch_size) for part in config.parts]
    if len(set(sizes)) > 1:
        first, second = (f"{size} pixels in patches of {patch}" for size, patch in sizes)
        return f"its two towers see {first} and {second}, which make no pairs of patches; export models with one size"
    return None


def _size_obstacle(config: PrismaticConfig, image_size: int) -> str | None:
    reasons = (_family(part).size_obstacle(part, image_size) for part in config.parts)
    return next((reason for reason in reasons if reason), None)


def _offsets(config: PrismaticConfig) -> dict[str, int]:
    missing = [config.num_hidden_layers - part.num_hidden_layers for part in config.parts]
    return {f"{name}.": layers for name, layers in zip(PARTS, missing, strict=True) if layers}


AutoConfig.register(PrismaticConfig.model_type, PrismaticConfig, exist_ok=True)

WRAPPED = (FIRST, SECOND, f"{SECOND}.vision_model")

FAMILY = Family(
    name="prismatic",
    model_types=(PrismaticConfig.model_type,),
    model_class=PrismaticVisionModel.__name__,
    module=__name__,
    patch_embedding=f"{FIRST}.{dinov2.FAMILY.patch_embedding}",
    num_prefix_tokens=lambda config: 0,
    take_apart=_take_apart,
    naming=Naming(
        final_norm=tuple(f"{tower}.{name}" for tower in WRAPPED for name in ("layernorm", "post_layernorm")),
        unread=tuple(f"{tower}.{name}" for tower in WRAPPED for name in ("head", "embeddings.mask_token")),
        config_fields=("hidden_size", "patch_size"),
    ),
    offsets=_offsets,
    run_layer=lambda layer, states: layer(states),
    read_states=_read_states,
    obstacle=_obstacle,
    size_obstacle=_size_obstacle,
    preprocessor=siglip.FAMILY.preprocessor,
)
