"""Prompts through an `LLM`, each result as soon as it is there: what was scored of a prompt is not kept for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flexmoe.errors import UsageError
from flexmoe.llm import LLM
from flexmoe.outputs import RequestOutput
from flexmoe.params import EngineRequest, SamplingParams
from flexmoe.prefixes.digests import page_digests
from flexmoe.prefixes.finder import find_prefixes
from flexmoe.prefixes.order import PrefixOrder


def completed(llm: LLM, asked: Sequence[tuple[tuple[int, ...], SamplingParams]]) -> Iterator[tuple[int, RequestOutput]]:
    """The results of prompts of token ids, in any order, each with its prompt's place.

    Raises:
        UsageError: a prompt cannot run; nothing has been computed then.
    """
    tree = find_prefixes(page_digests(ids) for ids, _ in asked)
    requests = [
        EngineRequest(request_id=str(place), prompt_token_ids=ids, params=params, prefix_ends=tree.ends(place))
        for place, (ids, params) in enumerate(asked)
    ]
    for request in requests:
        problem = llm.check(request)
        if problem is not None:
            raise UsageError(f"request {request.request_id} of the harness: {problem}")
    order = PrefixOrder(tree, tree.nodes, lambda row: llm.engine.length(requests[row]))
    for output in llm.stream(requests[place] for place in order.waiting(range(len(requests)), max(1, len(requests)))):
        if output.error is not None:
            raise UsageError(f"request {output.request_id} of the harness: {output.error}")
        yield int(output.request_id), output
