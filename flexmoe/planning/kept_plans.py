"""Plans of this machine, kept so that the same job is planned once.

A plan is found again by everything that it follows from: the model, the machine's rates, the job's lengths, what is
fixed, and the planner itself. What is free of memory and disk differs a little from start to start; a plan is used
again where each tier still has room for it, and has not become so much larger that another plan could be better.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import cost_model
import policies
from policies.common.directories import cache_directory
from policies.common.errors import FlexMoEError
from policies.policy import PolicyFile

log = logging.getLogger(__name__)

#: So many plans are kept; the oldest goes first.
MOST_PLANS = 256
#: A tier may have grown by this share since the plan was made.
_GROWTH = 0.1
_CAPACITIES = "capacities"


def find(key: str, capacities: Mapping[str, int]) -> PolicyFile | None:
    """The plan of a key, where one is kept that suits the machine as it is now.

    Args:
        capacities: bytes that may be taken of each tier, now.
    """
    path = _path(key)
    if not path.exists():
        return None
    try:
        kept = PolicyFile.load(path)
    except FlexMoEError as error:
        log.info("the plan that was kept is made again: %s", error)
        return None
    then = (kept.hardware or {}).get(_CAPACITIES, {})
    grown = {tier for tier, size in capacities.items() if size > (1 + _GROWTH) * then.get(tier, 0)}
    return None if grown else kept


def keep(key: str, file: PolicyFile, capacities: Mapping[str, int]) -> None:
    """Keeps a plan. Where that is not possible, the next start plans again.

    Args:
        capacities: as for `find`.
    """
    path = _path(key)
    kept = replace(file, hardware={**(file.hardware or {}), _CAPACITIES: dict(capacities)})
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        kept.save(path)
        for old in sorted(path.parent.glob("*.json"), key=lambda each: each.stat().st_mtime)[:-MOST_PLANS]:
            old.unlink(missing_ok=True)
    except (OSError, FlexMoEError) as error:
        log.info("the plan cannot be kept: %s", error)


def key_of(circumstances: Mapping[str, Any]) -> str:
    """The name of a plan.

    Args:
        circumstances: JSON values that the plan follows from; capacities are not among them.
    """
    text = json.dumps(circumstances, sort_keys=True)
    return hashlib.sha256(f"{_planner()}\0{text}".encode()).hexdigest()[:24]


@cache
def _planner() -> str:
    """A digest of the planner's sources: another planner may have a better plan."""
    digest = hashlib.sha256()
    for package in (policies, cost_model):
        for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _path(key: str) -> Path:
    return cache_directory() / "plans" / f"{key}.json"
