"""A worker for `tests.flexmoe.preflight.test_workers`: it doubles numbers, and does what else it is told."""

import os
import time
from pathlib import Path

from flexmoe.preflight.worker_pool import serve


def start(setup):
    if setup.get("refuse"):
        raise SystemExit(3)

    def work(task):
        print("a library speaks")
        match task:
            case "die":
                os.kill(os.getpid(), 9)
            case "hang":
                time.sleep(600)
            case {"hang and tell": path}:
                Path(path).touch()
                time.sleep(600)
            case "raise":
                raise KeyError("something else")
            case _:
                return task * 2

    return work


if __name__ == "__main__":
    serve(start)
