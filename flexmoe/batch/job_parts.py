"""From the options of a run to its job: files, requests, and what decides the completions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from cost_model.model.packing import check_unpacked, packed_as
from flexmoe.batch.options import RunOptions, is_auto
from flexmoe.checkpoint.generation_config import generation_config
from flexmoe.debugging.records import RUN
from flexmoe.errors import UsageError
from flexmoe.job.identity import digest, model_identity, tokenizer_identity
from flexmoe.job.job import Job
from flexmoe.job.output_files import check_distinct, check_writable
from flexmoe.job.runner import StreamOptions
from flexmoe.models.loader import Model, load_model
from flexmoe.preflight.prepare_setup import PreparerSetup
from flexmoe.preflight.served_model import ServedModel
from flexmoe.system.interrupts import Interrupts
from flexmoe.text.chat_template import read_template
from policies.common.option_names import option


def check_files(options: RunOptions) -> None:
    """Refuses files that could not be written, or that are the same, before anything is opened.

    Raises:
        UsageError: two files are the same, or one is no regular file.
        StorageError: a directory is missing or cannot be written.
    """
    written = {
        "trace": options.trace,
        "metrics": options.metrics_json,
        "router statistics": options.router_stats,
        "saved policy": options.save_policy,
    }
    files: dict[str, Path | None] = {"input": options.input_file, **written, "expert usage": options.expert_usage}
    files["policy"] = options.policy_file
    files["hardware"] = None if is_auto(options.hardware) else options.hardware
    if options.input_file is not None:
        files["output"], files["error"] = options.job_files().outputs()
    check_distinct({name: path for name, path in files.items() if path is not None})
    for path in written.values():
        if path is not None:
            check_writable(path)
    if options.debug_records is not None:
        _check_directory(options.debug_records)


def _check_directory(directory: Path) -> None:
    """Refuses a directory for the records of debug mode that could not be written.

    Raises:
        UsageError: it is a file.
        StorageError: it, or where it would be made, cannot be written.
    """
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{option('debug_dir')} is {directory}, which is a file; give a directory")
    check_writable(directory / RUN if directory.is_dir() else directory)


def open_model(options: RunOptions) -> Model:
    """The model with the generation config that is asked for; nothing heavy is loaded.

    Raises:
        FlexMoEError: either cannot be read.
    """
    model = load_model(options.model, options.load_format, options.dtype)
    return replace(model, generation_config=generation_config(options.generation_config, model.generation_config))


def weight_format(options: RunOptions, model: Model) -> str | None:
    """What the run packs the model's weights in, as an option or the given policy says; None where it packs none.

    Raises:
        UsageError: an option asks for it, and they are packed already.
        InfeasibleError: the policy is for another format than they are packed in.
        FlexMoEError: the policy's file cannot be used.
    """
    check_unpacked(model.arch, options.compress_weight)
    asked: str | None = options.decided("compress_weight")
    return None if packed_as(model.arch, asked) == model.arch else asked


def open_job(
    options: RunOptions,
    model: Model,
    interrupts: Interrupts | None = None,
    *,
    show_bar: bool = False,
    model_name: str | None = None,
) -> Job:
    """The job, held until it is closed.

    Args:
        interrupts: what may ask it to stop.
        show_bar: draw a bar on stderr.
        model_name: reported for rows that name no model; None: as the options name it.

    Raises:
        FlexMoEError: as `Job`.
    """
    template = _template(options)
    stream = StreamOptions(bar=show_bar, checkpoint_interval_s=options.checkpoint_interval_s)
    return Job(
        options.job_files(),
        preparer_setup(options, model, template),
        _identity(options, model, template),
        model_name=model_name or options.model,
        choices={"generation_config": options.generation_config},
        keep_reasoning=options.keep_reasoning_in_content,
        stream=stream,
        interrupts=interrupts,
        prefix_caching=options.prefix_caching,
    )


def preparer_setup(options: RunOptions, model: Model, template: str | None = None) -> PreparerSetup:
    """How requests are made of rows.

    Args:
        template: text of a chat template; None: as the options say.

    Raises:
        UsageError: the chat template cannot be read.
    """
    return PreparerSetup.of(
        options.model,
        model.directory,
        vocab_size=model.arch.vocab_size,
        context=model.arch.max_position,
        default_max_tokens=options.gen_len,
        chat_template=template or _template(options),
        generation_config=model.generation_config,
        strict_model=options.strict_model,
    )


def _template(options: RunOptions) -> str | None:
    return None if options.chat_template is None else read_template(options.chat_template)


def _identity(options: RunOptions, model: Model, template: str | None) -> dict[str, Any]:
    """What decides the completions, beside the input. The compute dtype does as it was asked for: one that a device cannot
    do is replaced, and devices may change."""
    packed = weight_format(options, model)
    stored = str(model.stored_dtype).removeprefix("torch.")
    return {
        **model_identity(model),
        "tokenizer": tokenizer_identity(model.directory),
        "generation_config": digest(model.generation_config),
        "chat_template": template and digest({"": template})[:12],
        "strict_model": sorted(ServedModel.of(options.model).names) if options.strict_model else False,
        "keep_reasoning_in_content": options.keep_reasoning_in_content,
        "dtype": stored if options.dtype == "auto" else options.dtype,
        "compress_cache": bool(options.decided("compress_cache")),
        "gen_len": options.gen_len,
        "seed": options.seed,
        **({} if packed is None else {"compress_weight": packed}),
    }
