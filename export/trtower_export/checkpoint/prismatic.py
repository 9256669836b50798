"""Read OpenVLA and Prismatic as their code saves them for transformers: one or two ViTs of timm, and a projector.

The ViTs are read at their second-last blocks, without class tokens and registers. Two of them get each picture in six
channels, three for each tower, normalised in its way; an engine gets the three of the second. Sources:
`configuration_prismatic.py`, `modeling_prismatic.py` and `processing_prismatic.py` of OpenVLA.
"""

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import transformers
from torch import Tensor

from trtower.errors import CheckpointError, one_line
from trtower.installation.prismatic import PARTS
from trtower.timm_names import translate
from trtower_export.checkpoint.files import Files
from trtower_export.checkpoint.layout import Layout, Request, no_tower, read_preprocessor, with_tower
from trtower_export.checkpoint.tensors import find_tensors
from trtower_export.checkpoint.timm import FILTERS, PATCH_EMBEDDING, describe_timm
from trtower_export.checkpoint.vision_config import CHANNELS, check_vision_config
from trtower_export.families import family_of
from trtower_export.families.prismatic import FIRST, PrismaticConfig

NAMES = {"openvla": "OpenVLA policy", "prismatic": "Prismatic model"}
"""By `model_type`."""

FILM = "vision_backbone--*.pt"
"""Where OpenVLA-OFT saves towers that it has fine-tuned with FiLM."""


