"""The modules that replace a tower, and its projector, in a loaded model: instances of the same classes.

Shapes: B images, S pixels per side, P prefix tokens, N patches, D features per token (see spec.py).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from typing_extensions import Self

from trtower.errors import BackendError, ConfigError
from trtower.fingerprint import count_layers
from trtower.installation.carried import Carried, beside, carry
from trtower.installation.find import Slot
from trtower.installation.original import Original, main_dtype, wants_gradient
from trtower.installation.prismatic import SECOND_LAST, for_engine, is_prismatic, pictures_of
from trtower.installation.projector import Projected
from trtower.tower.anchor import Anchor
from trtower.tower.outputs import BACK, POOLER_OUTPUT, Outputs
from trtower.tower.vision_model import named_as
from trtower.tower.vision_tower import VisionTower

OF_ANOTHER = ("forward", "_old_forward", "_hf_hook", "_compiled_call_impl")
"""Attributes by which accelerate and torch.compile run the module that they were set on; the stand-in omits them."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
"""Hooks that were registered on the tower; the stand-in keeps calling them."""

CHANGE_THE_TOWER = ("output_attentions", "attention_mask", "head_mask", "bool_masked_pos", "pixel_attention_mask")
"""Options that change what a vision model computes. Models also pass it other options, which change nothing."""


class Replacement(nn.Module):
    """Stands in for a module of a model, without its weights, as an instance of the same class.

    Its only parameter is an empty anchor on the device and in the main dtype of the module that it replaced. It
    follows `.to`, `.half` and `requires_grad_` as the module would.
    """

    original: Original
    installation: Any
    anchor: Anchor
    _path: str

    def take_back(self) -> nn.Module:
        """Return the replaced module with its weights, on this module's device, in its dtype and mode."""
        return self.original.bring_back(self.anchor.empty, training=self.training)

    def _refuse_training(self) -> None:
        if self.training:
            raise BackendError(
                f"{self._path} is compiled and cannot be trained: call model.eval() to serve the model, or "
                f"model.{self._path}.eval() to train the rest of it; {BACK}."
            )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the replaced module's weights, under the names of the model's checkpoint."""
        del keep_vars
        for name, tensor in self.original.state_dict(self.anchor.empty.dtype).items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """Refuse weights for the module, because the engine cannot load them."""
        *_, error_msgs = others
        if any(key.startswith(prefix) for key in state_dict):
            error_msgs.append(f"{prefix}* cannot be loaded, because the tower is compiled: {BACK}.")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as err:
            original = vars(self).get("original")
            if original is not None and name in original.module._modules:
                raise AttributeError(
                    f"{self._path}.{name} is a part of the eager tower, which was replaced: {BACK}."
                ) from err
            raise

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise BackendError(
            f"{self._path} is compiled, and its engine belongs to this process: install the bundle in the process "
            f"that needs it. To copy or pickle this model: {BACK}."
        )


class StandIn(Replacement):
    """Answers like the vision model whose class it shares, without its weights.

    It returns every token of the layers in its bundle, and the model's own code picks among them.
    """

    config: Any
    _tower: VisionTower
    _outputs: Outputs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor | None = None,
        *,
        output_hidden_states: bool | int | list[int] | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        **options: Any,
    ) -> Any:
        """Turn pixels (B, 3, S, S) into a `BaseModelOutputWithPooling` of states (B, P + N, D) in the anchor's dtype.

        With ``return_dict=False`` the result is a tuple. ``output_hidden_states`` may name layers, as in transformers
        5, but all states are returned. A state that the bundle does not hold raises ConfigError when it is read. S is
        the bundle's image size, so there are no positions to interpolate. Raises ConfigError for an option that no
        bundle supports, InputError for pixels of another type, shape or dtype, and BackendError in training mode or if
        ``pixel_values`` requires a gradient.
        """
        del interpolate_pos_encoding
        self._refuse_training()
        self._refuse_gradient(pixel_values)
        for name in CHANGE_THE_TOWER:
            if self._default(name, options.get(name), otherwise=False) is not False:
                raise ConfigError(f"{self._path} is compiled and does not support {name}: {BACK}.")
        mask = options.get("patch_attention_mask")  # Idefics3 and SmolVLM always pass it
        if mask is not None and not mask.all():
            raise ConfigError(
                f"{self._path} is compiled and cannot mask patches, but patch_attention_mask masks "
                f"{int((~mask.bool()).sum())}: pass pictures that fill their tiles, with a pixel_attention_mask of "
                f"ones, or none; {BACK}."
            )
        tokens = self._read_tokens(pixel_values)
        layers = self._default("output_hidden_states", output_hidden_states, otherwise=False)
        output = BaseModelOutputWithPooling(
            last_hidden_state=self._outputs.last_hidden_state(tokens),
            pooler_output=POOLER_OUTPUT,  # type: ignore[arg-type]
            hidden_states=None if layers is False else self._outputs.hidden_states(tokens),  # type: ignore[arg-type]
        )
        return output if self._default("return_dict", return_dict, otherwise=True) else output.to_tuple()

    def _refuse_gradient(self, pixel_values: Any) -> None:
        if isinstance(pixel_values, Tensor) and pixel_values.requires_grad and torch.is_grad_enabled():
            raise BackendError(f"pixel_values requires a gradient, which no engine computes: {BACK}.")

    def _read_tokens(self, pixel_values: Any) -> Tensor:
        """Return every token of the states that the bundle holds, or of states that carry its features."""
        anchor = self.anchor.empty
        features: Tensor = self._tower.read_tokens(pixel_values).to(anchor.dtype)
        if anchor.requires_grad:
            features = _Ungraded.apply(features, anchor)  # type: ignore[no-untyped-call]
        return carry(features, self._tower.spec) if self._tower.spec.head else features

    def _default(self, name: str, value: Any, *, otherwise: Any) -> Any:
        """Return an option's value, or else the config's, as models of transformers do."""
        value = getattr(self.config, name, otherwise) if value is None else value
        return otherwise if value is None else value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow the model's `.to(device)` and its casts."""
        self._tower._apply(fn)  # raises before anything has moved
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of this module."""
        return self._tower.extra_repr()


class PrismaticStandIn(StandIn):
    """Answers like the vision backbone of OpenVLA or Prismatic."""

    _made_of: Mapping[str, Any]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return the patches (B, N, D) of the second-last block for pixels (B, 3, S, S), or (B, 6, S, S) for a pair.

        C pictures at a time are (B, 6 * C, S, S), and become (B, C * N, D). Raises InputError for pixels of another
        type, shape or dtype, and for six channels that are not one picture, and BackendError in training mode or if
        ``pixel_values`` requires a gradient.
        """
        self._refuse_training()
        self._refuse_gradient(pixel_values)
        pictures = pictures_of(self)
        states = self._outputs.hidden_states(self._read_tokens(for_engine(pixel_values, self._made_of, pictures)))
        return beside(states[SECOND_LAST][:, self._tower.spec.num_prefix_tokens :], pictures)

    def get_num_patches(self) -> int:
        """Return N, as OpenVLA-OFT's backbone does."""
        return self._tower.spec.num_patches


