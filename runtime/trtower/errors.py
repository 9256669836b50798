"""The one error tree: everything trtower raises on purpose derives from TrtowerError.

A message says what was found, what was expected, and the next step.
"""


class TrtowerError(Exception):
    """Base of every error that trtower raises on purpose."""


class ConfigError(TrtowerError, ValueError):
    """An option or a config value that this tower, bundle or target cannot have."""


class InputError(TrtowerError, ValueError):
    """Images that the tower does not take."""


class CheckpointError(TrtowerError):
    """A checkpoint that cannot be found, read or trusted."""


class BundleError(TrtowerError):
    """A bundle that is missing, incomplete, altered or of a newer schema."""


class BackendError(TrtowerError):
    """A backend that cannot run here."""


class BuildError(TrtowerError):
    """An ONNX graph or a plan that could not be made."""


class MissingExtraError(TrtowerError, ImportError):
    """A package that is not installed; the message names the extra that brings it."""


def one_line(err: BaseException | str) -> str:
    """Put a message, or an error of another library, on one line; its class if it says nothing."""
    return " ".join(str(err).split()) or type(err).__name__
