"""From a request to what the engine takes, and from a file of requests to the lengths that size its memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from flexmoe.errors import DataError
from flexmoe.params import EngineRequest
from flexmoe.requests import Request
from flexmoe.tokenizer import Tokenizer
from policies.policy import Workload


def engine_requests(request: Request, row: int, tokenizer: Tokenizer, default_max_tokens: int) -> list[EngineRequest]:
    """One engine request per choice of a request; ids are ``<row>/<choice>``.

    Raises:
        DataError: a text cannot be tokenized, or the model has no chat template.
    """
    if request.messages is not None:
        prompts = [tokenizer.encode_chat(request.messages)]
    else:
        prompts = [tokenizer.encode(p) if isinstance(p, str) else p for p in request.prompts]
    params = request.params
    if params.max_tokens is None:
        params = replace(params, max_tokens=default_max_tokens)
    return [
        EngineRequest(request_id=f"{row}/{choice}", prompt_token_ids=ids, params=params)
        for choice, ids in enumerate(prompts)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Lengths of a file's rows.

    Attributes:
        workload: mean prompt and completion lengths, rounded up.
        longest_row: tokens of the longest row that the context admits, prompt and completion.
        rows: rows measured; those that cannot be tokenized are left to become error rows.
    """

    workload: Workload
    longest_row: int
    rows: int


def measure(requests: Iterable[Request], tokenizer: Tokenizer, default_max_tokens: int, context: int) -> Measured:
    """Measure the rows of a job; a row's completion counts as its ``max_tokens``."""
    lengths: list[tuple[int, int]] = []
    for request in requests:
        try:
            parts = [] if request.error else engine_requests(request, 0, tokenizer, default_max_tokens)
        except DataError:
            continue
        for part in parts:
            length = len(part.prompt_token_ids)
            if 0 < length < context:
                lengths.append((length, min(length + part.params.max_tokens, context) - length))
    if not lengths:  # every row will become an error row
        return Measured(workload=Workload(prompt_len=1, gen_len=1), longest_row=2, rows=0)
    workload = Workload.of_lengths(lengths)
    return Measured(workload=workload, longest_row=workload.longest_row, rows=len(lengths))
