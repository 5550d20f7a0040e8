"""What completions have to be, computed token by token with transformers' model and this project's sampler."""

import pytest
import torch

from flexmoe import EngineRequest, SamplingParams
from flexmoe.sampling.sampler import RowSampler, Sampling
from tests.support.engines import RESIDENT, STREAMED

#: Where KV lives and how it is attended: (percents, percent attended on the CPU).
HOMES = {
    "gpu": (RESIDENT, 0),
    "fetch": ((100, 0, 0, 100, 100, 0), 0),
    "cpu": ((100, 0, 0, 100, 100, 0), 100),
    "disk": ((100, 0, 0, 0, 100, 0), 0),
    "all": (STREAMED, 50),
}
DRAWN = {"temperature": 1.0, "ignore_eos": True}


def request(prompt, key="key", resumed=(), request_id="r", **params):
    return EngineRequest(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(**params),
        stream_key=key,
        resumed=resumed,
    )


def run(llm, *requests):
    """Results by request id."""
    return {out.request_id: out for out in llm.stream(list(requests))}


_KNOWN = {}


def reference(variant, prompt, count, **asked):
    """Token ids and their records of a sample, from transformers' logits; computed once for all tests that ask for it.

    Args:
        asked: ``key``, ``index`` and ``seed`` of the draws, and sampling parameters.
    """
    about = repr((variant.directory, prompt, count, sorted(asked.items())))
    if about not in _KNOWN:
        _KNOWN[about] = _computed(variant, prompt, count, **asked)
    ids, found = _KNOWN[about]
    return list(ids), list(found)


def sample(logits_RV, rows, **more):
    """Tokens of rows of logits, waited for."""
    return Sampling(logits_RV, rows, **more).chosen()


@torch.no_grad()
def _computed(variant, prompt, count, *, key="key", index=0, seed=0, **params):
    params, ids, found = SamplingParams(**params), [], []
    state = RowSampler.of(params, seed=seed, key=key, index=index, prompt=prompt, generated=())
    for _ in range(count):
        logits = variant.model(torch.tensor([[*prompt, *ids]])).logits[0, -1:]
        chosen = sample(logits, [state], workspace_bytes=1 << 24)
        state.append_token(chosen.tokens[0])
        ids += chosen.tokens
        found += chosen.logprobs
    return ids, found


@torch.no_grad()
def prompt_reference(variant, prompt):
    """Transformers' log-probabilities ``[P - 1, V]`` of what follows each token of a prompt."""
    return variant.model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)


def assert_records(records, ids, expected, k):
    """Records of given ids under log-probabilities ``[N, V]``."""
    assert [r.token_id for r in records] == list(ids)
    for record, logprobs in zip(records, expected, strict=True):
        assert record.logprob == pytest.approx(logprobs[record.token_id].item(), abs=2e-5)
        best = logprobs.topk(k)
        assert [t for t, _ in record.top] == best.indices.tolist()
        assert [p for _, p in record.top] == pytest.approx(best.values.tolist(), abs=2e-5)
