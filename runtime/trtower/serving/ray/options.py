"""How a tower is served on Ray."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from trtower.errors import ConfigError, one_line
from trtower.extras import import_extra
from trtower.layer_codes import LayerCode, parse_layer_code

PURPOSE = "serving on Ray"


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """What a replica does with its bundle. What Ray does with replicas, such as their number, are options of Ray's.

    Attributes:
        name: The model's name for clients. Default: that of the bundle's folder.
        backend: The backend, as in `VisionTower.load`.
        select_layer: The hidden states to read, as there.
        select_feature: The tokens to read, as there.
        batch_wait_ms: How long a request waits for others although the engine is idle.
        allow_uncertified: Serve a bundle without a certificate for the backend that runs, and a rehearsal.
        tower_sha256: The identity that the bundle must have, so that no node serves another one; `bind_tower` sets it.

    Raises:
        ConfigError: An option is invalid.
    """

    name: str | None = None
    backend: str = "auto"
    select_layer: LayerCode | None = None
    select_feature: str | None = None
    batch_wait_ms: float = 0.0
    allow_uncertified: bool = False
    tower_sha256: str | None = None

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if not 0 <= self.batch_wait_ms < float("inf"):
            raise ConfigError(f"batch_wait_ms={self.batch_wait_ms}; expected a number of at least 0.")

    @classmethod
    def read(cls, args: Mapping[str, Any]) -> "RayOptions":
        """Read the arguments of a config file, or of a command line, where all are text. Raises ConfigError."""
        pydantic = import_extra("pydantic", extra="ray", purpose=PURPOSE)
        layer = args.get("select_layer")
        args = {**args, "select_layer": parse_layer_code(layer) if isinstance(layer, str) else layer}
        try:
            options: RayOptions = pydantic.TypeAdapter(cls).validate_python(args)
        except pydantic.ValidationError as err:
            first = err.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ConfigError(f"argument {where}: {one_line(first['msg'])}") from err
        return options
