"""Find the head of a checkpoint, describe what it returns, and load its weights."""

import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from trtower.errors import CheckpointError, ConfigError, TrtowerError, one_line
from trtower.head import EMBEDDING, PROJECTOR, HeadSpec
from trtower.layer_codes import LAST
from trtower.reading import is_contrastive
from trtower.spec import TowerSpec
from trtower_export.checkpoint.adapters import refuse_adapter_of
from trtower_export.checkpoint.checkpoint import RANDOM_SEED, Checkpoint, quiet_transformers
from trtower_export.checkpoint.layout import Layout
from trtower_export.checkpoint.tensors import Tensors
from trtower_export.heads import ALL_HEADS, REFUSED, Head, Parts, find_head
from trtower_export.heads.base import UnitLength
from trtower_export.options import ExportOptions

SPREAD = 0.02
"""The standard deviation of a rehearsal's matrices, as transformers draws them."""


def describe_tower(checkpoint: Checkpoint, options: ExportOptions) -> TowerSpec:
    """Describe the tower that an export with these options makes of a checkpoint, with its head if one is asked for.

    Raises ConfigError if an option does not go with this checkpoint, and CheckpointError if the checkpoint does not say
    which layer it reads, or does not have such a head.
    """
    select_layer, select_feature = options.select_layer, options.select_feature
    if options.head == EMBEDDING:
        select_layer, select_feature = LAST, "cls_patch"
    elif options.with_head:
        _refuse_dropped_patch(checkpoint, options)
    spec = checkpoint.spec(select_layer, select_feature, options.image_size)
    spec = replace(spec, pixels=options.pixels, layout=options.layout)
    return replace(spec, head=_describe_head(checkpoint, spec, options)) if options.with_head else spec


def _refuse_dropped_patch(checkpoint: Checkpoint, options: ExportOptions) -> None:
    """Refuse a model that drops one token of a tower with none or several before its patches."""
    layout, prefix = checkpoint.layout, checkpoint.family.num_prefix_tokens(checkpoint.config)
    if layout.drops_first and prefix != 1 and options.select_feature is None:
        raise CheckpointError(
            f"{checkpoint.source}: {layout.drops_first} drops the first token of a {checkpoint.family.name} tower, "
            f"which has {prefix} before its patches, and no --select-feature keeps what its projector reads: leave "
            "out --head."
        )


def load_head(
    checkpoint: Checkpoint, tower: nn.Module, spec: TowerSpec
) -> tuple[nn.Sequential | None, tuple[Tensor, ...]]:
    """Load the head of ``spec``, a module that turns tokens (B, T, D) into features, and list its own weights.

    ``tower`` is the full vision model, whose weights the head may share; those are not its own. Without a head it is
    None. Raises CheckpointError if a tensor is missing, unknown, quantised or of another shape, or if an adapter may
    change it.
    """
    if spec.head is None:
        return None, ()
    head, config = _find(checkpoint, spec.head.kind)
    with _building(checkpoint):
        own = head.own(config) if head.own else None
        if own is not None and own.state_dict():  # a projector of type "identity" has no weights
            _fill(own, checkpoint, head)
        steps = _steps(head, Parts(config=config, tower=tower, own=own, pool=spec.head.pool), spec.head.normalised)
    return steps.eval().requires_grad_(requires_grad=False), tuple(own.parameters()) if own else ()


