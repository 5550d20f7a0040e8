"""The user-facing errors, re-exported so that the runtime's callers need not know the policies package."""

from policies.common.errors import (
    DataError,
    Faults,
    FlexMoEError,
    InfeasibleError,
    InputMissingError,
    StorageError,
    UsageError,
)

__all__ = [
    "DataError",
    "Faults",
    "FlexMoEError",
    "InfeasibleError",
    "InputMissingError",
    "StorageError",
    "UsageError",
]
