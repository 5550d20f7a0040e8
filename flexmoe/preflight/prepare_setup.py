"""What a `Preparer` is made of, as values that another process can be given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from flexmoe.checkpoint.generation_config import SamplingDefaults
from flexmoe.preflight.prepare import Limits, Preparer
from flexmoe.preflight.served_model import ServedModel
from flexmoe.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparerSetup:
    """The makings of a `Preparer`; JSON values all.

    Args:
        directory: of the tokenizer's files; None where there are none.
        vocab_size, context: as `Limits`.
        default_max_tokens: as `Preparer`.
        chat_template: instead of the tokenizer's own.
        defaults: as `SamplingDefaults`.
        model_names: as `ServedModel`; rows that name another model fail where ``strict_model`` is set.
        created_s: the time that a chat template may ask for; None means that of the rendering.
    """

    directory: str | None
    vocab_size: int
    context: int
    default_max_tokens: int | None
    chat_template: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    model_names: tuple[str, ...] = ()
    strict_model: bool = False
    created_s: int | None = None

    @classmethod
    def of(
        cls,
        model: str,
        directory: Path | None,
        *,
        generation_config: Mapping[str, Any],
        strict_model: bool,
        **others: Any,
    ) -> PreparerSetup:
        """For a model.

        Args:
            model: its name, as `--model` has it.
            directory: of its files; None where it has none.
            generation_config: its contents.
            **others: the other fields, as they are.

        Raises:
            DataError: the generation config has a value that cannot be used.
        """
        return cls(
            directory=None if directory is None else str(directory),
            defaults=SamplingDefaults.of(generation_config).values,
            model_names=tuple(sorted(ServedModel.of(model).names)),
            strict_model=strict_model,
            **others,
        )

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> PreparerSetup:
        """The inverse of `to_json`."""
        return cls(**{**values, "model_names": tuple(values["model_names"])})

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def at(self, created_s: int) -> PreparerSetup:
        """The same for a job that was created at this time."""
        return replace(self, created_s=created_s)

    def preparer(self, tokenizer: Tokenizer | None = None) -> Preparer:
        """Loads the tokenizer, unless another one is given.

        Raises:
            DataError: the tokenizer's files or the chat template cannot be used.
        """
        return Preparer(
            tokenizer=tokenizer or self._tokenizer(),
            limits=Limits(vocab_size=self.vocab_size, context=self.context),
            default_max_tokens=self.default_max_tokens,
            defaults=SamplingDefaults(values=dict(self.defaults)),
            served=self.served(),
        )

    def _tokenizer(self) -> Tokenizer:
        options: dict[str, Any] = {"chat_template": self.chat_template, "created_s": self.created_s}
        if self.directory is None:
            return Tokenizer(None, "the model", **options)
        return Tokenizer.load(self.directory, **options)

    def served(self) -> ServedModel:
        """The names that rows may give."""
        return ServedModel(names=frozenset(self.model_names), strict=self.strict_model)