def _find(checkpoint: Checkpoint, kind: str) -> tuple[Head, Any]:
    """Return a checkpoint's head of a kind, and the config that it belongs to."""
    layout = checkpoint.layout
    configs = [config for config in (layout.model, layout.config) if config is not None]
    for config in configs if kind == EMBEDDING else configs[:1]:
        if head := find_head(kind, config):
            reason = head.obstacle(config) or (layout.not_pooled if head.embeds else None)
            if reason or (reason := _projected_elsewhere(checkpoint, head)):
                raise CheckpointError(f"{checkpoint.source}: {reason}.")
            return head, config
    model_type = getattr(layout.model, "model_type", None)
    if kind == EMBEDDING:
        known = ", ".join(dict.fromkeys(name for head in ALL_HEADS if head.embeds for name in head.model_types))
        raise CheckpointError(
            f"{checkpoint.source}: its tower, {layout.config.model_type}, has no pooled embedding that trtower "
            f"exports; these have: {known}. Without --head it exports the hidden states."
        )
    if layout.model is None and checkpoint.recipe and checkpoint.random_weights:
        raise CheckpointError(
            f"the recipe {checkpoint.recipe.name} describes a tower and no projector, so none can be rehearsed: name "
            "the folder of a model, or leave out --head."
        )
    if layout.model is None:
        raise CheckpointError(
            f"{checkpoint.source} is a vision tower by itself and has no projector: name the checkpoint of the whole "
            "model, or leave out --head."
        )
    if reason := REFUSED.get(str(model_type)):
        raise CheckpointError(
            f"{checkpoint.source} has no projector that an engine can hold: {reason}. Leave out --head."
        )
    if is_contrastive(layout.model, layout.config):
        raise CheckpointError(
            f"{checkpoint.source}, a {model_type}, has no projector: use --head embedding for its pooled vector, or "
            "leave out --head."
        )
    raise CheckpointError(
        f"{checkpoint.source}: the projector of a {model_type} is none that trtower exports. Leave out --head: the "
        "model's own code then projects what the tower returns."
    )


def _projected_elsewhere(checkpoint: Checkpoint, head: Head) -> str | None:
    """Return why a pooled vector is not the model's embedding: the checkpoint holds a projection that no head reads."""
    if not head.embeds or head.attribute or checkpoint.layout.around is None:
        return None
    names = checkpoint.layout.around().shards
    found = next((name for name in names if name.endswith("visual_projection.weight")), None)
    return found and (
        f"the model projects the pooled vector with {found}, and trtower does not export that for a "
        f"{getattr(checkpoint.layout.model, 'model_type', 'model')}; save the tower by itself for the vector before it"
    )


def _describe_head(checkpoint: Checkpoint, spec: TowerSpec, options: ExportOptions) -> HeadSpec:
    """Find out what a head returns, by running it without weights."""
    head, config = _find(checkpoint, options.head)
    pool = _choose_pool(head, options)
    name, tokens = head.name_in(config), (1, spec.num_tokens - spec.first_token(spec.select_feature), spec.hidden_size)
    with _building(checkpoint), torch.device("meta"):
        tower = nn.Module()
        if head.embeds:
            tower = checkpoint.family.vision_class(checkpoint.config)
        own = head.own(config) if head.own else None
        if own is not None and own.state_dict() and checkpoint.layout.around is not None:
            _select_own(checkpoint.layout, checkpoint.layout.around(), head)
        steps = _steps(head, Parts(config=config, tower=tower, own=own, pool=pool), options.normalize).eval()
    try:
        with torch.no_grad():
            features = steps(torch.empty(tokens, device="meta"))
    except (RuntimeError, ValueError) as err:
        raise CheckpointError(
            f"{checkpoint.source}: its {name} does not accept {tokens[1]} tokens of {tokens[2]}, which it gets from "
            f"{spec.reading}{_of_options(options)} ({one_line(err)})."
        ) from err
    *several, width = features.shape[1:]
    _check_width(checkpoint, head, config, width)
    return HeadSpec(
        kind=head.kind,
        name=name,
        width=width,
        tokens=several[0] if several else None,
        attribute=head.attribute,
        normalised=options.normalize,
        pool=pool,
        divisor=head.divisor(config),
        settings={
            setting: json.dumps(value)
            for setting in head.settings
            if (value := getattr(config, setting, None)) is not None
        },
    )


def _of_options(options: ExportOptions) -> str:
    """Name the options that may have changed what a projector gets, and say to leave them out; "" if none was given."""
    given = {"--image-size": options.image_size, "--select-layer": options.select_layer}
    given |= {"--select-feature": options.select_feature}
    names = [name for name, value in given.items() if value is not None]
    return f": leave out {' and '.join(names)}, which the projector was not trained with" if names else ""


