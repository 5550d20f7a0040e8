"""Why a request can never run: what is known before it enters the engine."""

from __future__ import annotations

from cost_model.model.arch import ModelArch
from flexmoe.params import EngineRequest


def problem(request: EngineRequest, arch: ModelArch, *, limit: int, room: int, has_tokenizer: bool) -> str | None:
    """The reason as a sentence; None if the request can run.

    Args:
        limit: tokens that prompt and completion may reach.
        room: tokens of the longest row that the KV cache and its buffers hold.
        has_tokenizer: whether token ids can be made text.
    """
    prompt = request.prompt_token_ids
    if not prompt:
        return "the prompt has no tokens"
    wrong = next((t for t in prompt if not 0 <= t < arch.vocab_size), None)
    if wrong is not None:
        return f"token id {wrong} is outside the vocabulary of {arch.vocab_size}"
    if len(prompt) >= arch.max_position and request.params.max_tokens != 0:
        return f"the prompt has {len(prompt)} tokens; the model's context of {arch.max_position} leaves no room for one more"
    if len(prompt) > arch.max_position:
        return f"the prompt has {len(prompt)} tokens; the model's context is {arch.max_position}"
    if limit - 1 > room:
        return (
            f"prompt and completion may reach {limit} tokens, but the KV cache and its buffers were planned for at most "
            f"{room} in one row; lower max_tokens, shorten the prompt, or give the KV cache more memory"
        )
    return _parameters(request, arch.vocab_size, has_tokenizer) or _resumed(request, arch.vocab_size)


def _parameters(request: EngineRequest, vocab: int, has_tokenizer: bool) -> str | None:
    params = request.params
    if params.logit_bias and params.logit_bias[-1][0] >= vocab:
        return f"logit_bias names token id {params.logit_bias[-1][0]}, which is outside the vocabulary of {vocab}"
    if params.stop and not has_tokenizer:
        return "stop strings need the model's tokenizer, and there is none; use stop_token_ids"
    return None


def _resumed(request: EngineRequest, vocab: int) -> str | None:
    params, resumed = request.params, request.resumed
    if resumed and len(resumed) != params.n:
        return f"it resumes {len(resumed)} samples and asks for n = {params.n}"
    for state in resumed:
        if any(not 0 <= t < vocab for t in state.token_ids):
            return f"it resumes with a token id outside the vocabulary of {vocab}"
        if params.logprobs is not None and len(state.logprobs or ()) != len(state.token_ids):
            return "it resumes without the log-probabilities that it asks for"
    return None
