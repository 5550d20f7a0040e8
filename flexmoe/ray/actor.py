"""`Generate`: what an actor of Ray Data runs, an engine that completes the rows of all of its batches in one stream."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from flexmoe.checkpoint.generation_config import generation_config as read_generation_config
from flexmoe.errors import UsageError
from flexmoe.job.identity import digest, model_identity, tokenizer_identity
from flexmoe.job.runner import CHECKPOINT_INTERVAL_S
from flexmoe.llm import LLM
from flexmoe.outputs import RequestOutput
from flexmoe.params import EngineRequest
from flexmoe.preflight.prepare_setup import PreparerSetup
from flexmoe.ray.columns import with_columns
from flexmoe.ray.engine_loop import EngineLoop
from flexmoe.ray.rows import ERROR_COLUMN, KeyedRequest, RowReader
from flexmoe.ray.token_journal import TokenJournal

log = logging.getLogger(__name__)
#: The code with which an actor ends whose engine has failed. Ray makes another in its place, which is given its batches.
ENGINE_FAILED = 1


class Generate:
    """Completes the rows of a Ray Data set: a class for ``Dataset.map_batches``.

    Columns in, as in `ray.data.llm`: ``messages`` (a chat) or ``prompt`` (a text, or token ids); ``sampling_params``, whose
    fields are those of a line of a requests file; ``chat_template_kwargs``. Where a row has both messages and a prompt, the
    messages count. Columns out, beside those that were there: ``generated_text``, ``generated_tokens`` (ids),
    ``num_input_tokens``, ``num_generated_tokens``, ``finish_reason`` (``stop`` or ``length``) and ``__inference_error__``: a
    sentence for a row that cannot run, which has no text then, and "" for all others.

    Batches of all calls that are open run as one stream. An engine that fails ends its process (code 1), so that Ray makes
    another actor and gives it the batches.

    Args:
        model: checkpoint directory, hub id, or with ``load_format="dummy"`` a known shape.
        sampling_params: of rows without a column of them.
        id_column: a column that has an id for each row, a text or a number, all of them different. Random draws depend on it, as
            on the `custom_id` of a file's row; without it they depend on what the row says.
        journal: directory on a disk that all nodes share. Tokens of rows in flight are kept there, and an actor that starts
            resumes those that it finds. None keeps none.
        checkpoint_interval_s: seconds between two writes of them.
        generation_config: sampling defaults of rows: ``auto`` (the model's generation_config.json), ``none``, or a directory.
        **options: the other arguments of `flexmoe.LLM`: ``policy``, ``workload``, ``gpu_mem``, ``cpu_mem``, ``dtype``, ``gen_len`` …

    Attributes:
        llm: the engine, for its metrics.

    Raises:
        FlexMoEError: the model is missing or broken, the policy does not fit, or the journal cannot be written.

    Example:
        >>> dataset.map_batches(
        ...     flexmoe.ray.Generate,
        ...     fn_constructor_kwargs={"model": "checkpoints/mixtral", "gpu_mem": 22},
        ...     compute=ray.data.ActorPoolStrategy(size=2),
        ...     num_gpus=1,
        ... )
    """

    def __init__(
        self,
        model: str,
        *,
        sampling_params: Mapping[str, Any] | None = None,
        id_column: str | None = None,
        journal: str | os.PathLike[str] | None = None,
        checkpoint_interval_s: float = CHECKPOINT_INTERVAL_S,
        generation_config: str = "auto",
        **options: Any,
    ) -> None:
        if sampling_params is not None and not isinstance(sampling_params, Mapping):
            raise UsageError(f"sampling_params is {sampling_params!r:.80}; give a dict of names and values")
        kept = None if journal is None else TokenJournal(journal, checkpoint_interval_s)
        self._journal = kept
        self.llm = LLM(model, generation_config=generation_config, **options)
        self._reader = RowReader(
            preparer=_setup(self.llm, str(model), generation_config).preparer(self.llm.tokenizer),
            model="" if kept is None else _identity(self.llm),
            sampling_params=dict(sampling_params or {}),
            id_column=id_column,
        )
        if kept is not None:
            log.info("the journal has tokens of %d rows", kept.recovered_rows)
        self._numbers = itertools.count()
        self._reading = ThreadPoolExecutor(1, "flexmoe-rows")  # one thread: tokenizers are not made for several
        self._loop = EngineLoop(self.llm, kept, _end_process)

    async def __call__(self, batch: Any) -> Any:
        """The batch with the columns that this class adds, when all of its rows have ended.

        Raises:
            UsageError: this is no batch of Ray Data's.
        """
        read = await asyncio.get_running_loop().run_in_executor(self._reading, self._reader.read, batch)
        rows = [(row.key, self._named(row)) for row in read if isinstance(row, KeyedRequest)]
        try:
            results = iter([await asyncio.wrap_future(future) for future in self._loop.submit(rows)])
        finally:
            self._loop.release(request.request_id for _, request in rows)
        return with_columns(batch, _columns([row if isinstance(row, str) else next(results) for row in read]))

    def close(self) -> None:
        """Ends the engine; for who uses this class without Ray."""
        self._loop.close()
        self._reading.shutdown()
        self.llm.close()
        if self._journal is not None:
            self._journal.close()

    def _named(self, row: KeyedRequest) -> EngineRequest:
        """The request under an id of its own, with what was generated of it before."""
        before = () if self._journal is None else self._journal.resumed(row.key)
        return replace(row.request, request_id=str(next(self._numbers)), resumed=before)


def _setup(llm: LLM, name: str, generation_config: str) -> PreparerSetup:
    model, config = llm.model, llm.engine.config
    return PreparerSetup.of(
        name,
        model.directory,
        vocab_size=model.arch.vocab_size,
        context=config.max_model_len or model.arch.max_position,
        default_max_tokens=config.gen_len,
        generation_config=read_generation_config(generation_config, model.generation_config),
        strict_model=False,
    )


def _identity(llm: LLM) -> str:
    """What decides the completions beside the rows."""
    config = llm.engine.config
    return digest(
        {
            **model_identity(llm.model),
            "tokenizer": tokenizer_identity(llm.model.directory),
            "dtype": config.dtype,
            "seed": config.seed,
            "eos_ids": config.eos_ids,
            "compress_cache": config.policy.compress_cache,
        }
    )


def _columns(results: Sequence[RequestOutput | str]) -> dict[str, tuple[type, list[Any]]]:
    """The new columns; a row that has an error has no text and counts of 0."""
    errors = [result if isinstance(result, str) else result.error or "" for result in results]
    done = [None if isinstance(each, str) or each.error is not None else each for each in results]
    tokens = [[] if each is None else list(each.outputs[0].token_ids) for each in done]
    return {
        "generated_text": (str, ["" if each is None else each.outputs[0].text or "" for each in done]),
        "generated_tokens": (list, tokens),
        "num_input_tokens": (int, [0 if each is None else len(each.prompt_token_ids) for each in done]),
        "num_generated_tokens": (int, list(map(len, tokens))),
        "finish_reason": (str, ["" if each is None else each.outputs[0].finish_reason for each in done]),
        ERROR_COLUMN: (str, errors),
    }


def _end_process(error: Exception) -> None:
    """The engine is dead, and an actor without one would fail every batch that it is given. `sys.exit` would end this thread
    alone; an actor that takes its leave properly is not made anew."""
    log.error("the engine failed, and its actor ends: %s", error, exc_info=error)
    for handler in logging.getLogger().handlers:
        handler.flush()
    sys.stderr.flush()
    os._exit(ENGINE_FAILED)
