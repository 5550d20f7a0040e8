"""The outputs of all shards of a job become the output that one run would have written.

Nothing is parsed: every line is copied as it is, in the order of the input. What each shard's manifest says about its
files (bytes, hashes, which rows failed) shows that no row is lost, doubled or another job's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from flexmoe.errors import DataError, InputMissingError, UsageError
from flexmoe.job.manifest import Finished, Manifest, work_directory
from flexmoe.job.output_files import (
    Published,
    check_distinct,
    check_writable,
    default_error_path,
    is_as_published,
    publish,
    remove,
)
from flexmoe.job.shards import Shard
from policies.common.option_names import option


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A finished shard and its files."""

    output: Path
    errors: Path
    shard: Shard
    manifest: Manifest
    finished: Finished


def merge_shards(output: Path, shards: Sequence[Path], *, overwrite: bool = False) -> tuple[int, int]:
    """Merges the outputs of all shards of one job, and their error files.

    Args:
        output: the merged file; failed rows go to its error file.
        shards: the output files of the shards, in any order; error files of theirs are passed over.
        overwrite: replace files that are there.

    Returns:
        Rows that succeeded, rows that failed.

    Raises:
        UsageError: a shard is missing or given twice, they are not of one job, or the output is there already.
        InputMissingError: a file or its manifest is not there.
        DataError: a shard is unfinished, or a file is not as its run left it.
        StorageError: the output cannot be written.
    """
    parts = _ordered([_part(path) for path in _without_errors(shards)])
    errors = default_error_path(output)
    files = {"merged output": output, "merged error": errors}
    for part in parts:
        files[f"shard {part.shard.index} output"] = part.output
        files[f"shard {part.shard.index} error"] = part.errors
    check_distinct(files)
    for path in (output, errors):
        check_writable(path)
        if path.exists() and not overwrite:
            raise UsageError(
                f"{path} is there already; choose another output, or give {option('overwrite', True)} to replace it"
            )
    for part in parts:
        _check_whole(part)
    rows_failed = sum(len(part.finished.failed_rows) for part in parts)
    # The output comes last: who sees it may read the error file beside it.
    if rows_failed:
        publish(errors, _lines(parts, failed=True))
    else:
        remove(errors)
    publish(output, _lines(parts, failed=False))
    return sum(part.finished.rows_ok for part in parts), rows_failed


def _without_errors(paths: Sequence[Path]) -> list[Path]:
    """Without the error files of the others: `out.shard-*.jsonl` has them too."""
    errors = {default_error_path(path) for path in paths}
    return [path for path in paths if path not in errors or _manifest_path(path).exists()]


def _manifest_path(output: Path) -> Path:
    return work_directory(output) / "manifest.json"


def _part(output: Path) -> Part:
    if output.is_dir():
        raise UsageError(f"{output} is a directory; give the output files of the shards")
    path = _manifest_path(output)
    manifest = Manifest.load(path)
    if manifest is None:
        raise InputMissingError(
            f"{output} has no {path}, which says what it is; give the outputs of runs with {option('shard')}, beside "
            "their .flexmoe directories"
        )
    if manifest.shard is None:
        raise UsageError(f"{output} is the output of a whole job, not of a shard; there is nothing to merge it with")
    if manifest.finished is None:
        raise DataError(f"{output} is not finished: run shard {_name(manifest)} again, it resumes where it stopped")
    index, count = manifest.shard
    shard = Shard(index=index, count=count)
    errors = default_error_path(output)
    return Part(output=output, errors=errors, shard=shard, manifest=manifest, finished=manifest.finished)


def _ordered(parts: Sequence[Part]) -> list[Part]:
    """The shards by number, shown to be all of one job."""
    first = parts[0]
    for part in parts[1:]:
        if part.manifest.fingerprint != first.manifest.fingerprint or part.shard.count != first.shard.count:
            raise UsageError(f"{first.output} and {part.output} are not shards of one job: {_difference(first, part)}")
    by_index: dict[int, Part] = {}
    for part in parts:
        other = by_index.setdefault(part.shard.index, part)
        if other is not part:
            raise UsageError(
                f"{other.output} and {part.output} are both shard {_name(part.manifest)}; give one of them"
            )
    missing = [index for index in range(first.shard.count) if index not in by_index]
    if missing:
        listed = ", ".join(map(str, missing[:20])) + (", …" if len(missing) > 20 else "")
        raise UsageError(f"{len(missing)} of {first.shard.count} shards are missing: {listed}; give all of them")
    ordered = [by_index[index] for index in range(first.shard.count)]
    total = sum(part.manifest.rows for part in ordered)
    for part in ordered:
        if part.manifest.rows != len(part.shard.rows(total)):
            raise DataError(
                f"{part.output} has {part.manifest.rows} rows, which is no even share of {total}: it is damaged"
            )
    return ordered


def _difference(one: Part, other: Part) -> str:
    if one.shard.count != other.shard.count:
        return f"one is of {one.shard.count}, the other of {other.shard.count}"
    names = [n for n, value in one.manifest.identity.items() if other.manifest.identity.get(n) != value]
    return f"they differ in {', '.join(names) or 'what they record'}"


def _check_whole(part: Part) -> None:
    for path, published in ((part.output, part.finished.output), (part.errors, part.finished.errors)):
        if published is None:
            continue
        if not path.exists():
            raise InputMissingError(f"{path} is missing: it belongs to shard {_name(part.manifest)}")
        if not is_as_published(path, published):
            raise DataError(f"{path} is not as its run left it ({published.size_bytes} bytes); copy or make it again")


def _lines(parts: Sequence[Part], *, failed: bool) -> Iterator[bytes]:
    """The lines of the failed (or of the other) rows, in the order of the input."""
    failures = [set(part.finished.failed_rows) for part in parts]
    with ExitStack() as stack:
        files: list[IO[bytes] | None] = []
        for part in parts:
            path, written = (part.errors, part.finished.errors) if failed else (part.output, part.finished.output)
            files.append(None if _is_empty(written) else stack.enter_context(open(path, "rb")))
        for row in range(sum(part.manifest.rows for part in parts)):
            place, index = divmod(row, len(parts))
            if (place in failures[index]) != failed:
                continue
            file = files[index]
            line = b"" if file is None else file.readline()
            if not line.endswith(b"\n"):
                raise DataError(f"{parts[index].output} and its manifest disagree on which rows failed: it is damaged")
            yield line
        for part, file in zip(parts, files):
            if file is not None and file.read(1):
                raise DataError(f"{part.output} holds more rows than its manifest says: it is damaged")


def _is_empty(published: Published | None) -> bool:
    return published is None or not published.size_bytes


def _name(manifest: Manifest) -> str:
    index, count = manifest.shard or (0, 1)
    return f"{index}/{count}"
