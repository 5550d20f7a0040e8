"""What a job is, written down before its first row: whoever starts it again must mean the same job.

What decides the completions is its identity: the input, the model, the tokenizer, how tokens are chosen. What only
decides how fast they come (policy, budgets, device) is not, and may change from one start to the next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flexmoe.errors import DataError, UsageError
from flexmoe.job.output_files import Published, publish
from policies.common import json_files
from policies.common.option_names import option

KIND, SCHEMA_VERSION = "flexmoe.job", 1
WHAT = "the manifest"

# How a difference is described. The first kind is what is in files, the others are flags: their values can be shown.
_FILES = {
    "input": "the input file has changed",
    "model": "the model is another one",
    "weights": "the model's weights are others",
    "tokenizer": "the tokenizer is another one",
    "generation_config": "the model's generation_config.json has changed",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What a finished job left behind.

    Args:
        output, errors: the two files; ``errors`` is None where no row failed.
        failed_rows: the rows in the error file, by their number within the shard.
    """

    rows_ok: int
    prompt_tokens: int
    generated_tokens: int
    output: Published
    errors: Published | None
    failed_rows: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The job of a work directory.

    Args:
        identity: what decides the completions, by name: hashes of files, and values of flags.
        rows: rows of this job (of its shard).
        shard: (index, count) where this is a part of a larger job, else None.
        created_s: when it was first started, in seconds since 1970; reported with every completion.
        model_name: reported for rows that name no model.
        versions: of the programs that began it.
        replaces: it was begun with `overwrite`.
        choices: values of flags that choose a file whose content is in the identity, by the file's name there.
        finished: None while there is work to do.
    """

    identity: Mapping[str, Any]
    rows: int
    shard: tuple[int, int] | None
    created_s: int
    model_name: str
    versions: Mapping[str, str | None] = field(default_factory=dict)
    replaces: bool = False
    choices: Mapping[str, str] = field(default_factory=dict)
    finished: Finished | None = None

    @property
    def fingerprint(self) -> str:
        """The job's name for itself: the same for every shard, machine and policy."""
        text = json.dumps(self.identity, sort_keys=True, ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def part(self) -> str:
        """The fingerprint with the shard: the same only for the same rows."""
        index, count = self.shard or (0, 1)
        return f"{self.fingerprint}/{index}/{count}"

    @classmethod
    def load(cls, path: Path) -> Manifest | None:
        """The manifest at `path`, None where there is none.

        Raises:
            DataError: it is damaged, or was written by a newer program.
        """
        if not path.exists():
            return None
        try:
            document = json_files.read_json(path, WHAT)
            json_files.check_header(document, KIND, SCHEMA_VERSION, "a manifest")
            values = {name: value for name, value in document.items() if name not in ("kind", "schema_version")}
            shard, finished = values.pop("shard"), values.pop("finished")
            values.pop("fingerprint")
            return cls(shard=shard and tuple(shard), finished=finished and _finished(finished), **values)
        except (DataError, UsageError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{path} cannot be used ({error}); {option('overwrite', True)} starts the job anew, without what it has done"
            ) from None

    def save(self, path: Path) -> None:
        """Writes it, whole or not at all.

        Raises:
            StorageError: the directory is read-only or full.
        """
        document = {"kind": KIND, "schema_version": SCHEMA_VERSION, "fingerprint": self.fingerprint, **asdict(self)}
        publish(path, [json.dumps(document, indent=1, allow_nan=False).encode() + b"\n"])

    def check_same(self, wanted: Manifest, directory: Path) -> None:
        """Shows that `wanted` is this job, so that it may be resumed.

        Raises:
            DataError: a file that decides the completions is another one.
            UsageError: only flags differ.
        """
        differences = _differences(self.identity, wanted.identity)
        # A file is another one because a flag names another one.
        flags = {name: (value, wanted.choices[name]) for name, value in self.choices.items() if name in wanted.choices}
        flags = {name: values for name, values in flags.items() if name in differences and values[0] != values[1]}
        differences |= {name: _flag(name, *values) for name, values in flags.items()}
        kind = DataError if any(name in _FILES and name not in flags for name in differences) else UsageError
        phrases = list(differences.values())
        if self.shard != wanted.shard:
            phrases.append(f"{option('shard')} was {_shard(self.shard)} and is {_shard(wanted.shard)}")
        if phrases:
            raise kind(
                f"{directory} holds another job: {'; '.join(phrases)}. Undo that to resume it, choose another output, or "
                f"give {option('overwrite', True)} to start anew"
            )


def work_directory(output: Path) -> Path:
    """Where the job of an output file keeps its manifest and its journal."""
    return output.with_name(f"{output.name}.flexmoe")


def _finished(values: dict[str, Any]) -> Finished:
    output, errors = values.pop("output"), values.pop("errors")
    failed_rows = tuple(values.pop("failed_rows"))
    return Finished(
        output=Published(**output), errors=errors and Published(**errors), failed_rows=failed_rows, **values
    )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """What differs, by name, each as a phrase."""
    phrases = {}
    for name in dict.fromkeys((*old, *new)):
        was, now = old.get(name), new.get(name)
        if was != now:
            phrases[name] = _FILES.get(name) or _flag(name, was, now)
    return phrases


def _flag(name: str, was: Any, now: Any) -> str:
    return f"{option(name)} was {_value(was)} and is {_value(now)}"


def _value(value: Any) -> str:
    return "not given" if value is None else str(value)


def _shard(shard: tuple[int, int] | None) -> str:
    return "not given" if shard is None else f"{shard[0]}/{shard[1]}"
