"""Prompts through an `LLM`, each result as soon as it is there: what was scored of a prompt is not kept for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flexmoe.errors import UsageError
from flexmoe.llm import LLM
from flexmoe.outputs import RequestOutput
from flexmoe.params import SamplingParams


def completed(llm: LLM, asked: Sequence[tuple[tuple[int, ...], SamplingParams]]) -> Iterator[tuple[int, RequestOutput]]:
    """The results of prompts of token ids, in any order, each with its prompt's place.

    Raises:
        UsageError: a prompt cannot run; nothing has been computed then.
    """
    requests = llm.in_waiting_order([ids for ids, _ in asked], [params for _, params in asked])
    for output in llm.stream(requests):
        if output.error is not None:
            raise UsageError(f"prompt {output.request_id}: {output.error}")
        yield int(output.request_id), output
