"""A tower on Ray Serve: the deployment, and the application that a config file of Ray's names."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from trtower.bundle.suggest import how_to_certify
from trtower.errors import BundleError, ConfigError
from trtower.serving.ray.open_inference import OpenInference
from trtower.serving.ray.options import RayOptions
from trtower.serving.ray.replica import serve
from trtower.tower.vision_tower import VisionTower

IN_FLIGHT = 64
"""Requests that a replica has at once, at least."""

TowerDeployment = serve.deployment(
    name="TowerDeployment",
    max_ongoing_requests=IN_FLIGHT,
    max_queued_requests=1024,
    health_check_period_s=30,
    health_check_timeout_s=60,
    graceful_shutdown_timeout_s=60,
)(OpenInference)
"""A bundle on Ray Serve, as Ray deploys it; `bind_tower` binds one to it."""


def bind_tower(bundle: str | os.PathLike[str], options: RayOptions | None = None, **of_ray: Any) -> Any:
    """Make an application of one bundle, for `serve.run`, or for an application of yours of which it is a part.

    The bundle is read here, too: its identity becomes a part of the application. So all replicas serve the same tower,
    and deploying again after another bundle took its place replaces them, one after another.

    Args:
        bundle: The path of the bundle, here and on every node.
        options: What a replica does with it. Default: `RayOptions()`.
        **of_ray: Ray's options of the deployment, such as ``num_replicas=2``.

    Raises:
        ConfigError: An option is invalid, or the bundle lacks a requested layer.
        BundleError: The folder is no bundle, or not certified.
    """
    options, path = options or RayOptions(), Path(bundle).absolute()
    tower = VisionTower(path, select_layer=options.select_layer, select_feature=options.select_feature)
    if (reason := tower.bundle.uncertifiable()) and not options.allow_uncertified:
        advice = f"{how_to_certify(tower.bundle, options.backend)}; or serve it anyway with allow_uncertified=true."
        raise BundleError(f"{bundle} is not certified: {reason}. {advice}")
    in_flight = {"max_ongoing_requests": max(IN_FLIGHT, 2 * tower.bundle.manifest.batch.max)}
    same = replace(options, tower_sha256=tower.bundle.manifest.tower_sha256)
    return TowerDeployment.options(**in_flight | of_ray).bind(path, same)


def application(args: Mapping[str, Any]) -> Any:
    """Make the application of one bundle, as `serve run trtower.serving.ray:application bundle=PATH` does.

    Args:
        args: ``bundle``, and the fields of `RayOptions` by name.

    Raises:
        ConfigError: ``bundle`` is missing, or another argument is unknown or invalid.
        BundleError: As for `bind_tower`.
    """
    if not (bundle := args.get("bundle")):
        raise ConfigError("no bundle: pass bundle=PATH.")
    return bind_tower(bundle, RayOptions.read({name: value for name, value in args.items() if name != "bundle"}))
