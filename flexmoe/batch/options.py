"""`RunOptions`: everything that a run can be asked for, checked before anything is opened."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from cost_model.model.families import dtype_name
from cost_model.planner.constraints import Fixed
from flexmoe.engine.config import DEBUG_DIR, RESERVES
from flexmoe.errors import UsageError
from flexmoe.inputs.options import Format, InputOptions
from flexmoe.inputs.request_file import OnInvalid
from flexmoe.job.job import JobFiles
from flexmoe.job.runner import CHECKPOINT_INTERVAL_S
from flexmoe.job.shards import Shard
from flexmoe.models.loader import LOAD_FORMATS
from flexmoe.params import DEFAULT_MAX_TOKENS
from flexmoe.weights.eviction import EXPERT_CACHES
from policies.common.checks import check_count, check_number
from policies.common.directories import OFFLOAD_DIR
from policies.common.option_names import option
from policies.policy import HALF_BLOCKS, WEIGHT_FORMATS, Policy, PolicyFile

PathLike = str | os.PathLike[str]
#: Instead of a file: this machine's own, measured once, or the best policy for the job.
AUTO: Literal["auto"] = "auto"
SCHEDULES = ("rolling", "static")
#: Rows whose attention runs together, and GPU batches, where neither a policy nor an option names them.
GPU_BATCH_SIZE, NUM_GPU_BATCHES = 16, 1

_PATHS = (
    "input_file",
    "output_file",
    "policy",
    "save_policy",
    "hardware",
    "expert_usage",
    "metrics_json",
    "router_stats",
    "trace",
    "debug_dir",
)
_COUNTS = ("gen_len", "gpu_batch_size", "num_gpu_batches", "prefill_tokens", "kv_tokens")
_CHOICES = {
    "load_format": LOAD_FORMATS,
    "schedule": SCHEDULES,
    "expert_cache": EXPERT_CACHES,
    "reserve": RESERVES,
    "compress_weight": WEIGHT_FORMATS,
    "half_blocks": HALF_BLOCKS,
}
#: What a policy says already.
_FIXABLE = (
    "gpu_batch_size",
    "num_gpu_batches",
    "prefill_tokens",
    "schedule",
    "overlap",
    "pin_weight",
    "compress_cache",
    "compress_weight",
    "half_blocks",
)
_OF_A_POLICY = ("percent", *_FIXABLE, "cpu_cache_compute")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """One run. Names are vLLM's and FlexLLMGen's where they have them, and those of the flags of ``python -m flexmoe.run``.

    Args:
        model: checkpoint directory, hub id, or with ``load_format="dummy"`` a known shape.
        load_format: ``auto``, or ``dummy`` for random weights, which need the shape alone.
        input_file: requests: OpenAI Batch lines, plain rows, text, Parquet, or a dataset; None for the benchmark, which makes
            its own rows.
        output_file: completions in input order; failed rows go to ``<output>.errors.jsonl``.
        input_format: ``auto`` (by the name), ``jsonl``, ``text``, ``parquet`` or ``dataset``.
        prompt_column: the column of a table that is the prompt.
        prompt_template: makes the prompt from columns, for example ``Translate: {text}``.
        dataset_split: of a dataset that has several.
        on_invalid: whether a line that cannot be understood fails the job (``fail``) or becomes an error row (``record``).
        chat_template: text of a template or its file, instead of the tokenizer's own.
        generation_config: sampling defaults: ``auto`` (the model's generation_config.json), ``none``, or a directory.
        strict_model: a row that names another model fails.
        keep_reasoning_in_content: leave what a model thinks (``<think>`` blocks, gpt-oss's analysis) in the content of a chat's
            answer, instead of its ``reasoning_content``.
        gen_len: ``max_tokens`` of rows without one; None: 32 for prompts, and chats may take the rest of the context.
        seed: of rows without one.
        overwrite: start a new job instead of the one that is there; the old output stays until the new job has made progress.
        checkpoint_interval_s: seconds between two writes of the tokens of the rows in flight.
        shard: do every n-th row only: a `Shard` or ``i/n``.
        reserve: KV kept for a row: ``max``, up to its ``max_tokens``, or ``p95``, what the job's rows have needed so far.
        policy: a `Policy`, a policy file, or ``auto``, which plans for the job's own lengths on this machine. None plans too,
            unless there are percents. What the options that follow fix, the planner keeps to.
        save_policy: file to write the policy to.
        force_policy: run a policy file that was made for another model.
        percent: FlexLLMGen's six numbers: weights, KV cache and activations, each on the GPU and in CPU memory. With them
            nothing is planned, and the options below have the defaults in brackets.
        gpu_batch_size, num_gpu_batches: rows whose attention runs together (16), and how many such batches are in flight (1).
        prefill_tokens: most prompt tokens that enter a sweep (an even pace).
        schedule: ``rolling`` or ``static`` (``rolling``).
        half_blocks: 2: the block marches as two halves, half a layer apart, so that attention of one and experts of the other
            overlap (1).
        cpu_cache_compute: attend all KV in CPU memory on the CPU.
        overlap, pin_weight: run transfers beside computation, keep CPU weights pinned; None is true.
        compress_cache: keep the KV cache as int8, with a scale for each token and KV head; None is false.
        compress_weight: pack 16-bit weights once below ``offload_dir``, in ``int4``, ``int8``, ``fp8`` or ``mxfp4``, and run those.
        expert_usage: file that says how often each expert was chosen in another run.
        device: ``auto``, ``cuda`` or ``cpu``.
        hardware: this machine's rates, for a prediction: a file of ``python -m flexmoe.probe`` or ``auto``.
        dtype: ``auto`` (the checkpoint's), ``bfloat16``, ``float16`` or ``float32``.
        expert_cache: ``lfu``, ``lru``, ``static`` or ``off``.
        gpu_mem, cpu_mem, nvme_mem: budgets in GiB; None: what the machine has.
        memory_limit: GiB of host memory that the whole process may hold; None: what the machine, its cgroup and resource
            limits allow.
        offload_dir: directory of the disk tier.
        kv_tokens: KV capacity in tokens; None: from the policy and the rows' lengths.
        prefix_caching: rows that begin alike compute and keep what they have in common once, and wait near each other.
        metrics_json, router_stats, trace: files to write; None writes none.
        check_finite: end the run where the model computes NaN or an infinity, and name layer, unit and row.
        debug: write what every sweep computed to the files of ``debug_dir``.
        debug_dir: directory for them, which asks for ``debug`` too; None: ``<output>.debug``, for the benchmark ``flexmoe_debug``.

    Raises:
        UsageError: a value that cannot be used, or two that exclude each other.
    """

    model: str
    load_format: str = "auto"
    input_file: Path | None = None
    output_file: Path | None = None
    input_format: Format = "auto"
    prompt_column: str | None = None
    prompt_template: str | None = None
    dataset_split: str = "train"
    on_invalid: OnInvalid = "fail"
    chat_template: str | None = None
    generation_config: str = "auto"
    strict_model: bool = False
    keep_reasoning_in_content: bool = False
    gen_len: int | None = None
    seed: int = 0
    overwrite: bool = False
    checkpoint_interval_s: float = CHECKPOINT_INTERVAL_S
    shard: Shard | None = None
    reserve: str = "p95"
    policy: Policy | Path | None = None
    save_policy: Path | None = None
    force_policy: bool = False
    percent: tuple[float, ...] | None = None
    gpu_batch_size: int | None = None
    num_gpu_batches: int | None = None
    prefill_tokens: int | None = None
    schedule: str | None = None
    half_blocks: int | None = None
    cpu_cache_compute: bool = False
    overlap: bool | None = None
    pin_weight: bool | None = None
    compress_cache: bool | None = None
    compress_weight: str | None = None
    expert_usage: Path | None = None
    device: str = "auto"
    hardware: Path | None = None
    dtype: str = "auto"
    expert_cache: str = "lfu"
    gpu_mem: float | None = None
    cpu_mem: float | None = None
    nvme_mem: float | None = None
    memory_limit: float | None = None
    offload_dir: Path = OFFLOAD_DIR
    kv_tokens: int | None = None
    prefix_caching: bool = True
    metrics_json: Path | None = None
    router_stats: Path | None = None
    trace: Path | None = None
    check_finite: bool = False
    debug: bool = False
    debug_dir: Path | None = None

    def __post_init__(self) -> None:
        self._convert()
        if (self.input_file is None) != (self.output_file is None):
            both = f"{option('input_file')} and {option('output_file')}"
            raise UsageError(f"give both {both}, or neither for the benchmark")
        for name in _COUNTS:
            if getattr(self, name) is not None:
                check_count(option(name), getattr(self, name))
        check_number(option("checkpoint_interval_s"), self.checkpoint_interval_s, zero=True)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (value is None and name in ("schedule", "compress_weight", "half_blocks")):
                raise UsageError(f"{option(name)} is {value!r}; choose {', '.join(map(str, choices))}")
        defaults = {each.name: each.default for each in fields(self)}
        given = [name for name in _OF_A_POLICY if getattr(self, name) != defaults[name]]
        if is_auto(self.policy):
            given = [name for name in given if name == "percent"]
        if self.policy is not None and given:
            others = ", ".join(map(option, given))
            raise UsageError(f"{option('policy')} already says what {others} would; give one or the other")
        if self.compress_weight is not None and self.load_format == "dummy":
            what = f"{option('load_format', 'dummy')} has random weights"
            raise UsageError(
                f"{what}, which are not packed; leave {option('compress_weight', self.compress_weight)} out"
            )
        self.input_options()

    @property
    def prompt_gen_len(self) -> int:
        """Most tokens of the completion of a prompt that names no limit."""
        return self.gen_len or DEFAULT_MAX_TOKENS

    @property
    def plans_itself(self) -> bool:
        """Whether the policy is to be planned for the job's rows."""
        return is_auto(self.policy) or (self.policy is None and self.percent is None)

    @property
    def fixed(self) -> Fixed:
        """What the planner is to keep to."""
        given = {name: getattr(self, name) for name in _FIXABLE if getattr(self, name) is not None}
        return Fixed(**given, cpu_attention_percent=100.0 if self.cpu_cache_compute else None)

    @property
    def policy_file(self) -> Path | None:
        """The policy's file, where it is one."""
        return self.policy if isinstance(self.policy, Path) and not is_auto(self.policy) else None

    def decided(self, field: str) -> Any:
        """A field of the policy, as the given policy or the option of its name says; None: neither does.

        Raises:
            FlexMoEError: the policy's file cannot be used.
        """
        if self.policy_file is not None:
            return getattr(PolicyFile.load(self.policy_file).policy, field)
        return getattr(self.policy if isinstance(self.policy, Policy) else self, field)

    @property
    def debug_records(self) -> Path | None:
        """The directory that debug mode writes to; None: there is no debug mode."""
        if self.debug_dir is not None or not self.debug:
            return self.debug_dir
        return DEBUG_DIR if self.output_file is None else self.output_file.with_name(f"{self.output_file.name}.debug")

    @property
    def block_size(self) -> int:
        """Rows in flight, where no policy says how many."""
        return (self.gpu_batch_size or GPU_BATCH_SIZE) * (self.num_gpu_batches or NUM_GPU_BATCHES)

    def input_options(self) -> InputOptions:
        """How the input is read."""
        return InputOptions(
            format=self.input_format,
            prompt_column=self.prompt_column,
            prompt_template=self.prompt_template,
            dataset_split=self.dataset_split,
            on_invalid=self.on_invalid,
        )

    def job_files(self) -> JobFiles:
        """The job's files.

        Raises:
            UsageError: there is no job.
        """
        if self.input_file is None or self.output_file is None:
            raise UsageError("a job needs an input file and an output file; give both")
        return JobFiles(
            input=self.input_file,
            output=self.output_file,
            shard=self.shard,
            options=self.input_options(),
            overwrite=self.overwrite,
        )

    def _convert(self) -> None:
        """Takes paths as text, numbers in any sequence, and a shard as ``i/n``."""
        self._set("model", os.fspath(self.model))
        self._set("dtype", dtype_name(self.dtype))
        self._set("offload_dir", Path(self.offload_dir))
        for name in _PATHS:
            if isinstance(getattr(self, name), (str, os.PathLike)):
                self._set(name, Path(getattr(self, name)))
        if self.percent is not None:
            self._set("percent", tuple(self.percent))
        if isinstance(self.shard, str):
            self._set("shard", Shard.parse(self.shard))

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


def is_auto(value: object) -> bool:
    """Whether an option that takes a file asks for this machine's own, or for a plan."""
    return not isinstance(value, Policy) and str(value) == AUTO
