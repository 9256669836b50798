"""A tower on Ray Serve: the deployment, and the application that a config file of Ray's names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtower.bundle.bundle import Bundle
from trtower.bundle.suggest import how_to_certify
from trtower.errors import BundleError, ConfigError
from trtower.serving.ray.open_inference import OpenInference
from trtower.serving.ray.options import RayOptions
from trtower.serving.ray.replica import serve

TowerDeployment = serve.deployment(
    name="TowerDeployment",
    max_ongoing_requests=64,
    max_queued_requests=1024,
    health_check_period_s=30,
    health_check_timeout_s=60,
    graceful_shutdown_timeout_s=60,
)(OpenInference)
"""A bundle on Ray Serve: `TowerDeployment.options(…)` takes Ray's options, and `.bind(bundle, RayOptions(…))` ours."""


def application(args: Mapping[str, Any]) -> Any:
    """Make the application of one bundle, as `serve run trtower.serving.ray:application bundle=PATH` does.

    The bundle is read here, too: its identity becomes a part of the application. So all replicas serve the same tower,
    and deploying again after another bundle took its place replaces them, one after another.

    Args:
        args: ``bundle``, the path of the bundle on every node, and the fields of `RayOptions` by name.

    Raises:
        ConfigError: ``bundle`` is missing, or another argument is unknown or invalid.
        BundleError: The folder is no bundle, or not certified.
    """
    options = {name: value for name, value in args.items() if name != "bundle"}
    if not (bundle := args.get("bundle")):
        raise ConfigError("no bundle: pass bundle=PATH.")
    opened = Bundle.open(bundle)
    read = RayOptions.read({"tower_sha256": opened.manifest.tower_sha256} | options)
    if (reason := opened.uncertifiable()) and not read.allow_uncertified:
        advice = f"{how_to_certify(opened, read.backend)}; or serve it anyway with allow_uncertified=true."
        raise BundleError(f"{bundle} is not certified: {reason}. {advice}")
    return TowerDeployment.bind(Path(bundle).absolute(), read)
