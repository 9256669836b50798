"""Refuse a tower that an unmerged adapter changes: LoRA, DoRA, IA3 and the other kinds that peft has.

When transformers loads a folder, it applies an adapter that lies beside the model, so the model's weights by themselves
are not what people run. An adapter of the language model does not change the tower. The names of the adapter's tensors
tell the two apart; in doubt, the checkpoint is refused.
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
"""How transformers' causal language models name their layers in a LLaVA or VILA model."""


def refuse_adapter_alone(files: Files) -> None:
    """Raise CheckpointError if a folder holds an adapter. The caller has checked that no model lies beside it."""
    kind, base = _read_adapter(files)
    if kind:
        raise CheckpointError(f"{files.folder} is {kind}: {_merge_into(base or 'its base model')}.")


def _read_adapter(files: Files) -> tuple[str | None, str | None]:
    """Return the kind of adapter in a folder and the name of its base model, each None if there is none."""
    config = files.read_json(CONFIG)
    if config is None:
        return None, None
    kind, base = str(config.get("peft_type") or "LORA").upper(), config.get("base_model_name_or_path")
    article = "an" if kind[0] in "AIO" else "a"
    return f"{article} {_NAMES.get(kind, kind)} adapter", base if isinstance(base, str) and base else None


def _merge_into(model: str) -> str:
    return f"merge it into {model} with merge_and_unload(), save the result with save_pretrained(), and export that"


def check_adapter(files: Files, tower: Tensors, others: Collection[str], *, larger: bool) -> tuple[str, ...]:
    """Return remarks on the adapters in a folder; raise CheckpointError if the one beside the model may be the tower's.

    ``others`` are the names of the model's tensors outside the tower; ``larger`` says whether the folder's model is
    more than its tower.
    """
    remarks = [
        f"{path.parent} holds an adapter, which transformers does not apply when it loads {files.folder}: ignored"
        for path in sorted(files.folder.glob(f"*/{CONFIG}"))
    ]
    kind, base = _read_adapter(files)
    if kind is None:
        return tuple(remarks)
    where = f"{files.folder}/{CONFIG} belongs to {kind}: {_merge_into('the model')}"
    files.fetch(*WEIGHTS)
    path = next((files.folder / name for name in WEIGHTS if (files.folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{where}. There is no {WEIGHTS[0]} beside it to show what it changes.")
    if path.suffix != ".safetensors" and not tower.allow_pickle:
        raise CheckpointError(f"{where}. Its tensors are in a pickle, {path.name}, read only with --allow-pickle.")
    if touched := _first_in_tower(names_in(path), tower.shards, others, larger=larger):
        raise CheckpointError(
            f"{where}. transformers applies it when it loads the folder, and {touched} in {path.name} may belong to "
            f"the tower. To export the model without it, copy the folder and delete {CONFIG} there."
        )
    remarks.append(f"{path.name} is {kind} that does not change the tower")
    if base not in (None, files.repo, str(files.folder), str(files.folder.resolve())):
        remarks[-1] += (
            f". Its base model is {base!r}, and transformers may load the model from there: export that one instead, "
            "unless its tower is the same"
        )
    return tuple(remarks)


def refuse_adapter_of(tensors: Tensors, module: str) -> None:
    """Raise CheckpointError if an adapter, beside the model or inside its weights, may change a module of it."""
    files, names = tensors.files, {name for name in tensors.shards if _is_adapters(name)}
    for path in (files.folder / name for name in WEIGHTS):
        if path.is_file() and (path.suffix == ".safetensors" or tensors.allow_pickle):
            names |= names_in(path)
    own = module.rpartition(".")[2]
    if touched := next((name for name in sorted(names) if own in _module(name)), None):
        raise CheckpointError(
            f"{files.folder} holds {touched}, part of an adapter that was not merged: {_merge_into('the model')}."
        )


def check_unmerged(tensors: Tensors, patch_embedding: str, *, larger: bool) -> tuple[str, ...]:
    """Return remarks on adapters inside the weights; raise CheckpointError if one may belong to a tower."""
    adapter_names = [name for name in tensors.shards if _is_adapters(name)]
    if not adapter_names:
        return ()
    roots = tuple(tensors.roots(patch_embedding))
    tower = {name for name in tensors.shards if name.startswith(roots)} if roots else set()
    touched: str | None = adapter_names[0]
    if tower:
        touched = _first_in_tower(adapter_names, tower, tensors.shards.keys() - tower, larger=larger)
    if touched:
        raise CheckpointError(
            f"{tensors.files.folder} holds {touched}, part of an adapter that was not merged: "
            f"{_merge_into('the model')}."
        )
    return (f"{adapter_names[0]} is part of an adapter that was not merged; it does not change the tower",)


def _first_in_tower(names: Iterable[str], tower: Iterable[str], others: Iterable[str], *, larger: bool) -> str | None:
    """Find the first tensor of an adapter that may be in the tower.

    An adapter may name a module with another prefix than the checkpoint does. So its module is taken to be the one in
    the checkpoint whose name shares the longest ending with it.
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
    """Return the path of the module that owns a tensor of a model or of its adapter."""
    parts = name.removeprefix("base_model.model.").split(".")
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        parts[at : at + 2] = []  # the name of the adapter follows
    parts = [part for part in parts if part not in _WRAPPED_WHOLE]
    end = next((at for at, part in enumerate(parts) if _ADAPTER_PART.match(part)), len(parts) - 1)
    return tuple(parts[:end])


def _ends(path: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [path[at:] for at in range(len(path))]
