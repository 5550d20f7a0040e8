"""The one family of errors a user sees; the command lines map it to exit codes and to a single sentence."""


class FlexMoEError(Exception):
    """Base of every error that is meant for a user: its text is a sentence, its class an exit code."""

    exit_code = 1


class UsageError(FlexMoEError):
    """A flag or an argument has a value that cannot be used."""

    exit_code = 2


class InfeasibleError(FlexMoEError):
    """The policy does not fit: another model, a smaller machine, or no room in a tier."""

    exit_code = 4


class DataError(FlexMoEError):
    """Input data or a checkpoint is malformed."""

    exit_code = 65


class InputMissingError(FlexMoEError):
    """An input file or directory does not exist or cannot be read."""

    exit_code = 66


class StorageError(FlexMoEError):
    """Reading or writing failed: an I/O error, or a full or read-only disk."""

    exit_code = 74
