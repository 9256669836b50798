"""Compare the actions of a robot policy with its eager tower, and with a bundle in its place.

Both act on the same observations, from the same noise. So does the policy with PyTorch's own tower in the bundle's
precision: what that changes is the error that half precision has anyway, and the bundle is judged against it.

Shapes: T steps in a chunk of actions, J joints, B observations of 1.
"""

import contextlib
import copy
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from trtower.bundle.bundle import Bundle
from trtower.dtypes import DTYPES
from trtower.errors import CheckpointError, ConfigError, InputError, MissingExtraError, one_line
from trtower.installation.find import find_tower
from trtower.installation.install import install
from trtower.spec import EIGHT_BIT, PRECISIONS
from trtower_export.console import Progress
from trtower_export.policies import refuse_other_policy

DRAWN = 4
"""How many observations are drawn if none are named."""

SEED = 0
RATIO, LEAST = 2.0, 1e-5
"""A bundle may change the actions by twice what PyTorch's own tower in its precision does, and always by the second, as
a share of the actions. The order of sums alone changes them by 1e-7 to 1e-6."""

COMPARED = ("pi0", "pi05", "pi0_fast", "smolvla")
"""The `type` of LeRobot's policies whose inputs are known here."""

LONGEST = 300
"""Characters of another library's error in a message."""

IMAGES, STATE = "observation.images.", "observation.state"
TOKENS, MASK = "observation.language.tokens", "observation.language.attention_mask"
HOW_TO_RECORD = "safetensors.torch.save_file of the batches that the policy's preprocessor returned, stacked"


@dataclass(frozen=True, kw_only=True)
class Joint:
    """How far the actions of one joint are apart, in the policy's own units.

    Attributes:
        name: The joint's name, or its number if the policy does not name it.
        spread: The standard deviation of the eager policy's actions.
        largest: The largest difference.
        mean: The mean difference.
        own: The largest difference if PyTorch's own tower runs in the bundle's precision; None if that is FP32.

    A figure that is not finite is None, too.
    """

    name: str
    spread: float | None
    largest: float | None
    mean: float | None
    own: float | None


