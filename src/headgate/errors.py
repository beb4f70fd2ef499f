"""What went wrong, in the user's words: the value, the place and the cure.

The command line prints these without a traceback (``--debug`` shows it). Anything else that escapes
is a bug in Headgate and keeps its traceback.
"""


class HeadgateError(Exception):
    """Base of every error a user can mend."""


class ConfigError(HeadgateError, ValueError):
    """A recipe or a constructor argument is wrong."""


class DataError(HeadgateError, ValueError):
    """A data file, row or split cannot be used."""


class ModelError(HeadgateError, ValueError):
    """A model, adapter or architecture cannot be used as asked."""


class CheckpointError(HeadgateError, RuntimeError):
    """A checkpoint or run directory is missing, incomplete, corrupted or of another recipe."""


class DamagedFile(CheckpointError):
    """A state file is missing, empty, cut short or not what was written."""


class RunBusy(CheckpointError):
    """Another process is writing this run directory."""


class TrainingError(HeadgateError, RuntimeError):
    """Training cannot go on (no gradient, NaN loss); the state at that moment was saved."""


class EndedElsewhere(HeadgateError, RuntimeError):
    """Another rank of this run has failed and said why; this one ends with it, in silence."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM ended a run after its state was saved, and what was saved has been said."""
