"""Everything that ip2p tells a user instead of a traceback.

    Ip2pError
    ├── SettingsError   a flag or a configuration file
    ├── SourceError     a dataset
    ├── ModelError      a checkpoint
    ├── TrainError      a training run that cannot go on
    └── CacheError      a cache
        └── CacheMismatch   a cache that belongs to another model or other settings

Each message says what was found, what was expected, and the flag or command that mends it. Any other exception
is a bug and keeps its traceback.
"""


class Ip2pError(Exception):
    """Base of all errors that are shown to the user as one or two lines."""


class SettingsError(Ip2pError):
    """A flag or a configuration file that cannot be used."""


class SourceError(Ip2pError):
    """A dataset that cannot be read, or lacks what was asked of it."""


class ModelError(Ip2pError):
    """A checkpoint that cannot be read, or is not of the expected kind."""


class TrainError(Ip2pError):
    """A training run that cannot go on as it is."""


class CacheError(Ip2pError):
    """A cache that is missing, unfinished, damaged or in use."""


class CacheMismatch(CacheError):
    """A cache that was made by another model, or with other settings."""
