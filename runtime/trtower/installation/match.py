"""Compare a bundle's description with the tower that it will replace, before anything is changed."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from trtower.bundle.bundle import Bundle
from trtower.bundle.suggest import export_command, export_command_of, name_layers
from trtower.dtypes import DTYPES
from trtower.errors import BundleError, ConfigError
from trtower.fingerprint import count_layers, read_parameters, weights_sha256
from trtower.installation.find import Slot
from trtower.installation.original import main_dtype
from trtower.installation.policies import used_size
from trtower.installation.prismatic import CONDITIONED, SECOND_LAST, is_prismatic
from trtower.layer_codes import FEATURES, LAST, LayerCode, name_layer, read_layer_code
from trtower.reading import is_contrastive, read_vision_feature_layer
from trtower.spec import TowerSpec
from trtower.tower.outputs import served_layers

KEPT = "float32"
"""What models in half precision keep some weights in; rounded, they are those of the checkpoint."""

CHANGED = (
    "The model was changed after it was loaded, or is of another revision: merge what was added to it, and "
    "export the folder that model.save_pretrained writes."
)


def check_match(
    model: nn.Module, place: Slot, bundle: Bundle, *, allow_other_weights: bool, allow_random_weights: bool
) -> None:
    """Raise ConfigError unless the bundle was made of this tower and holds the states that the model is known to read.

    Raises BundleError if it is a rehearsal. The two flags accept other weights, and a rehearsal.
    """
    source = bundle.manifest.source
    if bundle.manifest.spec.embeds:
        raise ConfigError(
            f"{bundle.path} returns one vector for each image, but models read hidden states: serve it by "
            "trtower.VisionTower.load(…), or export it without --head."
        )
    if not bundle.manifest.spec.takes_floats:
        raise ConfigError(
            f"{bundle.path} takes pixels as bytes, but this model prepares floats for its tower: export it without "
            "--pixels uint8."
        )
    if source.random_weights and not allow_random_weights:
        raise BundleError(
            f"{bundle.path} is a rehearsal, with random weights, so the model's answers would mean nothing: export its "
            "checkpoint, or accept the rehearsal with allow_random_weights=True."
        )
    export, own = ways_out(model, place, bundle)
    _check_config(model, place, bundle, export, own)
    codes = list(_codes(model, place))
    if not allow_other_weights and not source.random_weights:
        _check_weights(place, bundle, own)
    for code, feature, key in codes:  # after the weights, because the message names the bundle's checkpoint
        _check_layers(code, feature, key, place, bundle)


def check_replaceable(model: nn.Module, place: Slot, *, dropped: bool) -> None:
    """Raise ConfigError if the tower cannot be replaced, or its weights cannot be ``dropped``."""
    tower = place.module
    if type(place.holder).__name__ == "OptimizedModule":
        raise ConfigError(
            f"{place.path} was compiled by torch.compile, which would keep running the old tower: install first, then "
            "compile."
        )
    absent = next((name for name, each in tower.named_parameters() if each.is_meta), None)
    if absent:
        raise ConfigError(
            f"{place.path}.{absent} is on the meta device: accelerate has offloaded the weights, or a bundle in "
            "another model with the same tower has freed them. Load this model with its own tower, on one device."
        )
    if tower.training:
        raise ConfigError(
            f"{place.path} is in training mode, and a compiled tower cannot be trained: call model.eval() first, or "
            f"model.{place.path}.eval() to train the rest of the model."
        )
    if not dropped:
        return
    if any(parameter.grad is not None for parameter in tower.parameters()):
        raise ConfigError(
            f"{place.path} has gradients, which would be lost: call model.zero_grad() first, or set keep_original=True."
        )
    own = {id(each) for each in (*tower.modules(), *tower.parameters())} - {id(tower)}
    for name, module in model.named_modules():
        if id(module) in own or module is tower:
            continue
        shared = next(
            (key for key, each in (*module._modules.items(), *module._parameters.items()) if id(each) in own), None
        )
        if shared:
            raise ConfigError(
                f"{f'{name}.' if name else ''}{shared} is a part of {place.path}, whose weights would be freed: "
                "set keep_original=True to keep them."
            )


def ways_out(model: nn.Module, place: Slot, bundle: Bundle) -> tuple[str, str]:
    """Say to export the model's own checkpoint; and what to do about other weights, which it may have got since."""
    checkpoint = _loaded_from(model, place)
    export = f"Export the model's own checkpoint{f': {export_command_of(checkpoint, bundle)}' if checkpoint else '.'}"
    return export, CHANGED if checkpoint == bundle.manifest.source.checkpoint else export


