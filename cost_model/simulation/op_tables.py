"""Seconds and bytes of every operation of one sweep, at fixed places: a program is made once, its durations often."""

from __future__ import annotations

from collections.abc import Sequence

from cost_model.model.weight_units import expert_units, head_chunks, head_rows
from cost_model.routing.demand import Demand
from cost_model.timing.op_costs import Costs
from cost_model.timing.sweep_load import BatchLoad, SweepLoad

_OF_SWEEP = (
    *("host", "booked", "route", "collect", "sample", "expert", "dense", "disk_wait"),
    *("second_expert", "second_dense", "second_sample"),
    *("read_routed", "copy_routed", "copy_last", "routed", "routed_last"),
)
_OF_BATCH = (
    *("embed", "project", "attend", "cpu_attend", "attended"),
    *("load_kv", "read_kv", "store_kv", "write_kv", "load_act", "read_act", "store_act", "write_act"),
)
#: Parts of the rows that get their tokens one after the other.
_MOST_PARTS = 2
_SWEEP_PLACE = {name: place for place, name in enumerate(_OF_SWEEP)}
_BATCH_PLACE = {name: place for place, name in enumerate(_OF_BATCH)}


def sweep_place(name: str) -> int:
    """Place of an operation that a sweep or a layer has once."""
    return _SWEEP_PLACE[name]


def head_place(chunks: int, part: int, chunk: int) -> int:
    """Place of a chunk of the head over a part of the rows, of a model whose head has so many chunks."""
    return len(_OF_SWEEP) + part * chunks + chunk


def batch_place(chunks: int, batch: int, name: str) -> int:
    """Place of an operation of a GPU batch of a model whose head has so many chunks."""
    return head_place(chunks, _MOST_PARTS, 0) + batch * len(_OF_BATCH) + _BATCH_PLACE[name]


def table_of_seconds(
    costs: Costs, halves: Sequence[Sequence[BatchLoad]], load: SweepLoad, demand: Demand | None = None
) -> list[float]:
    """Seconds of each operation when it is alone, its dispatch not counted.

    Args:
        halves: the GPU batches of ``load``, of each half-block.
        demand: of the sweep, where it is on demand.
    """
    arch, tokens = costs.arch, [sum(batch.tokens for batch in cut) for cut in halves]
    dense = list(map(costs.mlp_s, tokens))
    between_s = costs.host_s(load.rows) + sum(costs.copied_s(load).values())
    shares = costs.part_shares(halves)
    booked_s = costs.booked_s(load.rows * shares[0]) if len(shares) > 1 else 0.0
    logits = [share * load.logits for share in shares]
    sample_s = list(map(costs.sample_s, logits))
    table = [between_s - booked_s, booked_s, 0.0, 0.0, sample_s[0]]
    if demand:
        own = costs.demanded(demand, load.tokens)
        table += [own.unit_s, dense[0], costs.hardware.disk_latency_s, 0.0, 0.0, 0.0]
        table += [own.read_s, own.copy_s, own.copy_last_s, own.ahead_s, own.last_s]
    else:
        # Those of a layer that no token reaches take no time; on average each unit takes its share of the others'.
        unit = [costs.reached_expert_s(each) * costs.touched(each) / expert_units(arch) for each in tokens]
        table += [unit[0], dense[0], costs.hardware.disk_latency_s]
        table += [unit[-1], dense[-1], sample_s[-1], *[0.0] * 5]
    pieces = [stop - start for start, stop in (head_rows(arch, chunk) for chunk in range(head_chunks(arch)))]
    for share, rows in zip(shares, logits):
        table += [costs.head_s(rows, piece * arch.head_row_params, share * load.prompt_tokens) for piece in pieces]
    table += [0.0] * len(pieces) * (_MOST_PARTS - len(shares))
    for batch in (batch for cut in halves for batch in cut):
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


def table_of_bytes(costs: Costs, cut: Sequence[BatchLoad], demand: Demand | None = None) -> list[float]:
    """Bytes that each operation moves or attends over, as a trace shows them; 0 where it shows none."""
    table = [0.0] * head_place(head_chunks(costs.arch), _MOST_PARTS, 0)
    if demand:
        read, copied = costs.demanded_bytes(demand)
        table[sweep_place("read_routed")], table[sweep_place("copy_routed")] = read, copied
    for batch in cut:
        new, past, width, disk_width = batch.new, batch.past, costs.kv_bytes, costs.kv_disk_bytes
        act = costs.activation_bytes(batch)
        moved = {
            "cpu_attend": (past["cpu"] + new["cpu"]) * width,
            "load_kv": (past["fetch"] + past["disk"]) * width,
            "read_kv": past["disk"] * disk_width,
            "store_kv": (new["fetch"] + new["disk"] + new["cpu"]) * width,
            "write_kv": new["disk"] * disk_width,
            "load_act": act,
            "read_act": act,
            "store_act": act,
            "write_act": act,
        }
        table += [moved.get(name, 0.0) for name in _OF_BATCH]
    return table
