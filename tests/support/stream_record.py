"""The record of the streams: ``python -m tests.support.stream_record [SEEDS]`` writes ``benchmarks/streams.{json,md}``.

Every case in the order of every seed, unmutated; then every mutant, with the first seed that catches it. Seeds that the record
has of the same sources are not run again, so that it can be made in pieces.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import pytest
import torch

from cost_model.routing import on_demand
from tests.support import tiny
from tests.support.paths import ROOT
from tests.support.stream_cases import CASES, KNOWN_FAULTS, run
from tests.support.stream_mutants import CAUGHT
from tests.support.stream_queues import ORDERS
from tests.support.tiny_families import RECIPES

_RECORD = ROOT / "benchmarks" / "streams.json"
_SEEDS = 200
_NAMES = [name for name in CASES if name not in KNOWN_FAULTS]
#: Seeds within which a mutant has to be caught.
_WITHIN = 10


def main() -> None:
    """Run what is missing, a seed at a time, and write the record after each."""
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else _SEEDS
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    record = _begun()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(on_demand, "LOAD_BYTES", {"cpu": 0, "disk": 0})
        variant = _variants(Path(folder))
        if not record["mutants"]:
            record["mutants"] = [_first_seed(mutant, name, variant) for mutant, (name, _) in CAUGHT.items()]
        for seed in range(record["seeds"], seeds):
            start = time.perf_counter()
            for name in _NAMES:
                outcome = run(name, variant, seed)
                record["executed"] += outcome.executed
                if outcome.alarm:
                    record["alarms"].append({"case": name, "seed": seed, "alarm": outcome.alarm})
            record["seeds"] = seed + 1
            record["seconds"] += time.perf_counter() - start
            _RECORD.write_text(json.dumps(record, indent=1) + "\n")
            _RECORD.with_suffix(".md").write_text(_table(record))


def _begun() -> dict:
    """The record so far, if it is of the sources as they are."""
    fresh = {"sources": _sources(), "torch": torch.__version__, "cases": _NAMES, "seeds": 0, "executed": 0}
    fresh |= {"seconds": 0.0, "alarms": [], "mutants": []}
    kept = json.loads(_RECORD.read_text()) if _RECORD.exists() else fresh
    return kept if all(kept[name] == fresh[name] for name in ("sources", "torch", "cases")) else fresh


def _sources() -> str:
    """A digest of the engine's sources and the simulator's."""
    files = [*(ROOT / "flexmoe").rglob("*.py"), *(ROOT / "tests" / "support").glob("stream_*.py")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _variants(folder: Path):
    recipes = {**RECIPES, **tiny.RECIPES}
    return cache(lambda name: tiny.make(recipes[name], folder / name))


def _first_seed(mutant, name: str, variant) -> dict:
    for seed in range(_WITHIN):
        if alarm := run(name, variant, seed, mutant).alarm:
            return {"mutant": str(mutant), "case": name, "seed": seed, "alarm": alarm}
    return {"mutant": str(mutant), "case": name, "seed": None, "alarm": ""}


def _table(record: dict) -> str:
    runs = record["seeds"] * len(record["cases"])
    lines = [
        "# Streams simulated on the CPU",
        "",
        f"`python -m tests.support.stream_record`, torch {record['torch']}. The engine, unmutated: {len(record['cases'])}"
        f" cases in the order of {record['seeds']} seeds each ({', '.join(ORDERS)} in turn), {runs} runs,"
        f" {record['executed']:,} kernels and copies, {record['seconds'] / 60:.0f} minutes:"
        f" **{len(record['alarms'])} alarms**.",
        *(f"* {a['case']}, seed {a['seed']}: {a['alarm']}" for a in record["alarms"]),
        "",
        f"The engine without one of its waits, events or `record_stream`s; the first of {_WITHIN} seeds that shows it:",
        "",
        "| taken away | case | seed | what came |",
        "|---|---|---|---|",
        *(f"| {m['mutant']} | {m['case']} | {m['seed']} | {m['alarm'][:60]} |" for m in record["mutants"]),
        "",
        "Cases: " + "; ".join(record["cases"]) + ".",
        *(f"Left out, a known fault: {name}: {why}." for name, why in KNOWN_FAULTS.items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
