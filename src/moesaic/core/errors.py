"""Errors that a user can act on: what was needed, what came, what to try."""


class MoesaicError(Exception):
    """Anything that Moesaic refuses to do; its text is one sentence for the user."""


class ConfigError(MoesaicError, ValueError):
    """A setting that cannot be built, or that would silently do something else."""


class ShapeError(MoesaicError, ValueError):
    """A tensor whose shape does not fit the others."""


class DataError(MoesaicError):
    """Text or tables that are missing, unreadable, empty or of another form than was asked for."""


class CheckpointError(MoesaicError):
    """Files on disk that are missing, damaged, foreign or of another version, or that could not be written."""


class StoppedElsewhereError(MoesaicError):
    """Another rank stopped and says why; this one stops with it, so that nobody waits for ever."""


class BackendError(MoesaicError, RuntimeError):
    """A kernel or an optional library that was asked for and cannot run here."""
