"""Turn what the user named (a hub id, a folder, a file, a recipe) into a tower's config and a way to load its weights.

Nothing that could run code is trusted by default: weights come from safetensors, and pickles and the checkpoint's own
code are refused unless an option allows them. Loading is strict, because a tensor that is silently missing leaves a
random layer behind.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from trtower.bundle.manifest import Source
from trtower.errors import CheckpointError, ConfigError, TrtowerError, one_line
from trtower.fingerprint import read_parameters
from trtower.layer_codes import FEATURE_CODES, LayerCode, read_layer_code
from trtower.names import check_name
from trtower.spec import DEFAULT_BATCH, BatchProfile, TowerSpec
from trtower_export.checkpoint.files import Files, download, expanded
from trtower_export.checkpoint.layout import Layout, Request
from trtower_export.checkpoint.layouts import from_recipe, recognise, recognise_file
from trtower_export.checkpoint.tensors import Tensors
from trtower_export.families import Family, family_of
from trtower_export.options import Trust
from trtower_export.recipes import Recipe, find_recipe

DEFAULT_LAYER = -2
"""LLaVA's default, for a checkpoint that does not say which layer it reads."""

OF_TRAINING = ("mask_token", "position_ids")
"""Tensors that only training reads, or that are computed anyway."""

RANDOM_SEED = 0


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A tower and where it came from. `open_checkpoint` makes one.

    Attributes:
        name: Last part of the hub id or path; for a file, without its suffix.
        source: Hub id, or absolute path of the folder or file.
        revision: Commit on the hub, if the files came from there; if the hub could not be reached, the revision that
            the user named, or None.
        recipe: The recipe of this checkpoint, if there is one.
        layout: What was recognised in its files.
        trust: Whether pickles and the checkpoint's own code are allowed.
        tower: The name that the user gave to choose one of several towers.
    """

    name: str
    source: str
    revision: str | None
    recipe: Recipe | None
    layout: Layout
    trust: Trust
    tower: str | None = None

    @property
    def family(self) -> Family:
        """The tower's architecture."""
        return self.layout.family

    @property
    def config(self) -> Any:
        """The vision config, an object of transformers."""
        return self.layout.config

    @property
    def random_weights(self) -> bool:
        """Whether this is a rehearsal, whose weights are drawn instead of read."""
        return self.layout.tensors is None

    @property
    def bundle_name(self) -> str:
        """The default name of its bundle."""
        return f"{self.name}.rehearsal" if self.random_weights else self.name

    @property
    def profiles(self) -> tuple[BatchProfile, ...]:
        """The batch profiles that its plans are tuned for by default: for a robot policy, all its cameras at once."""
        if cameras := self.layout.cameras:
            return (BatchProfile(min=1, opt=cameras, max=cameras),)
        return (self.recipe.batch if self.recipe else DEFAULT_BATCH,)

    def describe(self) -> str:
        """Return one line that says what was recognised, and where in it the tower lies."""
        beside = " beside ".join(family_of(part.model_type).name for part in getattr(self.config, "parts", ()))
        line = f"{self.layout.kind}, {self.family.name} tower{f' ({beside})' if beside else ''}"
        tensors = self.layout.tensors
        if tensors is None:
            return f"{line} with random weights"
        if self.layout.root:
            line += f" at {self.layout.root.rstrip('.')}"
        place = tensors.files.repo or str(tensors.files.folder.resolve())
        return line if place in (self.source, str(Path(self.source).parent)) else f"{line} from {place}"

    def spec(
        self,
        select_layer: LayerCode | None = None,
        select_feature: str | None = None,
        image_size: int | None = None,
    ) -> TowerSpec:
        """Describe the cut tower.

        Args:
            select_layer: Layer code: a hidden state, a list of them, or "last_hidden_state". By default the
                checkpoint's, else its recipe's, else LLaVA's -2.
            select_feature: "patch" (without the prefix tokens), "cls_patch" (with them), or a slice of LLaVA-NeXT.
                By default the checkpoint's, else its recipe's, else "patch".
            image_size: S, in pixels a side. By default the checkpoint's, else its recipe's, else the config's.

        Returns:
            The spec, with the layers as indices of hidden states.

        Raises:
            ConfigError: if a code is invalid, the patches are not square, or the tower cannot accept this image size.
            CheckpointError: if ``select_layer`` is None and the model does not say which layer it reads, or its layer
                code is wrong; or if ``select_feature`` is None and the model drops the first token of a tower that does
                not have exactly one prefix token.
        """
        layout, recipe = self.layout, self.recipe
        if select_feature is not None:
            check_name("select_feature", select_feature, FEATURE_CODES)
        layer = layout.select_layer if select_layer is None else select_layer
        feature = layout.select_feature if select_feature is None else select_feature
        if layer is None and layout.said_as:
            raise CheckpointError(
                f"{self.source} does not say which layer of its tower it reads: choose one with --select-layer."
            )
        if layer is None:
            layer = recipe.select_layer if recipe else DEFAULT_LAYER
        if feature is None:
            feature = recipe.select_feature if recipe else "patch"
        prefix = self.family.num_prefix_tokens(self.config)
        if select_feature is None and layout.drops_first and prefix != 1:
            first = f"one of {prefix} prefix tokens" if prefix else "a patch, not a CLS token"
            raise CheckpointError(
                f"{self.source}: {layout.drops_first} drops the first token, which in a {self.family.name} tower is "
                f"{first}. Choose what to keep: --select-feature cls_patch keeps every token, patch every patch."
            )
        if select_layer is None and layout.select_layer is not None:
            self._check_layer(layer, feature)
        if image_size is None:
            image_size = layout.image_size or (recipe.image_size if recipe else None)
        return self.family.spec(self.config, layer, feature, image_size)

    def _check_layer(self, layer: LayerCode, feature: str) -> None:
        try:
            read_layer_code(layer, feature, self.config.num_hidden_layers)
        except ConfigError as err:
            raise CheckpointError(
                f"{self.source}/config.json: {self.layout.said_as}={layer!r}, for {feature} tokens, cannot be read: "
                f"{err} Choose with --select-layer and --select-feature."
            ) from err

    def config_at(self, image_size: int) -> Any:
        """Return the vision config that model code reads as `tower.config`.

        Args:
            image_size: S, in pixels a side.

        Returns:
            The checkpoint's own config if it is for S pixels, else a copy that is.
        """
        if getattr(self.config, "image_size", None) == image_size:
            return self.config
        config = copy.deepcopy(self.config)
        config.image_size = image_size
        return config

    def load_model(self, spec: TowerSpec | None = None) -> nn.Module:
        """Load the full, uncut tower in FP32 on the CPU. A rehearsal gets the same random weights every time.

        Args:
            spec: The cut that will be made. Tensors that it does not read may then be missing: LLaVA-NeXT saves its
                SigLIP without the layer and the head that it drops. By default every tensor must be there.

        Returns:
            The transformers model, in eval mode and without gradients.

        Raises:
            CheckpointError: if a tensor is missing, unknown, quantised or of another shape, or if the files or the
                config cannot be read.
        """
        try:
            with quiet_transformers():
                tensors = self.layout.tensors
                model = self._draw_weights() if tensors is None else self._load_weights(tensors, spec)
        except TrtowerError:
            raise
        except Exception as err:  # a wrong value in a config can make transformers raise anything
            raise CheckpointError(f"{self.source}: transformers could not build the tower: {one_line(err)}") from err
        return model.eval().requires_grad_(requires_grad=False)

    def _draw_weights(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            model: nn.Module = self.family.vision_class._from_config(
                self.config, attn_implementation="sdpa", dtype=torch.float32
            )
        return model

    def _load_weights(self, tensors: Tensors, spec: TowerSpec | None) -> nn.Module:
        folder = tensors.files.folder
        model_class = self._model_class(folder)
        weights = self._read_weights(tensors, model_class)
        model, report = model_class.from_pretrained(
            None,
            config=self.config,
            state_dict=weights,
            dtype=torch.float32,
            attn_implementation="sdpa",
            ignore_mismatched_sizes=True,  # reports them, to be refused below
            output_loading_info=True,
        )
        loaded: nn.Module = model
        self._refuse_mismatched(loaded, weights, report["mismatched_keys"], folder)
        self._refuse_unknown(report["unexpected_keys"], folder)
        self._refuse_missing(loaded, set(report["missing_keys"]), spec, folder)
        return loaded

    def _model_class(self, folder: Path) -> Any:
        auto_map = getattr(self.config, "auto_map", None) or {}
        if self.trust.remote_code and "AutoModel" in auto_map:
            return get_class_from_dynamic_module(auto_map["AutoModel"], folder)
        return self.family.vision_class

    def _read_weights(self, tensors: Tensors, model_class: Any) -> dict[str, Tensor]:
        """Read the tower's tensors under the names that the installed transformers uses."""
        weights = {name.removeprefix(self.layout.root): tensor for name, tensor in tensors.read().items()}
        if self.layout.translate:
            weights = self.layout.translate(weights)
        return self.family.named_in(model_class, self.config, weights)

    def _refuse_mismatched(
        self, model: nn.Module, weights: dict[str, Tensor], mismatched: Iterable[Any], folder: Path
    ) -> None:
        for mismatch in mismatched:
            # transformers 4.57 reports only the name.
            name, *shapes = [mismatch] if isinstance(mismatch, str) else mismatch
            shape = tuple(shapes[0] if shapes else weights[name].shape)
            expected = tuple(model.get_parameter(name).shape)
            raise CheckpointError(
                f"{folder}: {self._name_in_checkpoint(name)} has shape {shape}; its config expects {expected}. Use the "
                "config.json that belongs to these weights."
            )

    def _refuse_unknown(self, unexpected: Iterable[str], folder: Path) -> None:
        """Refuse weights that the config does not describe: they make another tower.

        With one layer more, for example, -2 is another layer.
        """
        stem, naming = self.family.patch_embedding.partition(".")[0], self.family.naming_in(self.config)
        for name in sorted(unexpected):
            layer = naming.find_layer(name)
            if layer is not None and layer >= self.config.num_hidden_layers:
                raise CheckpointError(
                    f"{folder} holds {self._name_in_checkpoint(name)}, but its config has num_hidden_layers="
                    f"{self.config.num_hidden_layers}. Use the config.json that belongs to these weights."
                )
            if (layer is not None or f"{stem}." in name) and not name.endswith(OF_TRAINING):
                raise CheckpointError(
                    f"{folder} holds {self._name_in_checkpoint(name)}, but its config describes a "
                    f"{self.family.model_class} without it, which is another tower. Use the config.json that belongs "
                    "to these weights."
                )

    def _name_in_checkpoint(self, name: str) -> str:
        """Return a tensor's name in the checkpoint, as far as that is known."""
        return name if self.layout.translate else f"{self.layout.root}{self.family.naming.inside(name)}"

    def _refuse_missing(self, model: nn.Module, missing: set[str], spec: TowerSpec | None, folder: Path) -> None:
        parameters = dict(model.named_parameters())
        if spec is not None:
            needed = {id(parameter) for parameter in read_parameters(model, spec)}
            missing = {name for name in missing if id(parameters.get(name)) in needed}
        missing &= parameters.keys()
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} tensors of a {self.family.model_class}, including {min(missing)}: "
                "layers without weights would be random. A shard is missing, or the tower is in another folder: export "
                "a complete checkpoint."
            )


