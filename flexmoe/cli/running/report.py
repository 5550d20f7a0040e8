"""The lines that a run prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cost_model.simulation.simulate import Simulation
from flexmoe.batch.metrics import peak_gpu_bytes
from flexmoe.batch.options import RunOptions
from flexmoe.batch.plan import RunPlan
from flexmoe.cli.running.summary import elapsed
from flexmoe.engine.engine import Engine
from flexmoe.engine.engine_plan import EnginePlan
from flexmoe.inputs.request_file import Rows
from flexmoe.preflight.lengths import Measured
from flexmoe.preflight.preflight import Preflight
from policies.common.memory_units import GIB
from policies.policy import Policy

#: Refused rows that a dry run lists.
_ROWS_LISTED = 5


def plan_lines(plan: RunPlan) -> list[str]:
    """The policy and what the cost model says of it, where it was asked."""
    return [describe_policy(plan.policy), forecast_line(plan.predicted, plan.measured)] if plan.predicted else []


def cache_and_weight_lines(plan: EnginePlan) -> list[str]:
    """Asked and achieved shares of the weights and of the KV cache."""
    return [plan.describe_weights(), plan.describe_cache()]


def dry_run_lines(plan: RunPlan) -> list[str]:
    """What would be allocated, and for which rows."""
    measured, workload = plan.measured, plan.measured.workload
    return [
        *cache_and_weight_lines(plan.engine),
        *plan.engine.memory_lines(),
        f"lengths of {measured.rows} completions: mean prompt {workload.prompt_len} tokens, mean completion "
        f"{'about' if measured.open_rows else 'at most'} {workload.gen_len}, longest row {measured.longest_row}",
        *measured.open_lines(),
    ]


def row_lines(found: Preflight, rows: Rows) -> list[str]:
    """What a dry run found of the rows, and the first of those that cannot run."""
    lengths, refused = found.lengths, found.rows_refused
    lines = [
        f"rows: {len(lengths)}, of which {refused} cannot run; {sum(lengths.prompt_tokens)} prompt tokens, at most "
        f"{sum(lengths.new_tokens)} new tokens"
    ]
    if found.prefixes is not None and len(found.prefixes):
        lines.append(
            f"prefixes: {found.prefixes.shared_tokens} of the prompt tokens are computed for an earlier prompt already"
        )
    for number, (row, error) in enumerate(found.refused()):
        if number == _ROWS_LISTED:
            lines.append(f"  … and {refused - _ROWS_LISTED} more")
            break
        lines.append(f"  line {rows.raw(row).number}: {error.message}")
    return lines


def detail_lines(metrics: Mapping[str, Any], engine: Engine, predicted: Simulation | None) -> list[str]:
    """What ``-v`` adds: sweeps, the expert cache, lanes, every item of memory, and the prediction beside the lanes."""
    return [
        f"sweeps: {metrics['sweeps']}, rows in flight: mean {metrics['mean_rows_in_flight']:.1f}, most "
        f"{metrics['most_rows_in_flight']}",
        *cache_lines(metrics),
        *lane_lines(metrics),
        *engine.plan.memory_lines(),
        *(comparison_lines(predicted, metrics) if predicted else ()),
    ]


def engine_file_lines(options: RunOptions, engine: Engine) -> list[str]:
    """Where router statistics, debug records and trace are, where they were asked for."""
    lines = []
    if options.router_stats is not None:
        no_tokens = engine.router_counter.is_empty  # no row could run
        nothing = "no token was routed, so there are no router statistics"
        lines.append(nothing if no_tokens else f"router statistics: {options.router_stats}")
    if options.debug_records is not None:
        lines.append(f"debug records: {options.debug_records}")
    return lines + ([f"trace: {options.trace}"] if options.trace is not None else [])


def nothing_ran_lines(options: RunOptions) -> list[str]:
    """Which files were asked for that a start that found nothing to run does not write."""
    missing = {
        "there is no trace": options.trace,
        "there are no router statistics": options.router_stats,
        "there are no debug records": options.debug_records,
    }
    return [f"nothing was left to run, so {what}" for what, path in missing.items() if path is not None]


def describe_policy(policy: Policy) -> str:
    """The policy in one line, in the flags that would give it."""
    p = policy
    shares = (
        p.w_gpu_percent,
        p.w_cpu_percent,
        p.cache_gpu_percent,
        p.cache_cpu_percent,
        p.act_gpu_percent,
        p.act_cpu_percent,
    )
    percents = " ".join(f"{share:.2f}".rstrip("0").rstrip(".") for share in shares)
    return (
        f"policy: --gpu-batch-size {p.gpu_batch_size} --num-gpu-batches {p.num_gpu_batches} --percent {percents} "
        f"--schedule {p.schedule} --prefill-tokens {p.prefill_tokens}, CPU attention {p.cpu_attention_percent:g} %"
        + (", two half-blocks" if p.half_blocks > 1 else "")
        + (f", weights in {p.compress_weight}" if p.compress_weight else "")
        + (", most used experts first" if p.expert_order else "")
    )


def forecast_line(predicted: Simulation, measured: Measured) -> str:
    """One line before the run; for rows that are only scored, their prompt tokens."""
    rate = f"{predicted.tokens_per_s:.2f} generated"
    if measured.scores_only:
        rate = f"{measured.rows * measured.workload.prompt_len / max(predicted.job_s, 1e-9):.2f} prompt"
    return f"predicted: {rate} tokens/s, {elapsed(predicted.job_s)}"


def cache_lines(metrics: Mapping[str, Any]) -> list[str]:
    """What the expert cache did, where experts came on demand."""
    cache = metrics["expert_cache"]
    if not cache["on_demand_sweeps"]:
        return []
    return [
        f"experts on demand in {cache['on_demand_sweeps']} of {metrics['sweeps']} sweeps: {cache['lookups']} requested, "
        f"{100 * cache['hit_rate']:.1f} % cached ({cache['policy']}, room for {cache['experts']}), {cache['loads']} loads of "
        f"{1e3 * cache['mean_load_s']:.1f} ms, {cache['evictions']} evictions"
    ]


def lane_lines(metrics: Mapping[str, Any]) -> list[str]:
    """How long each lane was busy, which it is while any of its workers is at work, and its bytes over that time."""
    wall = max(metrics["wall_s"], 1e-9)
    lines = []
    for lane, t in sorted(metrics["lanes"].items()):
        moved = (
            f"; {t['bytes'] / 1e9:.3f} GB at {t['bytes'] / 1e9 / max(t['busy_s'], 1e-9):.2f} GB/s" if t["bytes"] else ""
        )
        share = 100 * min(1.0, t["busy_s"] / wall)
        lines.append(f"lane {lane:>10}: busy {t['busy_s']:.2f} of {wall:.2f} s, {share:.0f} %{moved}")
    return lines


def flexllmgen_lines(
    metrics: Mapping[str, Any], engine: Engine, rows: int, gen_len: int, cut_gen_len: int | None
) -> list[str]:
    """FlexLLMGen's summary of a benchmark.

    Sweeps in which prompt tokens entered count as prefill (with the rolling schedule other rows decode in them), the
    others as decode. With ``cut_gen_len`` the decode latency is projected to ``gen_len`` tokens from those that ran.
    """
    prefill_s, decode_s = metrics["prefill_s"], metrics["decode_s"]
    decode_rate = metrics["decode_only_tokens"] / decode_s if decode_s else 0.0
    note = ""
    if cut_gen_len:
        decode_s *= (gen_len - 1) / max(1, cut_gen_len - 1)
        note = " (projected)"
    total_s = max(prefill_s + decode_s, 1e-9)
    memory = metrics["memory"].values()
    cache = sum(tier.get("kv", 0) for tier in memory)
    hidden = sum(tier.get("activations", 0) for tier in memory)
    return [
        f"model size: {engine.model.arch.total_bytes / GIB:.3f} GB\tcache size: {cache / GIB:.3f} GB\t"
        f"hidden size (prefill): {hidden / GIB:.3f} GB",
        f"peak gpu mem: {peak_gpu_bytes(engine) / GIB:.3f} GB",
        f"prefill latency: {prefill_s:.3f} s\tprefill throughput: {metrics['prompt_tokens'] / max(prefill_s, 1e-9):.3f} token/s",
        f"decode latency: {decode_s:.3f} s{note}\tdecode throughput: {decode_rate:.3f} token/s{note}",
        f"total latency: {total_s:.3f} s{note}\ttotal throughput: {rows * gen_len / total_s:.3f} token/s{note}",
    ]


def comparison_lines(predicted: Simulation, metrics: Mapping[str, Any]) -> list[str]:
    """Predicted against measured busy seconds, per lane."""
    lanes = [
        f"{lane} {predicted.lanes_s.get(lane, 0.0):.2f}/{metrics['lanes'].get(lane, {}).get('busy_s', 0.0):.2f}"
        for lane in sorted({*predicted.lanes_s, *metrics["lanes"]})
    ]
    return [f"predicted/measured busy seconds: {', '.join(lanes)}"]
