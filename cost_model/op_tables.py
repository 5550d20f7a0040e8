"""Seconds and bytes of every operation of one sweep, at fixed places: a program is made once, its durations often."""

from __future__ import annotations

from collections.abc import Sequence

from cost_model.arch import ModelArch
from cost_model.costs import Costs
from cost_model.load import BatchLoad, SweepLoad

_OF_SWEEP = ("host", "route", "collect", "sample", "expert", "dense", "disk_wait")
_OF_BATCH = (
    "embed", "project", "attend", "cpu_attend", "attended", "load_kv", "read_kv", "store_kv", "write_kv", "load_act",
    "read_act", "store_act", "write_act",
)  # fmt: skip
_SWEEP_PLACE = {name: place for place, name in enumerate(_OF_SWEEP)}
_BATCH_PLACE = {name: place for place, name in enumerate(_OF_BATCH)}


def sweep_place(name: str) -> int:
    """Place of an operation that a sweep or a layer has once."""
    return _SWEEP_PLACE[name]


def head_place(chunk: int) -> int:
    """Place of a chunk of the head."""
    return len(_OF_SWEEP) + chunk


def batch_place(arch: ModelArch, batch: int, name: str) -> int:
    """Place of an operation of a GPU batch."""
    return len(_OF_SWEEP) + arch.num_head_chunks + batch * len(_OF_BATCH) + _BATCH_PLACE[name]


def table_of_seconds(costs: Costs, cut: Sequence[BatchLoad], load: SweepLoad) -> list[float]:
    """Seconds of each operation when it is alone, its dispatch not counted.

    Args:
        cut: the GPU batches of ``load``.
    """
    arch, tokens = costs.arch, load.tokens
    touched = costs.touched(tokens)
    each = costs.expert_s(tokens * arch.top_k / touched, arch.expert_params) if touched else 0.0
    dense = costs.expert_s(tokens, arch.dense_params) if arch.dense_layers else 0.0
    # Those of a layer that no token reaches take no time; on average each expert takes its share of the others'.
    table = [costs.host_s(load.rows), 0.0, 0.0, costs.sample_s(load.logits), each * touched / arch.num_experts, dense]
    table.append(costs.hardware.disk_latency_s)
    for start, stop in map(arch.head_rows, range(arch.num_head_chunks)):
        table.append(costs.head_s(load.logits, (stop - start) * arch.head_row_params))
    for batch in cut:
        attended = costs.attended_s(batch)
        table += (
            costs.embed_s(batch),
            costs.project_s(batch),
            costs.attend_s(batch),
            costs.cpu_attend_s(batch),
            attended,
            costs.load_kv_s(batch) - attended,
            costs.read_kv_s(batch),
            costs.store_kv_s(batch),
            costs.write_kv_s(batch),
            costs.load_act_s(batch),
            costs.read_s(costs.activation_bytes(batch)),
            costs.store_act_s(batch),
            costs.write_s(costs.activation_bytes(batch)),
        )
    return table


def table_of_bytes(costs: Costs, cut: Sequence[BatchLoad]) -> list[float]:
    """Bytes that each operation moves or attends over, as a trace shows them; 0 where it shows none."""
    table = [0.0] * (len(_OF_SWEEP) + costs.arch.num_head_chunks)
    for batch in cut:
        new, past, width = batch.new, batch.past, costs.kv_bytes
        act = costs.activation_bytes(batch)
        moved = {
            "cpu_attend": (past["cpu"] + new["cpu"]) * width,
            "load_kv": (past["fetch"] + past["disk"]) * width,
            "read_kv": past["disk"] * width,
            "store_kv": (new["fetch"] + new["disk"] + new["cpu"]) * width,
            "write_kv": new["disk"] * width,
            "load_act": act,
            "read_act": act,
            "store_act": act,
            "write_act": act,
        }
        table += [moved.get(name, 0.0) for name in _OF_BATCH]
    return table
