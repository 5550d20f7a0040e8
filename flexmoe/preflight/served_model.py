"""Which model a row may ask for by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from flexmoe.openai.json_line import show
from policies.common.option_names import option


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """The names of the model that runs.

    Args:
        names: they mean it; where there are none, every name does.
        strict: a row that gives another name fails.
    """

    names: frozenset[str]
    strict: bool = False

    @classmethod
    def of(cls, *names: str, strict: bool = False) -> ServedModel:
        """Named by `model` (a directory's last part is a name too) and by what else it is served as."""
        return cls(names=frozenset((*names, *(PurePath(name).name for name in names))), strict=strict)

    def mismatch(self, asked: str | None) -> str | None:
        """That a row asks for another model, as a sentence; None when it does not.

        Args:
            asked: the row's ``model``.
        """
        if asked is None or not self.names or asked in self.names or PurePath(asked).name in self.names:
            return None
        return f"the row asks for the model {show(asked)}, and the one that runs is {min(self.names, key=len)}"

    def warning(self, models: Mapping[str, int]) -> str | None:
        """The warning of a job in which rows ask for another model and do not fail; None where none do.

        Args:
            models: the names that rows give, each with the number of the first line that does.
        """
        mismatches = {line: self.mismatch(name) for name, line in models.items()}
        line = next((line for line, mismatch in mismatches.items() if mismatch), None)
        if line is None or self.strict:
            return None
        strict = option("strict_model", True)
        return f"line {line}: {mismatches[line]}; such rows run all the same ({strict} makes error rows of them)"