@dataclass(frozen=True, kw_only=True)
class PolicyCheck:
    """The actions of a policy with a bundle in it, against those of the eager policy.

    Attributes:
        policy: The policy's class and library.
        observations: What it acted on, such as "4 drawn observations".
        backend: What ran the bundle.
        joints: The figures of each joint.
        relative_error: The difference of all actions, as a share of their length; None if it is not finite.
        own_error: The same of PyTorch's own tower in the bundle's precision; None if that is FP32.
        limit: The largest relative error that is allowed.
    """

    policy: str
    observations: str
    backend: str
    joints: tuple[Joint, ...]
    relative_error: float | None
    own_error: float | None
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the actions are near enough."""
        return self.relative_error is not None and self.relative_error <= self.limit


def check_policy(
    bundle: Bundle, source: Path, observations: Path | None, progress: Progress, *, backend: str = "auto"
) -> PolicyCheck:
    """Act with a policy, with the bundle in it and without.

    Args:
        bundle: The bundle of the policy's tower.
        source: The folder or the hub id of one of LeRobot's policies.
        observations: A file of safetensors with N of each input of the policy; None draws some.
        progress: Receives every step.
        backend: What runs the bundle, as in `install`.

    Returns:
        The differences.

    Raises:
        CheckpointError: The source is no policy that can be loaded here.
        InputError: The observations cannot be read, lack an input, or do not fit the policy.
        MissingExtraError: LeRobot is not installed.
        ConfigError: The bundle is not of this policy's tower, or is in 8 bits.
    """
    check_named(bundle, source)
    with progress.step("Load the policy"):
        policy = load_policy(source)
    batches = read_observations(observations, policy) if observations else draw_observations(policy)
    absent = [name for name in _cameras_of(policy) if name not in batches[0]]
    with progress.step(f"Act on {len(batches)} observations"):
        expected = act(policy, batches)
    own = None
    if bundle.manifest.precision != "fp32":
        dtype = DTYPES[PRECISIONS[bundle.manifest.precision].dtype]
        with progress.step("Act with PyTorch's tower in the bundle's precision"), in_precision(policy, dtype):
            own = act(policy, batches)
    with progress.step("Act with the bundle"), install(policy, bundle.path, backend=backend) as installation:
        actual, ran = act(policy, batches), installation.tower.backend
    own_error = None if own is None else _relative(own, expected)
    kind = f"{len(batches)} observations of {observations}" if observations else f"{len(batches)} drawn observations"
    kind += f" without {' and '.join(absent)}" if absent else ""
    return PolicyCheck(
        policy=f"{type(policy).__name__} of lerobot {sys.modules['lerobot'].__version__}",
        observations=kind,
        backend=ran,
        joints=tuple(_joints(policy, actual, expected, own)),
        relative_error=_relative(actual, expected),
        own_error=own_error,
        limit=max(LEAST, RATIO * (own_error or 0.0)),
    )


def check_named(bundle: Bundle, source: Path) -> None:
    """Raise ConfigError for a bundle, or CheckpointError for a folder, that cannot be compared; loads nothing."""
    precision = bundle.manifest.precision
    if precision in EIGHT_BIT:
        raise ConfigError(
            f"{bundle.path} is in {precision}, and PyTorch has no tower in 8 bits to judge its actions by: leave out "
            "--policy, or export in fp16 or bf16."
        )
    if not source.is_dir():
        return
    try:
        raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{source} is not a policy: its config.json cannot be read ({one_line(err)}).") from err
    if not isinstance(raw, dict) or not isinstance(raw.get("type"), str):
        raise CheckpointError(f"{source} is not a policy of LeRobot: its config.json has no type.")
    if raw["type"] not in COMPARED:
        refuse_other_policy(raw, source)
        known = ", ".join(COMPARED)
        raise CheckpointError(
            f"{source} is LeRobot's policy {raw['type']!r}, which is not compared; these are: {known}."
        )


def load_policy(source: Path) -> Any:
    """Load one of LeRobot's policies by folder or hub id, in eval mode. What it prints goes to standard error."""
    try:
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class
    except ImportError as err:
        raise MissingExtraError(
            f"--policy loads the policy with LeRobot, which cannot be imported ({one_line(err)}): install trtower in "
            "LeRobot's environment, or pip install 'lerobot[pi,smolvla]' with Python 3.12."
        ) from err
    try:
        with contextlib.redirect_stdout(sys.stderr):
            kind = PreTrainedConfig.from_pretrained(str(source)).type
            policy = get_policy_class(kind).from_pretrained(str(source))
    except Exception as err:  # LeRobot may raise anything
        nowhere = "" if source.is_dir() else f"there is no folder {source}, and as a hub id "
        raise CheckpointError(f"{nowhere}LeRobot cannot load {source}: {one_line(err)[:LONGEST]}") from err
    if kind not in COMPARED:
        raise CheckpointError(f"{source} is LeRobot's policy {kind!r}; these are compared: {', '.join(COMPARED)}.")
    return policy.eval()


