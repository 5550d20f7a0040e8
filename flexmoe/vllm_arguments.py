"""Arguments that vLLM has and this runtime has not: taken where they change nothing, refused in a sentence otherwise."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from flexmoe.errors import UsageError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Foreign:
    """An argument of vLLM's.

    Args:
        neutral: values that ask for nothing; None: it changes no output, whatever its value.
        instead: why any other value is refused, or what to give.
    """

    neutral: tuple[Any, ...] | None = None
    instead: str = ""

    def asks_for_nothing(self, value: Any) -> bool:
        """Whether a value can be left out."""
        if self.neutral is None:
            return True
        return any(type(value) is type(each) and value == each for each in self.neutral)


_NOTHING: tuple[Any, ...] = (None, [], {}, ())
_ONE_GPU = "one GPU is used, and the model need not fit on it"
_FETCH = "fetch the model first, and give its directory as model"
_PLANNED = "the policy decides it; gpu_mem and cpu_mem are the budgets"
_TEXT_ONLY = "only text is taken"
_GUIDE = "give structured_outputs in SamplingParams"
_NO_ADAPTERS = "there are no adapters"
_NO_DRAFTS = "there is no speculative decoding"

#: Of `vllm.SamplingParams`.
SAMPLING: dict[str, Foreign] = {
    "best_of": Foreign((None,), "ask for n"),
    "use_beam_search": Foreign((None, False), "there is no beam search; ask for n samples"),
    "length_penalty": Foreign((None, 1, 1.0), "there is no beam search"),
    "early_stopping": Foreign((None, False), "there is no beam search"),
    "bad_words": Foreign(_NOTHING, "give logit_bias of -100 for single tokens"),
    "allowed_token_ids": Foreign(_NOTHING, "give logit_bias"),
    "logits_processors": Foreign(_NOTHING, "give logit_bias"),
    "guided_decoding": Foreign((None,), _GUIDE),
    "truncate_prompt_tokens": Foreign((None,), "give the token ids that are to be kept as the prompt"),
    "spaces_between_special_tokens": Foreign((None, True), "texts are as the tokenizer makes them"),
    "thinking_token_budget": Foreign((None,), "give max_tokens"),
    "repetition_detection": Foreign((None,), "give stop or max_tokens"),
    "flat_logprobs": Foreign((None, False), "each token has a record"),
    "extra_args": Foreign(_NOTHING, "nothing reads them"),
    "output_kind": Foreign(),
    "skip_clone": Foreign(),
    "skip_reading_prefix_cache": Foreign(),
}

#: Of `vllm.StructuredOutputsParams`.
STRUCTURED: dict[str, Foreign] = {
    "disable_fallback": Foreign(),
    "disable_additional_properties": Foreign((None, False), "write additionalProperties: false in the schema"),
    "structural_tag": Foreign((None,), "give json, regex, choice or grammar"),
}

#: Of `vllm.LLM`, and of the `EngineArgs` that it passes on.
ENGINE: dict[str, Foreign] = {
    **dict.fromkeys(
        (
            "async_scheduling",
            "attention_backend",
            "block_size",
            "compilation_config",
            "cuda_graph_sizes",
            "disable_async_output_proc",
            "disable_cascade_attn",
            "disable_custom_all_reduce",
            "disable_log_requests",
            "disable_log_stats",
            "distributed_executor_backend",
            "enable_chunked_prefill",
            "enforce_eager",
            "guided_decoding_backend",
            "long_prefill_token_threshold",
            "max_context_len_to_capture",
            "max_long_partial_prefills",
            "max_num_batched_tokens",
            "max_num_partial_prefills",
            "max_num_seqs",
            "max_parallel_loading_workers",
            "max_seq_len_to_capture",
            "num_gpu_blocks_override",
            "num_scheduler_steps",
            "optimization_level",
            "performance_mode",
            "preemption_mode",
            "prefix_caching_hash_algo",
            "profiler_config",
            "scheduling_policy",
            "served_model_name",
            "structured_outputs_config",
            "swap_space",
            "tokenizer_mode",
            "use_tqdm_on_load",
        ),
        Foreign(),
    ),
    **dict.fromkeys(
        ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size"),
        Foreign((None, 1), _ONE_GPU),
    ),
    "enable_expert_parallel": Foreign((None, False), _ONE_GPU),
    "trust_remote_code": Foreign(),  # no code of a checkpoint is ever run
    "quantization": Foreign((None,), "weights are computed in 16 or 32 bits; give a checkpoint of those, and dtype"),
    "cpu_offload_gb": Foreign((None, 0, 0.0), _PLANNED),
    "kv_cache_memory_bytes": Foreign((None,), "give kv_tokens"),
    "max_logprobs": Foreign((None, *range(21)), "20 are reported at most"),
    "skip_tokenizer_init": Foreign((None, False), "prompts can be token ids, and detokenize=False makes no texts"),
    "override_generation_config": Foreign(_NOTHING, "give SamplingParams"),
    **dict.fromkeys(("revision", "code_revision", "tokenizer_revision"), Foreign((None, "main"), _FETCH)),
    **dict.fromkeys(("download_dir", "hf_config_path", "hf_token"), Foreign((None,), _FETCH)),
    **dict.fromkeys(
        ("hf_overrides", "rope_scaling", "rope_theta"), Foreign(_NOTHING, "change the checkpoint's config.json")
    ),
    "config_format": Foreign((None, "auto", "hf"), "checkpoints are Hugging Face's safetensors"),
    "model_impl": Foreign((None, "auto", "vllm"), "the families of docs/models.md have one implementation each"),
    **dict.fromkeys(("runner", "task"), Foreign((None, "auto", "generate"), "there is generation only")),
    "convert": Foreign((None, "auto", "none"), "there is generation only"),
    **dict.fromkeys(("pooler_config", "override_pooler_config"), Foreign((None,), "there is generation only")),
    "enable_lora": Foreign((None, False), _NO_ADAPTERS),
    **dict.fromkeys(("max_loras", "max_lora_rank", "max_cpu_loras"), Foreign()),
    **dict.fromkeys(("speculative_config", "speculative_model"), Foreign((None,), _NO_DRAFTS)),
    **dict.fromkeys(
        ("limit_mm_per_prompt", "mm_processor_kwargs", "allowed_local_media_path", "allowed_media_domains"),
        Foreign((*_NOTHING, ""), _TEXT_ONLY),
    ),
    "logits_processors": Foreign(_NOTHING, "give logit_bias in SamplingParams"),
    "kv_transfer_config": Foreign((None,), _ONE_GPU),
    "enable_sleep_mode": Foreign((None, False), "close the LLM, and make a new one"),
}

#: Of `vllm.LLM.generate` and `vllm.LLM.chat`.
CALL: dict[str, Foreign] = {
    "prompt_token_ids": Foreign((None,), 'give the ids as prompts, such as {"prompt_token_ids": [1, 2]}'),
    "lora_request": Foreign(_NOTHING, _NO_ADAPTERS),
    "priority": Foreign(),
    "chat_template_content_format": Foreign(("auto", "string"), "contents reach the template as text"),
    "mm_processor_kwargs": Foreign(_NOTHING, _TEXT_ONLY),
    "tokenization_kwargs": Foreign(_NOTHING, "give token ids, made with get_tokenizer()"),
    "guided_options_request": Foreign(_NOTHING, _GUIDE),
}


def only_ours(
    what: str, given: Mapping[str, Any], ours: Collection[str], theirs: Mapping[str, Foreign]
) -> dict[str, Any]:
    """What is left of some arguments without those of vLLM's that ask for nothing.

    Args:
        what: takes the arguments, for messages.
        ours: names that it has.
        theirs: names that vLLM has.

    Raises:
        UsageError: an argument is unknown, or asks for what there is not.
    """
    left, ignored = {}, []
    for name, value in given.items():
        if name in ours:
            left[name] = value
        elif name not in theirs:
            raise UsageError(f"{what} has no argument {name!r}{_meant(name, ours, theirs)} It has {', '.join(ours)}")
        elif theirs[name].asks_for_nothing(value):
            ignored.append(name)
        else:
            raise UsageError(
                f"{what} does not take {name}={value!r:.60}: {theirs[name].instead}. It has {', '.join(ours)}"
            )
    if ignored:
        log.info("%s: %s changes nothing here", what, ", ".join(ignored))
    return left


def _meant(name: str, ours: Collection[str], theirs: Mapping[str, Foreign]) -> str:
    close = get_close_matches(name.lower(), [*ours, *theirs], n=1, cutoff=0.75)
    return f"; did you mean {close[0]!r}?" if close else "."