def _loaded_from(model: nn.Module, place: Slot) -> str | None:
    """Return the checkpoint named by the model's config; a folder as absolute path, as in a manifest."""
    configs = [getattr(each, "config", None) for each in (model, place.module)]
    name = next((name for each in configs if (name := getattr(each, "_name_or_path", None))), None)
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def _check_config(model: nn.Module, place: Slot, bundle: Bundle, export: str, own: str) -> None:
    if type(place.holder).__name__ == CONDITIONED:
        raise ConfigError(
            f"{place.path} of this model is conditioned on the text by FiLM, which no engine of images can hold: it "
            "cannot be replaced."
        )
    config, spec, made_of = place.vision.config, bundle.manifest.spec, place.made_of
    # Files of older releases call Idefics3's tower "idefics3", like the whole model; only its class tells them apart.
    if made_of["model_type"] not in (config.model_type, getattr(type(config), "model_type", None)):
        supported = f"own checkpoint, if `trtower export` supports {config.model_type}"  # the runtime cannot know
        if_exported = export.replace("own checkpoint", supported)
        raise ConfigError(
            f"{bundle.path} is of family {spec.family} ({made_of['model_type']}); {place.path} of this model is a "
            f"{type(place.module).__name__} ({config.model_type}). {if_exported}"
        )
    side = _plain(used_size(model, place))
    if not isinstance(side, int):
        raise ConfigError(
            f"{place.path} of this model has image_size={side}, but a bundle accepts square images of one size only: "
            "this tower cannot be replaced."
        )
    if side != spec.image_size:
        raise ConfigError(
            f"{bundle.path} accepts images of {spec.image_size} pixels; {place.path} of this model accepts {side}. "
            f"{export}"
        )
    for name in spec.naming.config_fields:
        value, expected = (_plain(each) for each in (getattr(config, name, None), made_of.get(name)))
        if None not in (value, expected) and value != expected:
            raise ConfigError(
                f"{bundle.path} was made of a tower with {name}={expected}; {place.path} of this model has {value}. "
                f"{own}"
            )
    depth = count_layers(place.vision, spec.naming)
    if spec.depth > depth:
        raise ConfigError(
            f"{bundle.path} holds a state of layer {spec.depth}; {place.path} of this model has only {depth} layers. "
            f"{own}"
        )


def _plain(value: Any) -> Any:
    """Turn (14, 14) into 14, since configs write either."""
    if isinstance(value, (list, tuple)) and len(set(value)) == 1:
        return value[0]
    return value


