"""The error tree: every error that trtower raises on purpose derives from TrtowerError.

A message says what was found, what was expected, and what to do next.
"""

import re


class TrtowerError(Exception):
    """Base of every error that trtower raises on purpose."""


class ConfigError(TrtowerError, ValueError):
    """An option or config value is not valid for this tower, bundle, model or target."""


class InputError(TrtowerError, ValueError):
    """The tower does not accept these images."""


class CheckpointError(TrtowerError):
    """A checkpoint cannot be found, read or trusted."""


class BundleError(TrtowerError):
    """A bundle is missing, incomplete, altered, of another schema, or not certified when that is required."""


class BackendError(TrtowerError):
    """A backend cannot run here, or cannot do what was requested."""


class BuildError(TrtowerError):
    """An ONNX graph or a plan could not be built, or the result could not be written, as to a full disk."""


class MissingExtraError(TrtowerError, ImportError):
    """A package is not installed; the message names the extra that provides it."""


class BrokenExtraError(TrtowerError, ImportError):
    """An installed package fails to import; the message says why, and which environment would do."""


def one_line(err: BaseException | str) -> str:
    """Put a message, or another library's error, on one line; return the error's class name if it has no text.

    Control characters, which a path can hold, are escaped: a terminal would obey them.
    """
    line = " ".join(str(err).split())
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: ascii(match[0])[1:-1], line) or type(err).__name__
