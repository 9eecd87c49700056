"""Errors that a user can mend: `main` and the tools print their message alone, with no traceback."""


class UserError(Exception):
    """Something the user gave is wrong; the message says what, with its value, and what to do."""


class ConfigError(UserError, ValueError):
    """A configuration field is unknown, of the wrong type, or doesn't fit the others."""


class DataError(UserError, ValueError):
    """A data set, shard, record or source file is missing, foreign or damaged."""


class CheckpointError(UserError, ValueError):
    """A checkpoint or working directory is missing, damaged or doesn't fit."""
