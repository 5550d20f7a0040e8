"""From the options and the lengths of the rows to a policy, what it will do, and the engine's options."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cost_model.memory.allocation import PAGE_TOKENS
from cost_model.model.arch import ModelArch
from cost_model.model.packing import packed_as
from cost_model.routing.expert_usage import ExpertUsage
from cost_model.simulation.simulate import Simulation
from flexmoe.batch.job_parts import weight_format
from flexmoe.batch.options import AUTO, GPU_BATCH_SIZE, NUM_GPU_BATCHES, RunOptions
from flexmoe.engine.config import EngineConfig
from flexmoe.engine.engine_plan import EnginePlan
from flexmoe.engine.router_counter import coactivation_bytes
from flexmoe.errors import InfeasibleError
from flexmoe.models.loader import Model, compute_dtype
from flexmoe.planning.configure import RESIDENT
from flexmoe.planning.forecast import Forecaster
from flexmoe.preflight.lengths import Lengths, Measured
from flexmoe.system.device import Device
from flexmoe.system.memory import process_bytes
from policies.common.option_names import option
from policies.policy import Policy, PolicyFile

log = logging.getLogger(__name__)
_MOST_PREFILL_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What a run is going to be.

    Args:
        measured: the rows that it is planned for; longer ones fit no memory, and the engine refuses them.
        policy: of the engine.
        options: of the engine, beside it.
        engine: what it will allocate.
        predicted: what it will do, where a planner was asked for.
        forecaster: that said so.
        rows_without_room: rows that are left out.
    """

    measured: Measured
    policy: Policy
    options: dict[str, Any]
    engine: EnginePlan
    predicted: Simulation | None
    forecaster: Forecaster | None = None
    rows_without_room: int = 0


def plan_run(
    options: RunOptions, model: Model, measured: Measured, lengths: Lengths | None = None, *, predict: bool = False
) -> RunPlan:
    """The plan for rows that are to run; where a few of a job are too long for any memory, the plan for the others.

    Args:
        measured: all of them.
        lengths: of each; None means that each has to fit.
        predict: say what the run will do although the options do not ask for it.

    Raises:
        FlexMoEError: nothing fits, or what the options ask for cannot be used.
    """
    arch = packed_as(model.arch, weight_format(options, model))
    usage = _expert_usage(options, model)
    wanted = measured.rows and (predict or options.hardware is not None or options.plans_itself)
    forecaster = _forecaster(options, model, arch, measured, usage) if wanted else None
    own = forecaster.hardware.process_bytes if forecaster else process_bytes()
    planner = _Planner(options=options, model=model, arch=arch, usage=usage, forecaster=forecaster, process_bytes=own)
    if lengths is not None and measured.open_rows and options.kv_tokens is not None:
        # Open rows make do with the capacity that is asked for.
        measured = lengths.measured(model.arch.max_position, max(options.kv_tokens, max(lengths.needed)))
    try:
        return planner.plan(measured)
    except InfeasibleError:
        fitting = None if lengths is None else planner.longest_that_fits(lengths)
        if lengths is None or fitting is None or fitting >= measured.longest_row:
            raise
    without = sum(tokens > fitting for tokens in lengths.needed)
    if without:
        log.warning(
            "rows that no memory has room for: %d (the longest may reach %d tokens); they become error rows, and the job is "
            "planned for rows of up to %d tokens",
            without,
            measured.longest_row,
            fitting,
        )
    others = lengths.measured(model.arch.max_position, fitting)
    return replace(planner.plan(others), rows_without_room=without)


