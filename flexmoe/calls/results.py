"""The engine's results as `LLM.generate` and `LLM.chat` give them: with prompts, and with texts of single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from flexmoe.outputs import RequestOutput, TokenLogprob
from flexmoe.text.tokenizer import Tokenizer


def as_asked(output: RequestOutput, prompt: str | None, tokenizer: Tokenizer) -> RequestOutput:
    """A result with its prompt, the texts of the tokens whose log-probabilities it has, and None for the first token of the
    prompt, as in vLLM."""
    scores = output.prompt_logprobs
    return replace(
        output,
        prompt=prompt,
        prompt_logprobs=None if scores is None else (None, *_spelled(scores, tokenizer)),
        outputs=[
            each if each.logprobs is None else replace(each, logprobs=_spelled(each.logprobs, tokenizer))
            for each in output.outputs
        ],
    )


def _spelled(entries: Sequence[TokenLogprob | None], tokenizer: Tokenizer) -> tuple[TokenLogprob, ...]:
    known = (entry for entry in entries if entry is not None)
    if not tokenizer.is_available:
        return tuple(known)
    return tuple(replace(entry, texts={id: tokenizer.token_text(id).text for id in entry}) for entry in known)
