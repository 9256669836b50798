"""Refuse a tower that an adapter (LoRA, DoRA, IA3 and what else peft has) changes, unless it was merged.

transformers applies an adapter that lies beside a model when it loads the folder, so the weights of the model alone are
not what people run. An adapter of the language model leaves the tower as it is: that is decided by the names of its
tensors, and what cannot be decided is refused.
"""

import re
from collections.abc import Collection, Iterable

from trtower.errors import CheckpointError
from trtower_export.checkpoint.files import Files
from trtower_export.checkpoint.tensors import Tensors, names_in

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

_NAMES = {"LORA": "LoRA", "ADALORA": "AdaLoRA", "LOHA": "LoHa", "LOKR": "LoKr"}

_ADAPTER_PART = re.compile(
    r".*lora|base_layer$|ia3_|hada_|lokr_|oft_|boft_|vera_|vblora_|fourierft_|hra_|bone_|miss_|shira_|c3a_|road_"
    r"|ln_tuning|token_adapter$|trainable_tokens_",
    re.IGNORECASE,
)
_WRAPPED_WHOLE = ("original_module", "modules_to_save")

_OF_VISION = re.compile(r"vision|visual|image|video|tower|vit(?![a-z])|patch|siglip|clip|dino", re.IGNORECASE)
_OF_OTHERS = {"language_model", "text_model", "llm", "lm_head", "embed_tokens", "mm_projector"}
_OF_OTHERS |= {"multi_modal_projector", "language_projection", "qformer"}
_OF_A_DECODER = re.compile(r"(model\.)*layers\.\d+\.")
"""How causal language models of transformers call what is in their layers, in a LLaVA or VILA model."""


def refuse_adapter_alone(files: Files) -> None:
    """Raise CheckpointError if a folder holds an adapter; the caller has found that there is no model beside it."""
    kind, base = _read_adapter(files)
    if kind:
        raise CheckpointError(f"{files.folder} is {kind}: {_merge_into(base or 'its base model')}.")


def _read_adapter(files: Files) -> tuple[str | None, str | None]:
    """Say which kind of adapter lies in a folder, and the name of the model it was made for; None if it has none."""
    config = files.read_json(CONFIG)
    if config is None:
        return None, None
    kind, base = str(config.get("peft_type") or "LORA").upper(), config.get("base_model_name_or_path")
    article = "an" if kind[0] in "AIO" else "a"
    return f"{article} {_NAMES.get(kind, kind)} adapter", base if isinstance(base, str) and base else None


def _merge_into(model: str) -> str:
    return f"merge it into {model} with merge_and_unload(), write that with save_pretrained(), and export the result"


def check_adapter(files: Files, tower: Tensors, others: Collection[str], *, larger: bool) -> tuple[str, ...]:
    """Return what to say of the adapters in a folder; raise CheckpointError if the one beside the model is the tower's.

    ``others`` are the names of the tensors of the rest; ``larger`` says whether the folder's model is more than its
    tower.
    """
    said = [
        f"{path.parent} holds an adapter, which transformers does not apply when it loads {files.folder}: left out"
        for path in sorted(files.folder.glob(f"*/{CONFIG}"))
    ]
    kind, base = _read_adapter(files)
    if kind is None:
        return tuple(said)
    where = f"{files.folder}/{CONFIG} is {kind}: {_merge_into('the model')}"
    files.fetch(*WEIGHTS)
    path = next((files.folder / name for name in WEIGHTS if (files.folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{where}. No {WEIGHTS[0]} beside it says what it changes.")
    if path.suffix != ".safetensors" and not tower.allow_pickle:
        raise CheckpointError(f"{where}. What it changes is in a pickle, {path.name}, which is not read.")
    if touched := _first_in_tower(names_in(path), tower.shards, others, larger=larger):
        raise CheckpointError(
            f"{where}. transformers applies it when it loads the folder, and {touched} in {path.name} may be of the "
            f"tower. To export the model without it, leave {CONFIG} out of a copy."
        )
    said.append(f"{path.name} is {kind} that leaves the tower as it is")
    if base not in (None, files.repo, str(files.folder), str(files.folder.resolve())):
        said[-1] += (
            f". It was made for {base!r}, from which transformers may load the model itself: export that one instead, "
            "unless its tower is the same"
        )
    return tuple(said)


def check_unmerged(tensors: Tensors, patch_embedding: str, *, larger: bool) -> tuple[str, ...]:
    """Return what to say of adapters inside the weights; raise CheckpointError if one may be of a tower."""
    found = [name for name in tensors.shards if _is_adapters(name)]
    if not found:
        return ()
    roots = tuple(tensors.roots(patch_embedding))
    tower = {name for name in tensors.shards if name.startswith(roots)} if roots else set()
    touched = _first_in_tower(found, tower, tensors.shards.keys() - tower, larger=larger) if tower else found[0]
    if touched:
        raise CheckpointError(
            f"{tensors.files.folder} holds {touched}, of an adapter that was not merged: {_merge_into('the model')}."
        )
    return (f"{found[0]} is of an adapter that was not merged, and that leaves the tower as it is",)


def _first_in_tower(names: Iterable[str], tower: Iterable[str], others: Iterable[str], *, larger: bool) -> str | None:
    """Find the first tensor of an adapter that may be in the tower.

    The prefixes may differ, so an adapter's module is that of the checkpoint whose name ends most like it.
    """
    inside, outside = (
        {end for name in held if not _is_adapters(name) for end in _ends(_module(name))} for held in (tower, others)
    )
    return next((name for name in sorted(names) if _may_be_in(_module(name), inside, outside, larger=larger)), None)


def _may_be_in(
    path: tuple[str, ...], inside: set[tuple[str, ...]], outside: set[tuple[str, ...]], *, larger: bool
) -> bool:
    within, without = (max((len(end) for end in _ends(path) if end in held), default=0) for held in (inside, outside))
    if without > within and not any(map(_OF_VISION.search, path[: len(path) - without])):
        return False
    if any(map(_OF_VISION.search, path)):
        return True
    return not (_OF_OTHERS.intersection(path) or (larger and _OF_A_DECODER.match(".".join(path))))


def _is_adapters(name: str) -> bool:
    parts = name.split(".")
    return any(part in _WRAPPED_WHOLE or _ADAPTER_PART.match(part) for part in parts)


def _module(name: str) -> tuple[str, ...]:
    """Return the path of the module that a tensor, of a model or of its adapter, belongs to."""
    parts = name.removeprefix("base_model.model.").split(".")
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        parts[at : at + 2] = []  # the name of the adapter follows
    parts = [part for part in parts if part not in _WRAPPED_WHOLE]
    end = next((at for at, part in enumerate(parts) if _ADAPTER_PART.match(part)), len(parts) - 1)
    return tuple(parts[:end])


def _ends(path: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [path[at:] for at in range(len(path))]
