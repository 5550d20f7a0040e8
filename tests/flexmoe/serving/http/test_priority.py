"""Threads that answer clients go behind those of the engine."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from flexmoe.serving.http.priority import put_behind_engine


def niceness():
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="priority is a thread's own on Linux alone")
def test_the_thread_that_asks_goes_behind_and_those_that_it_starts_and_no_other():
    def answer_clients():
        put_behind_engine()
        with ThreadPoolExecutor(1) as pool:
            return niceness(), pool.submit(niceness).result(), sys.getswitchinterval()

    before, interval_s = niceness(), sys.getswitchinterval()
    try:
        with ThreadPoolExecutor(1) as other:
            own, started, switch_s = other.submit(answer_clients).result()
    finally:
        sys.setswitchinterval(interval_s)
    assert own == started == 19 and niceness() == before and switch_s < interval_s
