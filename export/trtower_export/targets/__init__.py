"""Named deployments, such as `jetpack-6.2` or `l4`: which TensorRT they have, and what is known to be wrong with it.

targets.toml lists the targets and faults.toml the faults. Each row has its source and the day it was read.
"""

import sys
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from trtower.bundle.manifest import Deployment
from trtower.errors import ConfigError
from trtower.names import list_choices, nearest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True)
class Target:
    """One named deployment. An empty field is open: a GPU has no TensorRT of its own, and JetPack no container.

    Attributes:
        name: What `--target` takes.
        title: What it is, for people.
        flavour: The TensorRT whose plan an export makes for it, "tensorrt" or "tensorrt-rtx".
        tensorrt: The version of TensorRT that comes with it.
        brings_tensorrt: Whether it comes with a TensorRT, even if its version is open.
        cuda: The version of CUDA that comes with it.
        compute_capabilities: The GPUs that it runs on, such as ("8.7",); () is any.
        platform: The operating system and processor, as a plan names them.
        python: The version of Python that comes with it.
        torch: What pip installs for a torch that can use its GPU; "" if that is plain torch.
        container: The image to build a plan in.
        source: The page where this was read.
        read: The day when it was read.
        note: What is uncertain about it.
    """

    name: str
    title: str
    flavour: str = "tensorrt"
    tensorrt: str = ""
    brings_tensorrt: bool = False
    cuda: str = ""
    compute_capabilities: tuple[str, ...] = ()
    platform: str = ""
    python: str = ""
    torch: str = ""
    container: str = ""
    source: str
    read: str
    note: str = ""

    @property
    def where(self) -> tuple[str, tuple[str, ...], str]:
        """The version of TensorRT, the GPUs and the platform, each empty if open."""
        return self.tensorrt, self.compute_capabilities, self.platform

    def as_deployment(self, accept_known_faults: tuple[str, ...]) -> Deployment:
        """Return what a bundle's manifest keeps of this target."""
        return Deployment(
            name=self.name,
            flavour=self.flavour,
            compute_capabilities=self.compute_capabilities,
            accept_known_faults=accept_known_faults,
        )


def read_rows(file: str) -> list[dict[str, Any]]:
    """Read a table of this package: one dict a row, with its key as "name". Lists become tuples."""
    text = resources.files(__name__).joinpath(file).read_text(encoding="utf-8")
    return [
        {"name": name} | {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        for name, row in tomllib.loads(text).items()
    ]


@cache
def all_targets() -> tuple[Target, ...]:
    """Read all targets, in the order of targets.toml."""
    return tuple(Target(**row) for row in read_rows("targets.toml"))


def find_target(name: str) -> Target:
    """Find a target by its name; raise ConfigError, which names the nearest, if there is none."""
    targets = {target.name: target for target in all_targets()}
    if name not in targets:
        near = nearest(name, tuple(targets)) or _same_kind(name, tuple(targets))
        meant = f" did you mean {list_choices([repr(each) for each in near])}?" if near else ""
        raise ConfigError(f"unknown target {name!r};{meant} `trtower targets` lists them all.")
    return targets[name]


def search_targets(part: str) -> tuple[Target, ...]:
    """List the targets with ``part`` in their names; raise ConfigError, which names the nearest, if there is none."""
    return tuple(each for each in all_targets() if part.lower() in each.name) or (find_target(part),)


def _same_kind(name: str, names: tuple[str, ...]) -> list[str]:
    """List the newest targets whose names begin as ``name`` does, such as "jetpack-"."""
    kind = name.lower().partition("-")[0]
    return [each for each in names if each.partition("-")[0] == kind][-3:] if kind else []
