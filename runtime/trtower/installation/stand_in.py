"""The module that takes a tower's place in a living model: an instance of the same class, with a bundle inside.

Shapes: B images, S pixels a side, P prefix tokens, N patches, D features a token (see spec.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from typing_extensions import Self

from trtower.errors import BackendError, ConfigError
from trtower.fingerprint import count_layers
from trtower.installation.find import TowerSlot
from trtower.installation.original import Original, wants_gradient
from trtower.tower.anchor import Anchor
from trtower.tower.outputs import BACK, POOLER_OUTPUT, Outputs
from trtower.tower.vision_model import named_as
from trtower.tower.vision_tower import VisionTower

OF_ANOTHER = ("forward", "_old_forward", "_hf_hook", "_compiled_call_impl")
"""What accelerate and torch.compile hang into a module, to run the one that it is."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
"""What a caller has registered on the tower, and goes on hearing from."""

CHANGE_THE_TOWER = ("output_attentions", "attention_mask", "head_mask", "bool_masked_pos", "pixel_attention_mask")
"""Options that have a vision model compute something else. Others reach it by the way, and change nothing there."""


class StandIn(nn.Module):
    """Answers like the vision model whose class it shares, without its weights.

    It gives every token of the layers of its bundle; what picks among them is the model's own code. Its one parameter
    is an empty anchor in the device and dtype of the tower that it replaced; it follows `.to`, `.half` and
    `requires_grad_` as that tower would.
    """

    config: Any
    _tower: VisionTower
    original: Original
    installation: Any
    anchor: Anchor
    _path: str
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
        """Turn pixels (B, 3, S, S) into a `BaseModelOutputWithPooling` of states (B, P + N, D) in this dtype.

        ``output_hidden_states`` may be layers, as in transformers 5. The states that the bundle holds are there, and
        the others raise ConfigError when they are read. S is the size that the bundle was made for, so there are no
        positions to interpolate. Raises ConfigError for an option that no bundle can follow, and InputError.
        """
        del interpolate_pos_encoding
        self._refuse_training(pixel_values)
        for name in CHANGE_THE_TOWER:
            if self._default(name, options.get(name), otherwise=False) is not False:
                raise ConfigError(f"{name} is not for {self._path}, which is compiled: {BACK}.")
        anchor = self.anchor.empty
        tokens: Tensor = self._tower.read_tokens(pixel_values).to(anchor.dtype)
        if anchor.requires_grad:
            tokens = _Ungraded.apply(tokens, anchor)  # type: ignore[no-untyped-call]
        wanted = self._default("output_hidden_states", output_hidden_states, otherwise=False)
        output = BaseModelOutputWithPooling(
            last_hidden_state=self._outputs.last_hidden_state(tokens),
            pooler_output=POOLER_OUTPUT,  # type: ignore[arg-type]
            hidden_states=None if wanted is False else self._outputs.hidden_states(tokens),  # type: ignore[arg-type]
        )
        return output if self._default("return_dict", return_dict, otherwise=True) else output.to_tuple()

    def _default(self, name: str, value: Any, *, otherwise: Any) -> Any:
        """Take an option as it was given, else from the config, as models of transformers do."""
        value = getattr(self.config, name, otherwise) if value is None else value
        return otherwise if value is None else value

    def _refuse_training(self, pixel_values: Any) -> None:
        if self.training:
            raise BackendError(
                f"{self._path} is compiled and cannot be trained: model.eval() to serve the model, or to train what is "
                f"around it {self._path}.eval(); {BACK}."
            )
        if isinstance(pixel_values, Tensor) and pixel_values.requires_grad and torch.is_grad_enabled():
            raise BackendError(f"pixel_values wants a gradient, which no engine gives: {BACK}.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Follow `.to(device)` of the model, and its casts."""
        self._tower._apply(fn)  # raises before anything has moved
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def take_back(self) -> nn.Module:
        """Return the tower that was replaced, with its weights, as this has come to be placed, cast and set."""
        return self.original.bring_back(self.anchor.empty, training=self.training)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the weights of the tower that was replaced, as the model's checkpoint has them."""
        del keep_vars
        for name, tensor in self.original.state_dict(self.anchor.empty.dtype).items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """Refuse weights that are meant for the tower: the engine cannot take them in."""
        *_, error_msgs = others
        if any(key.startswith(prefix) for key in state_dict):
            error_msgs.append(f"{prefix}* is for the eager tower, which is compiled: {BACK}.")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as err:
            original = vars(self).get("original")
            if original is not None and name in original.module._modules:
                raise AttributeError(
                    f"{self._path}.{name} is a part of the eager tower, which is compiled: {BACK}."
                ) from err
            raise

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise BackendError(
            f"{self._path} is compiled, and its engine belongs to this process: install the bundle where the model is "
            f"needed; to copy or pickle this one, {BACK}."
        )

    def extra_repr(self) -> str:
        """Tell what `print(model)` should show of this module."""
        return self._tower.extra_repr()


class _Ungraded(torch.autograd.Function):
    """Passes features on, and refuses the gradient of a tower that wants one."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, anchor: Tensor) -> Tensor:
        del ctx, anchor
        return tokens.view_as(tokens)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        del ctx, gradients
        raise BackendError(
            "a gradient reached the vision tower, which is compiled: requires_grad_(False) on it trains what is around "
            f"it; {BACK}."
        )


def make_stand_in(place: TowerSlot, tower: VisionTower, installation: Any) -> StandIn:
    """Make what takes the place of a tower; the tower, and the model around it, stay as they are."""
    module = place.module
    stand_in: StandIn = object.__new__(named_as(module.__class__, StandIn))
    nn.Module.__init__(stand_in)
    attributes = vars(stand_in)
    not_taken = {*attributes, *OF_ANOTHER} - {*HOOKS, "training"}
    attributes |= {name: value for name, value in vars(module).items() if name not in not_taken}
    first = next(module.parameters())
    stand_in.anchor = Anchor(module.dtype, first.device, requires_grad=wants_gradient(module))
    # Not registered: a module of its own would be seen by whoever walks the model.
    attributes |= {
        "_tower": tower,
        "original": Original(module),
        "installation": installation,
        "_path": place.path,
        "_outputs": Outputs(tower.bundle, count_layers(module, tower.spec.naming)),
    }
    return stand_in
