"""The user-facing errors, re-exported so that the runtime's callers need not know the policies package."""

from policies.common.errors import (
    DataError,
    FlexMoEError,
    InfeasibleError,
    InputMissingError,
    StorageError,
    UsageError,
)

__all__ = ["DataError", "FlexMoEError", "InfeasibleError", "InputMissingError", "StorageError", "UsageError"]
