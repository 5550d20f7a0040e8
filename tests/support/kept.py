"""What one of the processes of a test run has computed, for the others."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def kept(path: Path | None, compute: Callable[[], Any]) -> Any:
    """What a JSON file has, or what is computed and then put there, as one: another process may look for it meanwhile.

    Args:
        path: None if nothing is kept.
    """
    if path is not None and path.exists():
        return json.loads(path.read_text())
    found = compute()
    if path is not None:
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(found))
        part.replace(path)
    return found