def act(policy: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """Return a chunk of actions (T, J) for each observation, (B, T, J), each from the same noise every time."""
    chunks = []
    for index, batch in enumerate(batches):
        policy.reset()
        torch.manual_seed(SEED + index)
        chunks.append(policy.predict_action_chunk(dict(batch)).float().cpu())
    return torch.cat(chunks)


@contextlib.contextmanager
def in_precision(policy: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Run a policy's eager tower in another precision, between the same tensors as before."""
    place = find_tower(policy)
    own = next(place.module.parameters()).dtype
    cast = copy.deepcopy(place.module).to(dtype)
    cast.register_forward_pre_hook(lambda _, args, kwargs: (_cast(args, dtype), _cast(kwargs, dtype)), with_kwargs=True)

    def back(_: nn.Module, args: Any, output: Any) -> Any:
        del args
        output.last_hidden_state = output.last_hidden_state.to(own)
        return output

    cast.register_forward_hook(back)
    place.put(cast)
    try:
        yield
    finally:
        place.put(place.module)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    if isinstance(values, Mapping):
        return {name: _cast(value, dtype) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(_cast(value, dtype) for value in values)
    return values.to(dtype) if isinstance(values, Tensor) and values.is_floating_point() else values


def read_observations(path: Path, policy: Any) -> list[dict[str, Tensor]]:
    """Read recorded observations, each as a batch of one; raise InputError if they are not the policy's."""
    try:
        held = load_file(path)
    except (OSError, SafetensorError) as err:
        raise InputError(
            f"{path} cannot be read as safetensors ({one_line(err)}): record it by {HOW_TO_RECORD}."
        ) from err
    read = policy.config.image_features
    missing = [name for name in (STATE, TOKENS, MASK) if name not in held]
    if missing or not any(name in held for name in read):
        lack = ", ".join(missing or read)
        raise InputError(f"{path} has no {lack}, which the policy reads: record it by {HOW_TO_RECORD}.")
    if unknown := [name for name in held if name.startswith(IMAGES) and name not in read]:
        raise InputError(f"{path} has {unknown[0]}, which the policy does not read; its cameras are {', '.join(read)}.")
    numbers = {len(value) for value in held.values()}
    if len(numbers) != 1 or 0 in numbers:
        raise InputError(f"{path} has {sorted(numbers)} of its inputs; expected as many of each, and at least one.")
    for name in set(held) & set(read):
        held[name] = _frames(path, name, held[name], read[name].shape)
    _check_inputs(path, held, policy)
    device = next(policy.parameters()).device
    return [
        {name: value[index : index + 1].to(device) for name, value in held.items()} for index in range(numbers.pop())
    ]


def _frames(path: Path, name: str, frames: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return frames as fractions (N, 3, H, W), as LeRobot's processors make them."""
    if frames.ndim == 4 and frames.shape[-1] == 3:
        frames = frames.permute(0, 3, 1, 2).contiguous()
    if tuple(frames.shape[1:]) != tuple(shape):
        *_, height, width = frames.shape
        raise InputError(
            f"{path}: the frames of {name} are {width} x {height} pixels; the policy's config says "
            f"{shape[-1]} x {shape[-2]}. Record them with the cameras that it was trained with."
        )
    if frames.dtype == torch.uint8:
        return frames.float() / 255
    low, high = float(frames.min()), float(frames.max())
    if not 0 <= low <= high <= 1:  # catches NaN, too
        raise InputError(
            f"{path}: the frames of {name} have values from {low:g} to {high:g}; expected 0 to 1, or bytes."
        )
    return frames


def _check_inputs(path: Path, held: Mapping[str, Tensor], policy: Any) -> None:
    """Raise InputError for a state or tokens that the policy cannot read."""
    state, tokens, feature = held[STATE], held[TOKENS], policy.config.robot_state_feature
    if not state.isfinite().all():
        raise InputError(f"{path}: {STATE} has NaN or infinity.")
    if feature and state.shape[-1] != feature.shape[0]:
        raise InputError(f"{path}: {STATE} has {state.shape[-1]} numbers; the policy's config says {feature.shape[0]}.")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < _words_of(policy):
        raise InputError(
            f"{path}: {TOKENS} has ids from {int(tokens.min())} to {int(tokens.max())}, but the policy knows "
            f"{_words_of(policy)} tokens: record it with the policy's own tokenizer."
        )


def _words_of(policy: nn.Module) -> int:
    return max(each.num_embeddings for each in policy.modules() if isinstance(each, nn.Embedding))


def _cameras_of(policy: Any) -> list[str]:
    return [name for name in policy.config.image_features if "empty_camera" not in name]


def draw_observations(policy: Any) -> list[dict[str, Tensor]]:
    """Draw observations of a policy: smooth frames, a state and the tokens of a task."""
    generator = torch.Generator().manual_seed(SEED)
    device, config = next(policy.parameters()).device, policy.config
    words = _words_of(policy)
    width = config.robot_state_feature.shape[0] if config.robot_state_feature else config.max_state_dim
    batches = []
    for _ in range(DRAWN):
        batch: dict[str, Tensor] = {}
        for name in _cameras_of(policy):
            coarse = torch.rand(1, 3, 8, 8, generator=generator)
            batch[name] = nn.functional.interpolate(coarse, config.image_features[name].shape[-2:], mode="bilinear")
        batch[STATE] = torch.randn(1, width, generator=generator)
        batch[TOKENS] = torch.randint(3, words - 1, (1, config.tokenizer_max_length), generator=generator)
        batch[MASK] = torch.ones(1, config.tokenizer_max_length, dtype=torch.bool)
        batches.append({name: value.to(device) for name, value in batch.items()})
    return batches


def _relative(actual: Tensor, expected: Tensor) -> float | None:
    return _finite((actual - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))


def _finite(figure: Tensor) -> float | None:
    return float(figure) if figure.isfinite() else None


def _joints(policy: Any, actual: Tensor, expected: Tensor, own: Tensor | None) -> Iterator[Joint]:
    joints = expected.shape[-1]
    names = getattr(policy.config, "action_feature_names", None) or [str(index) for index in range(1, joints + 1)]
    for index, name in enumerate(names[:joints]):
        off = (actual[..., index] - expected[..., index]).abs()
        yield Joint(
            name=str(name),
            spread=_finite(expected[..., index].std()),
            largest=_finite(off.max()),
            mean=_finite(off.mean()),
            own=None if own is None else _finite((own[..., index] - expected[..., index]).abs().max()),
        )