def is_prismatic(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is OpenVLA's or Prismatic's."""
    return str(raw.get("model_type")) in NAMES


def recognise_prismatic(files: Files, raw: Mapping[str, Any], request: Request) -> Layout:
    """Read the one or two towers of OpenVLA or Prismatic.

    Raises CheckpointError if their architectures or preprocessing are none that can be exported.
    """
    where, kind = f"{files.folder}/config.json", NAMES[raw["model_type"]]
    if conditioned := next(files.folder.glob(FILM), None):
        raise CheckpointError(
            f"{conditioned} conditions the towers on the text by FiLM: they are not those in the other files, and no "
            "engine of images can hold them."
        )
    written = read_preprocessor(files)
    try:
        towers = _towers(raw)
        colours = _colours(towers, written)
        config = _vision_config(towers, colours)
        prepares = _strategy(raw if written is None else written)
        preprocessor = _preprocessor(prepares, written or {}, config.image_size, colours[-1])
        model = SimpleNamespace(**{**raw, "vision_config": config, "text_config": _text_config(raw["text_config"])})
    except CheckpointError as err:
        raise CheckpointError(f"{where}: {err}") from err
    except Exception as err:  # a wrong value in either file can raise anything
        what = f"it has no {err}" if isinstance(err, KeyError) else one_line(err)
        raise CheckpointError(f"{where}, or the preprocessor_config.json beside it, could not be read: {what}") from err
    family = family_of(config.model_type)
    check_vision_config(config, family, where)
    layout = Layout(
        kind=kind,
        config=config,
        family=family,
        preprocessor=preprocessor,
        model=model,
        translate=lambda tensors: _translate(tensors, config),
        select_layer=-2,
        select_feature="patch",
        image_aspect_ratio="pad" if prepares == "letterbox" else None,
        cameras=1 if raw["model_type"] == "openvla" else None,
    )
    if not request.weights:
        return layout
    tensors = find_tensors(files, allow_pickle=request.trust.allow_pickle)
    complete = with_tower(layout, tensors, f"{FIRST}.{PATCH_EMBEDDING}", request, larger=True)
    if complete is None:
        raise no_tower(tensors, f"the towers of this {kind}, with a tensor that ends in {FIRST}.{PATCH_EMBEDDING}")
    return complete


def _towers(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Describe one or two towers, as vision configs."""
    names, sizes, fused = raw["timm_model_ids"], raw["image_sizes"], raw["use_fused_vision_backbone"]
    activations = raw.get("timm_override_act_layers") or [None] * len(names)
    if type(fused) is not bool or len(names) != 1 + fused:
        raise CheckpointError(f"use_fused_vision_backbone={fused!r}, but timm_model_ids names {len(names)}.")
    return [describe_timm(*of_tower) for of_tower in zip(names, sizes, activations, strict=True)]


def _colours(towers: list[dict[str, Any]], written: Mapping[str, Any] | None) -> list[tuple[list[float], list[float]]]:
    """Return the mean and the standard deviation of each tower, three numbers each."""
    if written is None:
        usual = [family_of(tower["model_type"]).preprocessor for tower in towers]
        return [(each["image_mean"], each["image_std"]) for each in usual]
    for name, least in (("means", -math.inf), ("stds", 0.0)):
        numbers = [each for tower in written[name] for each in tower]
        shape = [len(tower) for tower in written[name]]
        if shape != [CHANNELS] * len(towers) or not all(least < each < math.inf for each in numbers):
            raise CheckpointError(
                f"its preprocessor_config.json has {name}={written[name]}; expected {CHANNELS} numbers for each of "
                f"{len(towers)} towers{'' if name == 'means' else ', above 0'}."
            )
    return [(list(mean), list(std)) for mean, std in zip(written["means"], written["stds"], strict=True)]


def _strategy(prepares: Mapping[str, Any]) -> str:
    """Return how pictures become squares."""
    strategy = prepares["image_resize_strategy"]
    if strategy not in ("resize-naive", "resize-crop", "letterbox"):
        raise CheckpointError(f"image_resize_strategy={strategy!r}; expected resize-naive, resize-crop or letterbox.")
    return str(strategy)


def _vision_config(towers: list[dict[str, Any]], colours: list[tuple[list[float], list[float]]]) -> Any:
    if len(towers) == 1:
        return transformers.AutoConfig.for_model(**towers[0])
    means, stds = zip(*colours, strict=True)
    return PrismaticConfig(**dict(zip(PARTS, towers, strict=True)), image_means=means, image_stds=stds)


def _preprocessor(
    strategy: str, written: Mapping[str, Any], size: int, colours: tuple[list[float], list[float]]
) -> dict[str, Any]:
    """Turn a `PrismaticImageProcessor` into the preprocessor_config.json of what the last tower gets."""
    interpolations = set(written.get("interpolations") or ["bicubic"])
    sizes = {tuple(each) for each in written.get("input_sizes") or [(3, size, size)]}
    if len(interpolations) > 1 or not interpolations <= FILTERS.keys() or sizes != {(3, size, size)}:
        raise CheckpointError(
            f"its preprocessor_config.json has interpolations={sorted(interpolations)} and input_sizes={sorted(sizes)};"
            f" expected one of {', '.join(FILTERS)} for all towers, and {[3, size, size]}."
        )
    square = {"height": size, "width": size}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": strategy == "resize-crop",
        "size": {"shortest_edge": size} if strategy == "resize-crop" else square,
        "crop_size": square,
        "crop_like": "torchvision",
        "resample": FILTERS[interpolations.pop()],
        "image_mean": colours[0],
        "image_std": colours[1],
    }


def _text_config(written: Mapping[str, Any]) -> dict[str, Any]:
    """Add to the language model's config its width, which the file leaves out if it is that of its class."""
    width = written.get("hidden_size") or transformers.CONFIG_MAPPING[written["model_type"]]().hidden_size
    return {**written, "hidden_size": width}


def _translate(tensors: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Turn the tensors of each tower, named from the `vision_backbone`, into transformers'."""
    pair = isinstance(config, PrismaticConfig)
    translated: dict[str, Tensor] = {}
    for name, part in zip(PARTS, config.parts if pair else [config], strict=False):
        begin = f"{name}."
        own = {key.removeprefix(begin): value for key, value in tensors.items() if key.startswith(begin)}
        named = translate(own, part.model_type)
        translated |= {f"{begin if pair else ''}{key}": value for key, value in named.items()}
    return translated
