"""Structured output: coverage of JSON Schema by two libraries, the speed of their masks, what they cost a model, and whether
rows are valid.

    python -m scripts.structured.bench coverage SUITE    # JSON Schema's test suite, a directory of *.json
    python -m scripts.structured.bench masks MODEL       # of two libraries, over the model's tokenizer
    python -m scripts.structured.bench cost MODEL        # tokens/s with and without
    python -m scripts.structured.bench rows MODEL        # a job of 1,000 rows at temperature 1, validated by jsonschema

It needs xgrammar beside `flexmoe[structured]`, and jsonschema.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import jsonschema
from transformers import AutoTokenizer

from flexmoe.batch.run_batch import run_batch
from scripts.benchmark.probes import machine, versions
from scripts.benchmark.record import Figure, Record, figure_table
from scripts.structured.coverage import Counts, byte_tokenizer, cover
from scripts.structured.libraries import LIBRARIES
from scripts.structured.schemas import SCHEMAS
from scripts.structured.speed import cost, masks


def main(argv: list[str]) -> int:
    """Run one part; the exit code is 1 where a target is missed."""
    args = _parser().parse_args(argv)
    start = time.perf_counter()
    if args.part == "coverage":
        figures, raw = coverage(args.path)
    elif args.part == "masks":
        figures, raw = masks(AutoTokenizer.from_pretrained(args.path), rows=32, steps=40)
    elif args.part == "cost":
        figures, raw = cost(args.path, args.rows or 256, args.new_tokens, args.rounds)
    else:
        figures, raw = rows(args.path, args.rows or 1000)
    print("\n".join(figure_table(figures)))
    if args.out:
        packages = {name: version(name) for name in ("llguidance", "xgrammar", "jsonschema")}
        about = {"machine": machine(), "versions": versions() | packages, "model": args.path.name}
        about["command"] = shlex.join(["python", "-m", "scripts.structured.bench", *argv])
        Record(args.out, about).add(f"structured output: {args.part}", figures, raw, time.perf_counter() - start)
    return 1 if any(figure.met is False for figure in figures) else 0


def coverage(suite: Path) -> tuple[list[Figure], dict]:
    """What each library does with JSON Schema's test suite."""
    tokenizer, figures, raw = byte_tokenizer(), [], {}
    for kind in LIBRARIES:
        found = cover(kind(tokenizer), tokenizer, suite)
        raw[kind.name] = {
            keyword: {"tests": each.tests, "walks": each.walks, "wrong": each.wrong, "refused for": each.reasons}
            for keyword, each in found.items()
        }
        figures += _coverage_figures(kind.name, found)
    return figures, raw


def _coverage_figures(name: str, found: Mapping[str, Counts]) -> list[Figure]:
    tests, walks = Counter[str](), Counter[str]()
    for each in found.values():
        tests.update(each.tests)
        walks.update(each.walks)
    kinds = Counter(_verdict(each) for each in found.values())
    target = 0 if name == LIBRARIES[0].name else None
    total, written = tests.total(), walks["valid"] + walks["invalid"]
    return [
        Figure(
            what=f"{name}: instances of the suite",
            value=f"{tests['right']} right, {tests['stricter']} valid ones not producible, {tests['refused']} refused",
            beside=f"{total}",
        ),
        Figure(
            what=f"{name}: invalid instances accepted",
            value=f"{tests['wrong']}",
            beside=f"{total}",
            ratio=float(tests["wrong"]),
            target=target,
            at_most=True,
        ),
        Figure(
            what=f"{name}: texts written at random that are not valid",
            value=f"{walks['invalid']}",
            beside=f"{written}",
            ratio=float(walks["invalid"]),
            target=target,
            at_most=True,
        ),
        Figure(
            what=f"{name}: keywords (files of the suite)",
            value=", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())),
            beside=f"{len(found)}",
        ),
    ]


def _verdict(counts: Counts) -> str:
    if counts.wrong:
        return "wrong"
    if not counts.tests["refused"]:
        return "right"
    return "right or refused" if counts.tests["right"] else "refused"


def rows(model: Path, count: int) -> tuple[list[Figure], dict]:
    """A job at temperature 1, each of whose rows has a schema."""
    with tempfile.TemporaryDirectory(prefix="flexmoe-structured-") as home:
        source, output = Path(home) / "in.jsonl", Path(home) / "out.jsonl"
        asked = [_row(number) for number in range(count)]
        source.write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
        run_batch(
            source,
            output,
            model=model,
            percent=(100, 0, 100, 0, 100, 0),
            gpu_batch_size=256,
            num_gpu_batches=1,
            device="cpu",
            offload_dir=Path(home),
        )
        lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    outcomes = Counter(_outcome(row, line) for row, line in zip(asked, lines, strict=True))
    figure = Figure(
        what="rows at temperature 1 that are valid against their schemas",
        value=f"{outcomes['valid']}",
        beside=f"{count}",
        ratio=outcomes["valid"] / count,
        target=1.0,
    )
    return [figure], dict(outcomes)


def _row(number: int) -> dict:
    schema = SCHEMAS[number % len(SCHEMAS)]
    described = {"type": "json_schema", "json_schema": {"name": "row", "schema": schema}}
    return {"prompt": f"Row {number}:", "response_format": described, "temperature": 1.0, "max_tokens": 512}


def _outcome(row: dict, line: dict) -> str:
    choice = line["response"]["body"]["choices"][0]
    try:
        value = json.loads(choice["text"])
        jsonschema.Draft202012Validator(row["response_format"]["json_schema"]["schema"]).validate(value)
    except (ValueError, jsonschema.ValidationError):
        return f"not valid, ended by {choice['finish_reason']}"
    return "valid" if choice["finish_reason"] == "stop" else "valid, but not ended by itself"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.structured.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("part", choices=("coverage", "masks", "cost", "rows"))
    parser.add_argument("path", type=Path, help="the suite's directory, or a checkpoint")
    parser.add_argument("--rows", type=int, help="default 256 of cost, 1000 of rows")
    parser.add_argument("--new-tokens", type=int, default=12, help="of each row of cost (default 12)")
    parser.add_argument("--rounds", type=int, default=7, help="of cost (default 7)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON record, with a table beside it")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