def _codes(model: nn.Module, place: Slot) -> Iterator[tuple[LayerCode, str, str]]:
    """List what the model is known to read: layer code, feature code, and the key that names them.

    If the config names nothing, nothing is checked here; a state that the bundle lacks then raises when it is read.
    """
    if is_prismatic(place.module):
        yield SECOND_LAST, "patch", "layer"
        return
    holder = place.holder
    is_model = hasattr(getattr(holder, "config", None), "vision_config")  # Eagle has a select_layer of its own
    if getattr(holder, "select_layer", None) is not None and not is_model:  # the wrapper of LLaVA or a fork
        feature = getattr(holder, "select_feature", "patch")
        yield holder.select_layer, feature, "select_layer"  # type: ignore[misc]
    configs = [config for each in (holder, model) if (config := getattr(each, "config", None)) is not None]
    for config in configs:
        if getattr(config, "mm_vision_select_layer", None) is not None:  # counts layers that a wrapper may have dropped
            feature = getattr(config, "mm_vision_select_feature", "patch")
            depth = place.vision.config.num_hidden_layers
            layers, tokens = read_layer_code(config.mm_vision_select_layer, feature, depth)
            codes = [LAST if layer > depth else layer for layer in layers]
            yield codes, tokens, "mm_vision_select_layer"
            return
        vision_config = getattr(config, "vision_config", None)
        if getattr(vision_config, "model_type", None) is None:
            continue
        if is_contrastive(config, vision_config):
            raise ConfigError(
                f"{type(model).__name__} reads the pooled vector of an image, which no installed bundle gives: export "
                "it with --head embedding, and serve that by trtower.VisionTower.load(…)."
            )
        code = read_vision_feature_layer(config)
        if code is not None:
            yield code, "cls_patch", "vision_feature_layer"
        return


def _check_layers(code: LayerCode, feature: str, key: str, place: Slot, bundle: Bundle) -> None:
    spec = bundle.manifest.spec
    depth = count_layers(place.vision, spec.naming)
    layers, tokens = read_layer_code(code, feature, depth)
    if spec.head and not _reads_as_head(layers, tokens, spec, depth, key):
        raise ConfigError(
            f"this model reads {key}={code}{'' if feature in FEATURES else f' under {feature}'}, but the "
            f"{spec.head.describe()} inside {bundle.path} reads {spec.reading}: export the model's own checkpoint."
        )
    if not spec.head and not set(layers) <= served_layers(spec, depth).keys():
        names = [name_layer(layer, depth) for layer in layers]
        is_whole = feature in FEATURES and depth == spec.num_layers  # else the code means other states at export
        command = export_command(bundle, code if is_whole else names, spec.image_size)
        raise ConfigError(
            f"this model reads {key}={code}{'' if feature in FEATURES else f' under {feature}'}, hidden state "
            f"{', '.join(names)} of {depth} layers; {bundle.path} holds {', '.join(name_layers(spec, spec.layers))}. "
            f"Export a bundle with it: {command}"
        )


def _reads_as_head(layers: tuple[int, ...], tokens: str, spec: TowerSpec, depth: int, key: str) -> bool:
    """Whether a model reads the states that a bundle's head reads. What tokens it keeps, only a wrapper says here."""
    served = served_layers(replace(spec, head=None), depth)
    same_tokens = key == "vision_feature_layer" or spec.first_token(tokens) == spec.first_read
    return same_tokens and tuple(served.get(layer) for layer in layers) == spec.layers


def _check_weights(place: Slot, bundle: Bundle, own: str) -> None:
    source, dtype = bundle.manifest.source, main_dtype(place.module)
    name = next((name for name, each in DTYPES.items() if each == dtype), None)
    held = list(read_parameters(place.vision, bundle.manifest.spec))
    others = sorted({str(each.dtype).removeprefix("torch.") for each in held} - {name, KEPT if name else None})
    if name is None or others:
        dtypes = " and ".join(others) or str(dtype)
        raise ConfigError(
            f"{place.path} of this model holds weights in {dtypes}, so it is at least partly quantised or converted, "
            f"and {bundle.path} was not made of it: set allow_other_weights=True to use the bundle's weights."
        )
    if name not in source.weights_sha256:
        raise ConfigError(
            f"{place.path} of this model holds weights in {name}; {bundle.path} was exported by a trtower that "
            "could not compare these: export it again, or set allow_other_weights=True to use the bundle's weights."
        )
    if weights_sha256(held, DTYPES[name]) != source.weights_sha256[name]:
        raise ConfigError(
            f"{place.path} of this model has other weights than {bundle.path}, which was made of {source.checkpoint}. "
            f"allow_other_weights=True would use the bundle's weights. {own}"
        )
