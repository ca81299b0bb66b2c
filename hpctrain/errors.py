"""Errors a person can act on, each tied to one documented exit code (docs/operations.md).

A message says what was given, what is allowed and what to do. Everything else that escapes is a
defect of hpctrain and ends with code 70 and a traceback.
"""

EXIT_COMPLETE = 0
EXIT_USAGE = 2
EXIT_DATA = 65
EXIT_BACKEND = 69
EXIT_INTERNAL = 70
EXIT_CANNOT_WRITE = 73
EXIT_STOPPED = 75
"""Stopped early on request; the checkpoint is good: run the same command again."""
EXIT_CONFIG = 78


class HpctrainError(Exception):
    """Base of every error with a remedy; `exit_code` is the process's exit code."""

    exit_code = EXIT_INTERNAL


class UsageError(HpctrainError):
    """The command line does not fit."""

    exit_code = EXIT_USAGE


class ConfigError(HpctrainError):
    """The configuration is wrong: names the file, table and key, and what is allowed."""

    exit_code = EXIT_CONFIG


class DataError(HpctrainError):
    """Input data are missing, truncated, corrupt or of the wrong shape: names file and offset."""

    exit_code = EXIT_DATA


class BackendError(HpctrainError):
    """A library, launcher or device that the run needs is unavailable or does not fit."""

    exit_code = EXIT_BACKEND


class WriteError(HpctrainError):
    """The run folder cannot be written (full disk, no permission)."""

    exit_code = EXIT_CANNOT_WRITE


class NonFinite(HpctrainError):
    """The loss or a gradient became inf or NaN; raised before the update, on all ranks alike."""

    exit_code = EXIT_INTERNAL