def _choose_pool(head: Head, options: ExportOptions) -> str | None:
    if options.pool is None:
        return head.pools[0] if head.pools else None
    if options.pool not in head.pools:
        raise ConfigError(
            f"--pool {options.pool} does not go with this checkpoint, whose embedding is made by its {head.name}: "
            "leave it out."
        )
    return options.pool


def _check_width(checkpoint: Checkpoint, head: Head, config: Any, width: int) -> None:
    """Refuse a projector that does not fit the language model behind it."""
    text = getattr(config, "text_config", None)
    expected = getattr(text, "hidden_size", None) or (None if text else getattr(config, "hidden_size", None))
    if head.kind == PROJECTOR and expected not in (None, width):
        raise CheckpointError(
            f"{checkpoint.source}/config.json: the {head.name} gives features of {width}, but the language model's are "
            f"of {expected}. Use the config.json that belongs to these weights."
        )


def _steps(head: Head, parts: Parts, normalised: bool) -> nn.Sequential:
    steps = OrderedDict(head.steps(parts))
    if normalised:
        steps["unit_length"] = UnitLength()
    return nn.Sequential(steps)


@contextmanager
def _building(checkpoint: Checkpoint) -> Iterator[None]:
    """Raise CheckpointError for whatever a wrong value in a config makes transformers raise."""
    try:
        with quiet_transformers():
            yield
    except TrtowerError:
        raise
    except Exception as err:
        raise CheckpointError(f"{checkpoint.source}: its head could not be built: {one_line(err)}") from err


def _fill(own: nn.Module, checkpoint: Checkpoint, head: Head) -> None:
    """Load the weights of a head's own module, or draw them for a rehearsal."""
    layout = checkpoint.layout
    if layout.around is None:
        _draw(own)
        return
    tensors = _select_own(layout, layout.around(), head)
    weights = {name.rpartition(f"{head.attribute}.")[2]: tensor.float() for name, tensor in tensors.read().items()}
    if layout.translate_head:
        weights = layout.translate_head(weights)
    expected: Mapping[str, Tensor] = own.state_dict()
    where = f"{tensors.files.folder}: {head.attribute}"
    for name in sorted(expected.keys() ^ weights.keys()):
        what = "is missing" if name in expected else f"is not a part of the {head.name} that its config describes"
        raise CheckpointError(
            f"{where}.{name} {what}. Export a complete checkpoint, with the config.json it came with."
        )
    for name, weight in sorted(weights.items()):
        if weight.shape != expected[name].shape:
            raise CheckpointError(
                f"{where}.{name} has shape {tuple(weight.shape)}; its config expects {tuple(expected[name].shape)}. "
                "Use the config.json that belongs to these weights."
            )
    own.float().load_state_dict(weights)


def _select_own(layout: Layout, around: Tensors, head: Head) -> Tensors:
    """Select a head's own tensors; refuse a checkpoint without them, or with several such modules."""
    part = layout.head_root or f"{head.attribute}."
    pattern = re.compile(rf"(?:^|.*?\.){re.escape(part)}{'' if part.endswith('.') else '$'}")
    roots = sorted({match[0] for name in around.shards if (match := pattern.match(name))})
    if not roots:
        raise CheckpointError(
            f"{around.files.folder} holds no {part.rstrip('.')}, the weights of the {head.name}. Export a checkpoint "
            "that holds it, or leave out --head."
        )
    if len(roots) > 1:
        raise CheckpointError(f"{around.files.folder} holds several heads: {', '.join(roots)}. Export one model.")
    refuse_adapter_of(around, roots[0].rstrip("."))
    return around.select(roots[0])


def _draw(own: nn.Module) -> None:
    """Draw the weights of a rehearsal: the same ones every time."""
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    for name, parameter in own.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0.0, SPREAD, generator=generator)
        elif name.endswith("bias"):
            parameter.data.zero_()