class ProjectorStandIn(Replacement):
    """Answers like the projector whose class it shares, with the features that the engine has already computed."""

    _layers: tuple[int, ...]
    _projected: Projected
    _divisor: float

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the features that came with the hidden states, in their dtype, (B, …) as the projector returns them.

        Raises ConfigError if ``states`` are not those of the compiled tower that its head has read, and BackendError in
        training mode.
        """
        del args, kwargs
        self._refuse_training()
        if not isinstance(states, Carried):
            raise ConfigError(
                f"{self._path} got a {type(states).__name__} that its compiled tower did not return: {BACK}."
            )
        features, found = states.features.to(states.device), self._projected
        if len(states) != len(features):
            raise ConfigError(f"{self._path} got {len(states)} rows for {len(features)} images: {BACK}.")
        if (states.layers, tuple(states.shape[1:])) != (self._layers, found.given):
            raise ConfigError(
                f"{self._path} got states {states.layers} of shape {tuple(states.shape[1:])}, but the engine projects "
                f"{self._layers} of shape {found.given}: leave the model's layer and tokens as they were when the "
                f"bundle was installed; {BACK}."
            )
        if self.anchor.empty.requires_grad:
            features = _Ungraded.apply(features, self.anchor.empty)  # type: ignore[no-untyped-call]
        if self._divisor != 1.0:  # the model's code divides again
            features = features * self._divisor
        return features.to(states.dtype).reshape(len(features), *found.row)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of this module."""
        return "computed by the tower's engine"


class _Ungraded(torch.autograd.Function):
    """Passes features on, and raises if a gradient reaches a tower that requires one."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, anchor: Tensor) -> Tensor:
        del ctx, anchor
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        del ctx, gradients
        raise BackendError(
            "a gradient reached the vision tower, which is compiled: call requires_grad_(False) on it to train the "
            f"rest of the model; {BACK}."
        )


def make_stand_in(place: Slot, tower: VisionTower, installation: Any) -> StandIn:
    """Make the stand-in for a tower. Neither the tower nor the model is changed."""
    outputs = Outputs(tower.bundle, count_layers(place.vision, tower.spec.naming), carried=tower.spec.head is not None)
    of_tower = {"_tower": tower, "_outputs": outputs}
    if is_prismatic(place.module):
        of_tower["_made_of"] = place.made_of
    kind = PrismaticStandIn if is_prismatic(place.module) else StandIn
    stand_in: StandIn = make_replacement(place, kind, installation, **of_tower)
    return stand_in


def make_replacement(place: Slot, kind: Any, installation: Any, **attributes: Any) -> Any:
    """Make an instance of ``kind`` that is also one of the class of the module that it will replace."""
    module = place.module
    made: Any = object.__new__(named_as(module.__class__, kind))
    nn.Module.__init__(made)
    held = vars(made)
    omitted = {*held, *OF_ANOTHER} - {*HOOKS, "training"}
    held |= {name: value for name, value in vars(module).items() if name not in omitted}
    first = next(module.parameters(), installation.tower.dummy_feature)
    made.anchor = Anchor(main_dtype(module) or first.dtype, first.device, requires_grad=wants_gradient(module))
    # Bypass nn.Module.__setattr__, which would register the tower as a child that code walking the model would see.
    held |= {"original": Original(module), "installation": installation, "_path": place.path, **attributes}
    return made