def save_policy(options: RunOptions, model: Model, plan: RunPlan) -> None:
    """Writes the policy of a plan to a file, where the options ask for it.

    Raises:
        StorageError: it cannot be written.
    """
    if options.save_policy is None:
        return
    predicted = plan.predicted
    said = {} if predicted is None else {"tokens_per_s": predicted.tokens_per_s, "job_s": predicted.job_s}
    PolicyFile(
        policy=plan.policy,
        model=packed_as(model.arch, plan.policy.compress_weight).fingerprint(),
        workload=plan.measured.workload.to_json(),
        predicted=said,
    ).save(options.save_policy)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planner:
    """Plans one run for different sets of its rows.

    Args:
        arch: of the model, with its weights packed as the run has them.
        usage: how often each expert was chosen in another run, where that is known.
        forecaster: the cost model's view, where the run asks for it; its workload is replaced by that of the rows.
        process_bytes: what the process takes beside what is planned: one number for the planner and the engine.
    """

    options: RunOptions
    model: Model
    arch: ModelArch
    usage: ExpertUsage | None
    forecaster: Forecaster | None
    process_bytes: int

    def plan(self, measured: Measured) -> RunPlan:
        """The plan for these rows.

        Raises:
            InfeasibleError: it does not fit.
            FlexMoEError: the file of the policy is another model's or cannot be used.
        """
        forecaster = self._forecaster_for(measured)
        policy = self._policy(measured, forecaster)
        options, engine = self._with_room_for_open_rows(measured, policy)
        predicted = None
        if forecaster is not None:
            predicted = forecaster.predict(policy, options["kv_tokens"], engine.allocation.cache_experts)
        return RunPlan(
            measured=measured,
            policy=policy,
            options=options,
            engine=engine,
            predicted=predicted,
            forecaster=forecaster,
        )

    def longest_that_fits(self, lengths: Lengths) -> int | None:
        """The longest row that runs where it is alone, in tokens; None where even the shortest does not.

        Each is tried with the policy that the job has without the longer ones, since those do not count then.
        """

        def fits(tokens: int) -> bool:
            measured = lengths.measured(self.model.arch.max_position, tokens)
            try:
                policy = self._policy(measured, self._forecaster_for(measured))
                # One token, and with it what the longest row needs.
                self._engine_plan(measured, policy, {**self._engine_options(measured, policy), "kv_tokens": 1})
            except InfeasibleError:
                return False
            return True

        values = lengths.sizes()
        # Mostly it is not a row that does not fit, and to know that one plan is enough.
        return last_that_holds(values, fits) if fits(values[0]) else None

    def _with_room_for_open_rows(self, measured: Measured, policy: Policy) -> tuple[dict[str, Any], EnginePlan]:
        """The engine's options and plan; memory that the policy leaves lets open rows grow beyond what is planned for.

        Raises:
            InfeasibleError: what is planned for does not fit.
        """
        options, room = self._engine_options(measured, policy), measured.longest_open
        if self.options.kv_tokens is not None:
            room = min(room, self.options.kv_tokens)
        while room > measured.longest_row:
            with contextlib.suppress(InfeasibleError):
                more = {**options, "longest_row": room}
                return more, self._engine_plan(measured, policy, more)
            room //= 2
        return options, self._engine_plan(measured, policy, options)

    def _forecaster_for(self, measured: Measured) -> Forecaster | None:
        return self.forecaster and replace(self.forecaster, workload=measured.workload)

    def _policy(self, measured: Measured, forecaster: Forecaster | None) -> Policy:
        options = self.options
        if forecaster is not None and options.plans_itself:
            return forecaster.plan(options.kv_tokens, options.fixed)
        if isinstance(options.policy, Policy):
            return options.policy
        if options.policy_file is not None:
            file = PolicyFile.load(options.policy_file)
            if not options.force_policy:
                file.check_model(self.arch.fingerprint())
            return file.policy
        order = None if self.usage is None else self.usage.unit_order(self.arch)
        return _policy_of_options(options, measured, order)

    def _engine_plan(self, measured: Measured, policy: Policy, options: dict[str, Any]) -> EnginePlan:
        return EnginePlan.of(self.model, EngineConfig(policy=policy, workload=measured.workload, **options))

    def _engine_options(self, measured: Measured, policy: Policy) -> dict[str, Any]:
        """The engine's options beside the policy."""
        asked = self.options
        return {
            "device": asked.device,
            "dtype": asked.dtype,
            "gpu_mem": asked.gpu_mem,
            "cpu_mem": asked.cpu_mem,
            "nvme_mem": asked.nvme_mem,
            "memory_limit": asked.memory_limit,
            "process_bytes": self.process_bytes,
            "offload_dir": asked.offload_dir,
            "kv_tokens": _kv_tokens(asked, measured, policy),
            "longest_row": measured.longest_row,
            "gen_len": asked.gen_len,
            "seed": asked.seed,
            "keep_spans": asked.trace is not None,
            "expert_cache": asked.expert_cache,
            "expert_usage": self.usage,
            "router_stats": asked.router_stats is not None,
            "reserve": asked.reserve,
            "prefix_caching": asked.prefix_caching,
            "check_finite": asked.check_finite,
            "debug_dir": asked.debug_records,
        }


