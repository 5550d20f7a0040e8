"""What a run can meet on its way, as the errors that a user sees: memory that runs out, and a disk that is full."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

import torch

from flexmoe.errors import InfeasibleError, StorageError
from flexmoe.system.memory_watch import lacks_memory
from policies.common.option_names import option

_DISK_ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)


@contextlib.contextmanager
def as_user_errors() -> Iterator[None]:
    """Turns an allocation that failed, and a failure of a disk, into errors with a sentence.

    Raises:
        InfeasibleError: the device or the host has no memory left.
        StorageError: the disk is full, read-only or broken.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and not lacks_memory(error):
            raise
        raise _infeasible(error) from error
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise StorageError(str(error)) from error


def _infeasible(error: Exception) -> InfeasibleError:
    reason = (str(error).strip().splitlines() or ["no memory"])[0]
    return InfeasibleError(
        f"memory ran out ({reason}); what a job has done is kept: run the same again with a smaller {option('gpu_batch_size')}, "
        f"{option('prefill_tokens')} or {option('gpu_mem')}, and it resumes from there"
    )
