"""Turn what the user named (a hub id, a Hugging Face folder, a recipe) into a config and a way to load the model.

Nothing that could run code is trusted by default: weights come from safetensors, pickles and remote code are
refused unless an option asks for them. Loading is strict, because a tensor that is silently missing leaves a
random layer behind.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from torch import nn

from trtower.errors import CheckpointError
from trtower.spec import TowerSpec, normalise_layers
from trtower_export.families import Family, family_of
from trtower_export.recipes import Recipe, all_recipes, find_recipe

HUB_TIMEOUT_S = 5.0
RANDOM_SEED = 0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What a checkpoint may do that could run its author's code. Both are off unless the user asks."""

    allow_pickle: bool = False
    remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A tower's config, and where its weights are: in ``folder``, or nowhere for a rehearsal.

    ``revision`` is the commit on the hub; ``preprocessor`` is None where the checkpoint does not say.
    """

    name: str
    source: str
    revision: str | None
    recipe: Recipe | None
    family: Family
    config: Any
    preprocessor: dict[str, Any] | None
    folder: Path | None
    trust: Trust

    @property
    def random_weights(self) -> bool:
        """Whether the weights are drawn and not read: a rehearsal."""
        return self.folder is None

    def spec(self, select_layer: int | list[int], select_feature: str) -> TowerSpec:
        """Describe the tower that these layers make; raise ConfigError where they cannot be."""
        return TowerSpec(
            family=self.family.name,
            image_size=self.config.image_size,
            patch_size=self.config.patch_size,
            num_layers=self.config.num_hidden_layers,
            num_prefix_tokens=self.family.num_prefix_tokens(self.config),
            width=self.config.hidden_size,
            layers=normalise_layers(select_layer, self.config.num_hidden_layers),
            select_feature=select_feature,
        )

    def load_model(self) -> nn.Module:
        """Load the full, uncut tower in FP32 on the CPU; with random weights, the same ones every time."""
        with quiet_transformers():
            model = self._load_weights(self.folder) if self.folder else self._draw_weights()
        return model.eval().requires_grad_(requires_grad=False)

    def _draw_weights(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            model_class = getattr(transformers, self.family.model_class)
            model: nn.Module = model_class._from_config(self.config, attn_implementation="sdpa", dtype=torch.float32)
        return model

    def _load_weights(self, folder: Path) -> nn.Module:
        use_safetensors = _find_weights(folder, self.trust)
        remote = self.trust.remote_code and hasattr(self.config, "auto_map")
        model_class = transformers.AutoModel if remote else getattr(transformers, self.family.model_class)
        try:
            model, report = model_class.from_pretrained(
                folder,
                config=self.config,
                dtype=torch.float32,
                attn_implementation="sdpa",
                use_safetensors=use_safetensors,
                output_loading_info=True,
                **({"trust_remote_code": True} if remote else {}),
            )
        except (OSError, RuntimeError, ValueError, SafetensorError) as err:
            raise CheckpointError(f"{folder}: the weights could not be read: {_first_line(err)}") from err
        missing = sorted(name for name in report["missing_keys"] if not name.endswith("position_ids"))
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} tensors of a {self.family.model_class}, {missing[0]} among them: "
                "the layers without weights would be random. Is this the whole checkpoint?"
            )
        loaded: nn.Module = model
        return loaded


def open_checkpoint(
    source: str,
    *,
    random_weights: bool = False,
    revision: str | None = None,
    trust: Trust | None = None,
) -> Checkpoint:
    """Find a checkpoint and read its config; weights are left for `load_model`.

    Raises CheckpointError where it cannot be found, is no checkpoint, has no family, or wants more trust.
    """
    trust = trust or Trust()
    recipe = find_recipe(source)
    local = Path(source).expanduser()
    folder: Path | None = None
    if local.is_dir():
        identity, folder = str(local.resolve()), local
    elif random_weights and recipe:
        identity = recipe.checkpoint
    else:
        identity = recipe.checkpoint if recipe else source
        folder, revision = _download(identity, revision, trust, weights=not random_weights)
    if folder:
        config, preprocessor = _read_config(folder, trust), _read_preprocessor(folder)
    else:
        assert recipe is not None  # noqa: S101 - narrows the type
        config, preprocessor = transformers.AutoConfig.for_model(**recipe.config), recipe.preprocessor
    family = family_of(config.model_type)
    return Checkpoint(
        name=Path(identity).name,
        source=identity,
        revision=revision,
        recipe=recipe,
        family=family,
        config=getattr(config, "vision_config", config),
        preprocessor=preprocessor,
        folder=None if random_weights else folder,
        trust=trust,
    )


def _read_config(folder: Path, trust: Trust) -> Any:
    raw = _read_json(folder / "config.json")
    if raw is None:
        raise CheckpointError(f"{folder} is no checkpoint: it has no config.json. A Hugging Face model folder has one.")
    family_of(str(raw.get("model_type")))
    if "auto_map" in raw and not trust.remote_code:
        raise CheckpointError(
            f"{folder}/config.json asks for code of its own (auto_map), which is not run unless you trust its author: "
            "--trust-remote-code. A checkpoint of a standard class needs no auto_map: remove it from a copy."
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust.remote_code)
    except (OSError, ValueError, TypeError, KeyError) as err:
        raise CheckpointError(f"{folder}/config.json could not be read: {_first_line(err)}") from err


def _read_preprocessor(folder: Path) -> dict[str, Any] | None:
    """Read how images are prepared, from where transformers 4 or 5 writes it."""
    processor = _read_json(folder / "processor_config.json") or {}
    return _read_json(folder / "preprocessor_config.json") or processor.get("image_processor")


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as err:
        raise CheckpointError(f"{path} is not JSON: {err}") from err
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}; an object is expected.")
    return data


def _find_weights(folder: Path, trust: Trust) -> bool:
    """Tell whether a folder has safetensors; raise CheckpointError where only pickles, or nothing, is there."""
    index = _read_json(folder / "model.safetensors.index.json")
    if (folder / "model.safetensors").is_file():
        return True
    if index is not None:
        shards = set(map(str, index.get("weight_map", {}).values()))
        for shard in sorted(shards):
            if not shard.endswith(".safetensors") or Path(shard).name != shard:
                raise CheckpointError(
                    f"{folder}/model.safetensors.index.json names {shard!r} as a shard: only .safetensors files "
                    "beside it are read."
                )
        return True
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if not pickles:
        raise CheckpointError(f"{folder} holds no weights: a model.safetensors, or shards of one, is expected.")
    if not trust.allow_pickle:
        raise CheckpointError(
            f"{folder} holds its weights only as a pickle ({pickles[0]}), which may run code when it is read. "
            "Convert it to safetensors, or pass --allow-pickle if you trust its author."
        )
    return False


def _download(repo: str, revision: str | None, trust: Trust, *, weights: bool) -> tuple[Path, str | None]:
    """Fetch a repository's configs, and weights, from the hub or its cache; also give the commit they are of."""
    wanted = ["*.json"]
    if weights:
        wanted += ["*.safetensors"] + (["*.bin"] if trust.allow_pickle else [])
    if trust.remote_code:
        wanted.append("*.py")
    if repo.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{repo} is not a folder. Name a Hugging Face model folder, or a hub id such as {_KNOWN}."
        )
    unreachable = None
    try:
        # Asked first, because snapshot_download has no time limit for a hub that accepts and never answers.
        revision = HfApi().model_info(repo, revision=revision, timeout=HUB_TIMEOUT_S).sha
    except HFValidationError as err:
        raise CheckpointError(f"{repo} is neither a folder nor a hub id such as {_KNOWN}.") from err
    except HfHubHTTPError as err:
        raise CheckpointError(f"the hub refused {repo}: {_first_line(err)}") from err
    except Exception as err:  # noqa: BLE001 - the hub's transport, and so its errors, changed twice between releases
        unreachable = err
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=wanted,
            ignore_patterns=["*/*"],
            etag_timeout=HUB_TIMEOUT_S,
            local_files_only=unreachable is not None,
        )
    except OSError as err:
        if unreachable is None:
            raise CheckpointError(f"{repo} could not be downloaded: {_first_line(err)}") from err
        recipes = ", ".join(recipe.checkpoint for recipe in all_recipes())
        raise CheckpointError(
            f"{repo} is not a folder here, and the hub could not be reached ({_first_line(unreachable)}). Two ways "
            "out: download it elsewhere and name its folder, or rehearse one that has a recipe: --random-weights with "
            f"{recipes}."
        ) from unreachable
    if unreachable:
        logger.warning("the hub could not be reached (%s): %s is taken from its cache", unreachable, repo)
    return Path(folder), revision


_KNOWN = "openai/clip-vit-large-patch14-336"


def _first_line(err: Exception) -> str:
    lines = str(err).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(err).__name__


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own bars and advice out of ours while it loads."""
    log = transformers.utils.logging
    verbosity, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bar:
            log.enable_progress_bar()
