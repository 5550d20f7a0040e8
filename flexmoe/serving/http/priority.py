"""Who goes first, where clients and the engine want the same core and the same interpreter: the engine."""

from __future__ import annotations

import os
import sys
import threading

#: The interpreter's lock is given up at least this often by a thread that computes in Python while another one wants it.
#: Python's own 5 ms are as long as many of the engine's waits together.
_SWITCH_S = 0.0005
#: The lowest priority: where cores are short, a thread that answers clients gets what the engine leaves, and 1.5 % of a core.
_NICEST = 19


def put_behind_engine() -> None:
    """Has the calling thread, and threads that it starts, answer clients with what the engine leaves of the processor.

    On Linux priority is a thread's own; elsewhere it is a process's, and is left alone.
    """
    sys.setswitchinterval(_SWITCH_S)
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICEST)