def open_checkpoint(
    source: str,
    *,
    random_weights: bool = False,
    revision: str | None = None,
    trust: Trust | None = None,
    tower: str | None = None,
) -> Checkpoint:
    """Find a checkpoint, recognise it, and download the files that hold its tower. No tensor is read yet.

    Args:
        source: A folder, an OpenCLIP file, a hub id, or the name of a recipe.
        random_weights: Rehearse with random weights instead of the checkpoint's. With a recipe this needs no hub.
        revision: Branch, tag or commit on the hub. By default the newest.
        trust: Whether to allow pickles and the checkpoint's own code. By default neither.
        tower: Which of several towers to read: what the names of its tensors begin with, or a part of that.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: if it cannot be found, is not a checkpoint, belongs to no family, does not hold this tower, or
            needs more trust.
    """
    if not source.strip():
        raise CheckpointError("no checkpoint named: expected a folder, an OpenCLIP file, a hub id or a recipe.")
    source = source.rstrip("/") or source
    request = Request(trust=trust or Trust(), weights=not random_weights, tower=tower)
    recipe = find_recipe(source)
    local = expanded(source)
    identity = recipe.checkpoint if recipe else source
    if local.is_dir():
        identity, layout = str(local.resolve()), recognise(Files(folder=local), request)
    elif local.is_file():
        identity, layout = str(local.resolve()), recognise_file(local, request)
    elif random_weights and recipe:
        layout = from_recipe(recipe)
    else:
        files = download(identity, revision)
        revision, layout = files.revision, recognise(files, request)
    return Checkpoint(
        name=Path(identity).stem if local.is_file() else Path(identity).name,
        source=identity,
        revision=revision,
        recipe=recipe,
        layout=layout,
        trust=request.trust,
        tower=tower,
    )


def reopen_checkpoint(
    source: Source, *, moved_to: str | None = None, tower: str | None = None, trust: Trust | None = None
) -> Checkpoint:
    """Open the checkpoint that a bundle was exported from, where it was then or at ``moved_to``."""
    return open_checkpoint(
        moved_to or source.checkpoint,
        random_weights=source.random_weights,
        revision=None if moved_to else source.revision,
        tower=tower or source.tower,
        trust=trust,
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' own progress bars and advice while it loads."""
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
