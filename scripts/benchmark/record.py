"""What a benchmark run keeps: figures with limit and target, raw numbers, machine and versions; JSON and a table."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from policies.common import file_io

KIND = "flexmoe.bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One line of the table.

    Args:
        what: what was measured, with its denominator.
        value: the result, with its unit.
        beside: the limit or the peer, measured in the same run.
        ratio: result against that; None where there is nothing to compare.
        target: what the ratio has to reach, or None.
        at_most: the ratio has to stay below the target instead.
    """

    what: str
    value: str
    beside: str
    ratio: float | None = None
    target: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.ratio is None or self.target is None:
            return None
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target

    def cells(self) -> list[str]:
        """The table's cells."""
        ratio = "" if self.ratio is None else f"{self.ratio:.3g}"
        target = "" if self.target is None else f"{'≤' if self.at_most else '≥'} {self.target:g}"
        met = {None: "", True: "yes", False: "**no**"}[self.met]
        return [self.what, self.value, self.beside, ratio, target, met]


class Record:
    """The JSON record and the table beside it, written again after every section: an interrupted run keeps its own.

    Args:
        path: the JSON file; the table is beside it with the suffix `.md`. Sections that are already in it stay
            until they are measured again.
        about: what holds for this run: command, machine, versions, model.
    """

    def __init__(self, path: Path, about: dict):
        self._path, self._about = path, about
        self._sections: dict[str, dict] = {}
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            self._sections = found["sections"] if found.get("kind") == KIND else {}

    def add(self, name: str, figures: list[Figure], raw: dict, seconds: float) -> None:
        """Keep a section and write both files."""
        self._sections[name] = {
            "measured": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "seconds": round(seconds, 1),
            **self._about,
            "figures": [asdict(figure) | {"met": figure.met} for figure in figures],
            "raw": raw,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        document = {"kind": KIND, "schema_version": 1, "sections": self._sections}
        _write(self._path, json.dumps(_rounded(document), indent=1) + "\n")
        _write(self._path.with_suffix(".md"), self.table())

    def table(self) -> str:
        """The record as Markdown."""
        lines = [
            "# Benchmark record",
            "",
            "Written by the commands below; the raw numbers of every repetition are in the JSON file beside it.",
            "Generated tokens are those that the requests ask for: no padding, no token that is thrown away.",
            "A ratio is against the limit or peer beside it, measured in the same run.",
        ]
        for name, section in self._sections.items():
            machine, versions = section["machine"], section["versions"]
            known = f" with {machine['instructions']}" if "instructions" in machine else ""  # older records have none
            lines += ["", f"## {name}", ""]
            lines += [
                f"`{section['command']}` · {section['measured']} · {section['seconds']:.0f} s · {section['model']}",
                "",
                f"{machine['cores']} cores of {machine['cpu']}{known}, {machine['memory_gib']} GiB; "
                + ", ".join(f"{package} {number}" for package, number in versions.items()),
                "",
            ]
            lines += figure_table([_figure(entry) for entry in section["figures"]])
        return "\n".join(lines) + "\n"


def figure_table(figures: list[Figure]) -> list[str]:
    """Lines of a Markdown table."""
    head = ["what", "measured", "limit or peer", "ratio", "target", "met"]
    rows = [head, ["---"] * len(head), *(figure.cells() for figure in figures)]
    return ["| " + " | ".join(row) + " |" for row in rows]


def _figure(entry: dict) -> Figure:
    return Figure(**{key: value for key, value in entry.items() if key != "met"})


def _rounded(value):
    """Five significant digits are more than a clock gives."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(item) for item in value]
    return value


def _write(path: Path, text: str) -> None:
    file_io.write_file(path, [text.encode()])