def last_that_holds(values: Sequence[int], holds: Callable[[int], bool]) -> int | None:
    """The last of sorted values for which it holds, as it does for all before; None where it does for none."""
    low, high = 0, len(values)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if holds(values[middle]) else (low, middle)
    return values[low - 1] if low else None


def _expert_usage(options: RunOptions, model: Model) -> ExpertUsage | None:
    """How often each expert was chosen in another run, where that is given.

    Raises:
        FlexMoEError: the file cannot be used, or is another model's.
    """
    if options.expert_usage is None:
        return None
    usage = ExpertUsage.load(options.expert_usage)
    usage.check_model(model.arch)
    return usage


def _forecaster(
    options: RunOptions, model: Model, arch: ModelArch, measured: Measured, usage: ExpertUsage | None
) -> Forecaster:
    """The planner of this machine.

    Raises:
        FlexMoEError: the machine cannot be measured, or the file of its rates cannot be used.
    """
    return Forecaster.of_machine(
        arch,
        measured.workload,
        compute_dtype(options.dtype, model, Device(options.device).torch),
        hardware=options.hardware or AUTO,
        device=options.device,
        directory=options.offload_dir,
        budgets={
            "gpu_mem": options.gpu_mem,
            "cpu_mem": options.cpu_mem,
            "nvme_mem": options.nvme_mem,
            "memory_limit": options.memory_limit,
        },
        usage=usage,
        on_demand=options.expert_cache != "off",
        held_bytes=coactivation_bytes(model.arch) if options.router_stats else 0,
    )


def _kv_tokens(options: RunOptions, measured: Measured, policy: Policy) -> int | None:
    """KV capacity in tokens; None: what the policy's block takes."""
    if options.kv_tokens is not None:
        if options.kv_tokens < measured.longest_row:
            log.warning(
                "%s is %d, and the longest row may reach %d tokens: the KV cache gets room for it",
                option("kv_tokens"),
                options.kv_tokens,
                measured.longest_row,
            )
        return options.kv_tokens
    if options.plans_itself or not _is_one_block(measured, policy.block_size):
        return None
    return measured.rows * (measured.workload.prompt_len + measured.workload.gen_len + PAGE_TOKENS)


def _policy_of_options(
    options: RunOptions, measured: Measured, expert_order: tuple[tuple[int, ...], ...] | None
) -> Policy:
    workload = measured.workload
    given: dict[str, Any] = {
        "schedule": options.schedule,
        "overlap": options.overlap,
        "pin_weight": options.pin_weight,
        "compress_cache": options.compress_cache,
        "prefill_tokens": options.prefill_tokens,
        "compress_weight": options.compress_weight,
        "half_blocks": options.half_blocks,
    }
    if options.prefill_tokens is None and _is_one_block(measured, options.block_size):
        given["prefill_tokens"] = min(measured.rows * workload.prompt_len, _MOST_PREFILL_TOKENS)
    return Policy.from_percent(
        options.percent if options.percent is not None else RESIDENT,
        gpu_batch_size=options.gpu_batch_size or GPU_BATCH_SIZE,
        num_gpu_batches=options.num_gpu_batches or NUM_GPU_BATCHES,
        prompt_len=workload.prompt_len,
        gen_len=workload.gen_len,
        cpu_attention_percent=100.0 if options.cpu_cache_compute else 0.0,
        expert_order=expert_order,
        **{name: value for name, value in given.items() if value is not None},
    )


def _is_one_block(measured: Measured, block_size: int) -> bool:
    """A job this short starts and ends together: pacing its admission would only stretch it."""
    return 0 < measured.rows <= block_size
