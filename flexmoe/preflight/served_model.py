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

    def note(self, models: Mapping[str, int]) -> str | None:
        """One line about a job in which rows ask for another model and do not fail; None where none do.

        Args:
            models: the names that rows give, each with the number of the first line that does.
        """
        name = next((name for name in models if self.mismatch(name)), None)
        if name is None or self.strict:
            return None
        ran = min(self.names, key=len)
        return f"line {models[name]} names the model {show(name)}; {ran} answered ({option('strict_model', True)} refuses such rows)"
