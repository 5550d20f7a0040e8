"""Sampling defaults of a model: what its generation_config.json says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexmoe.checkpoint.files import read_json_object
from flexmoe.errors import DataError, InputMissingError, UsageError
from flexmoe.params import SamplingParams
from policies.common.option_names import option

FILE = "generation_config.json"
#: Where a row names no value. The temperature follows from `do_sample`.
FIELDS = ("top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingDefaults:
    """Values of `SamplingParams` for rows that give none; what is not here is as in `SamplingParams`, which is greedy.

    Args:
        values: by the names of `SamplingParams`.
    """

    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Mapping[str, Any], source: str = FILE) -> SamplingDefaults:
        """Reads a generation config: greedy unless it says `do_sample`, then at its temperature, or else at 1.

        Args:
            config: its contents; {} where there is none.
            source: the file, for messages.

        Raises:
            DataError: a value that cannot be used; the sentence names file and field.
        """
        sampled = config.get("do_sample")
        if sampled is not None and not isinstance(sampled, bool):
            raise DataError(f"{source}: do_sample is {sampled!r}; it must be true or false")
        given = {name: config[name] for name in ("temperature", *FIELDS) if config.get(name) is not None}
        for name, value in given.items():
            try:
                SamplingParams(**{name: value})
            except UsageError as error:
                ignored = option("generation_config", "none")
                raise DataError(f"{source}: {error}; repair it, or ignore it with {ignored}") from None
        given["temperature"] = given.get("temperature", 1.0) if sampled else 0.0
        return cls(values=given)

    def params(self, given: Mapping[str, Any], max_tokens: int | None) -> SamplingParams:
        """What a row is sampled with.

        Args:
            given: the fields that the row gives.
            max_tokens: for a row that gives no limit (`SamplingParams.limited`); None leaves it without.
        """
        params = SamplingParams(**{**self.values, **given})
        return params if max_tokens is None else params.limited(max_tokens)


def generation_config(choice: str, of_model: Mapping[str, Any]) -> dict[str, Any]:
    """The generation config that the option `generation_config` names.

    Args:
        choice: `auto` for the model's own, `none` for none, or a directory (or file) that has another.
        of_model: contents of the model's own; {} where there is none.

    Raises:
        InputMissingError: there is no such directory or file.
        DataError, StorageError: the file cannot be used.
    """
    if choice == "auto":
        return dict(of_model)
    if choice == "none":
        return {}
    path = Path(choice)
    path = path / FILE if path.is_dir() else path
    if not path.is_file():
        name = option("generation_config")
        raise InputMissingError(f"there is no {path}; give {name} auto, none, or a directory that has one")
    return read_json_object(path)
