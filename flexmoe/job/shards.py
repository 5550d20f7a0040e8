"""A job divided among machines that have nothing in common but a disk: each takes every n-th row.

Neighbours in a file tend to be alike (sorted by length, or grouped by task), so that every n-th row divides the work
more evenly than n pieces would.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flexmoe.errors import UsageError
from policies.common.file_io import storage_errors
from policies.common.option_names import option

_SLURM = "SLURM_ARRAY_TASK_"
MOST_SHARDS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Part ``index`` of ``count``; the parts are numbered from 0.

    Raises:
        UsageError: there is no such part.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST_SHARDS or not 0 <= self.index < self.count:
            raise UsageError(
                f"{option('shard')} is {self.index}/{self.count}; give i/n with i from 0 to n - 1 and n at most {MOST_SHARDS}"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From ``i/n``.

        Raises:
            UsageError: it is not of that form, or there is no such part.
        """
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if found is None:
            raise UsageError(f"{option('shard')} is {text!r}; give i/n, for example 0/8 for the first of 8")
        return cls(index=int(found[1]), count=int(found[2]))

    @classmethod
    def of_slurm(cls, environment: Mapping[str, str] = os.environ) -> Shard:
        """The part that this task of a Slurm job array stands for.

        Raises:
            UsageError: this is no task of an array, or its variables make no sense.
        """
        try:
            task, first, last, count = (int(environment[_SLURM + name]) for name in ("ID", "MIN", "MAX", "COUNT"))
        except (KeyError, ValueError):
            raise UsageError(
                f"{option('shard')} without a value takes Slurm's {_SLURM}ID, MIN, MAX and COUNT, and they are not all set; "
                f"run it in a job array (sbatch --array=0-7), or give {option('shard', 'i/n')}"
            ) from None
        step = max(1, (last - first) // max(1, count - 1))
        if (task - first) % step or count != (last - first) // step + 1:
            raise UsageError(
                f"the tasks {first} to {last} of this Slurm array are {count}, unevenly spaced; give {option('shard', 'i/n')}"
            )
        return cls(index=(task - first) // step, count=count)

    def check_division(self, output: Path) -> None:
        """Shows that no work beside `output` is of a job divided by another count: an array of which only some tasks are
        submitted again looks as a whole one of fewer parts.

        Raises:
            UsageError: there is such work; the sentence names it.
        """
        stem, end = _split(output.name)
        pattern = re.compile(rf"{re.escape(stem)}\.shard-([0-9]+)-of-([0-9]+){re.escape(end)}\.flexmoe")
        with storage_errors(output.parent):
            names = sorted(os.listdir(output.parent)) if output.parent.is_dir() else []
        for name in names:
            found = pattern.fullmatch(name)
            if found is not None and int(found[2]) != self.count:
                raise UsageError(
                    f"this Slurm array stands for shard {self.index}/{self.count}, and {output.with_name(name)} is of a job "
                    f"divided by {found[2]}. To resume a part of that one give {option('shard', f'i/{found[2]}')}, where i is "
                    f"the part's number from 0; to divide anew remove what is there, or choose another output"
                )

    def rows(self, total: int) -> range:
        """The rows of this part, of ``total``."""
        return range(self.index, total, self.count)

    def path(self, output: Path) -> Path:
        """``out.shard-0-of-8.jsonl`` for ``out.jsonl``."""
        stem, end = _split(output.name)
        return output.with_name(f"{stem}.shard-{self.index}-of-{self.count}{end}")


def _split(name: str) -> tuple[str, str]:
    stem = name.removesuffix(".jsonl")
    return stem, name[len(stem) :]
