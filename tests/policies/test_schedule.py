"""The schedule of a sweep: pure, ordered, complete, and free of deadlock on lanes that work in issue order."""

import random
from dataclasses import replace

import pytest

from policies.schedule import LANES, SweepShape, SweepUnits, halves_of_sweep, sweep
from policies.units import EMBEDDING, UnitId

TIERS = ("gpu", "cpu", "disk")


A0, H0 = UnitId("attention", 0), UnitId("head", 1)
E0, E1, E2, E3 = (UnitId("expert", 0, e) for e in range(4))


def small_shape(experts=None):
    return SweepShape(
        units=SweepUnits.of({A0: "cpu", **(experts or {E0: "gpu", E1: "disk"}), H0: "disk"}),
        activation_tiers=("gpu", "cpu"),
        fetched_batches=frozenset({1}),
        stored_batches=frozenset({1}),
        disk_batches=frozenset({1}),
    )


def random_shape(rng):
    layers, batches = rng.randint(1, 4), rng.randint(1, 5)

    def some(of):
        return frozenset(j for j in of if rng.random() < 0.5)

    fetched, on_cpu = some(range(batches)), some(range(batches))
    experts = [UnitId("expert", layer, e) for layer in range(layers) for e in range(rng.randint(1, 4))]
    attention = [UnitId("attention", layer) for layer in range(layers)]
    head = [UnitId("head", layers, chunk) for chunk in range(rng.randint(1, 3))]
    units = SweepUnits.of({unit: rng.choice(TIERS) for unit in (EMBEDDING, *attention, *experts, *head)})
    return SweepShape(
        units=units,
        activation_tiers=tuple(rng.choice(TIERS) for _ in range(batches)),
        fetched_batches=fetched,
        cpu_batches=on_cpu,
        stored_batches=fetched | on_cpu,
        disk_batches=some(fetched),
        on_demand=frozenset(i for i in some(range(layers)) if any(e.tier != "gpu" for e in units.experts[i])),
    )


def shapes(count=60):
    return [random_shape(random.Random(seed)) for seed in range(count)]


def in_halves(count=60):
    """Those that march as two half-blocks."""
    return [shape for shape in (replace(shape, half_blocks=2) for shape in shapes(count)) if shape.first_half]


def half_of(shape, batch):
    return int(batch >= shape.first_half)


def ahead(shape):
    """What the weight stream moves, in its order."""
    return [step.unit for step in shape.units.streamed(shape.on_demand)]


def find(ops, **fields):
    return [op for op in ops if all(getattr(op, name) == value for name, value in fields.items())]


def reaches(ops, op):
    """Ids of all operations that ``op`` comes after, by dependencies alone."""
    seen, open_ids = set(), list(op.deps)
    while open_ids:
        here = open_ids.pop()
        if here not in seen:
            seen.add(here)
            open_ids += ops[here].deps
    return seen


def test_small_sweep_is_this_sequence():
    ops = [(op.kind, op.lane, op.layer, op.batch, op.unit, op.deps) for op in sweep(small_shape())]
    assert ops == [
        ("copy", "h2d", 0, -1, A0, ()),
        ("embed", "gpu", 0, 0, None, ()),
        ("project", "gpu", 0, 0, None, (0, 1)),
        ("load_kv", "h2d", 0, 1, None, ()),
        ("embed", "gpu", 0, 1, None, ()),
        ("project", "gpu", 0, 1, None, (0, 4)),
        ("store_kv", "d2h", 0, 1, None, (3, 5)),
        ("write_kv", "disk_write", 0, 1, None, (6,)),
        ("attend", "gpu", 0, 0, None, (0, 2)),
        ("attend", "gpu", 0, 1, None, (0, 3, 5)),
        ("store_act", "d2h", 0, 1, None, (9,)),
        ("route", "gpu", 0, -1, None, (8, 9)),
        ("expert", "gpu", 0, -1, E0, (11,)),
        ("read", "disk_read", 0, -1, E1, ()),
        ("copy", "h2d", 0, -1, E1, (13,)),
        ("expert", "gpu", 0, -1, E1, (11, 14)),
        ("load_act", "h2d", 1, 1, None, (10, 15)),
        ("collect", "gpu", 1, -1, None, (15, 16)),
        ("read", "disk_read", 1, -1, H0, ()),
        ("copy", "h2d", 1, -1, H0, (18,)),
        ("head", "gpu", 1, -1, H0, (17, 19)),
        ("sample", "gpu", 1, -1, None, (17, 20)),
    ]


def test_in_a_layer_on_demand_streamed_experts_come_after_the_routing():
    shape = replace(small_shape({E0: "gpu", E1: "disk", E2: "cpu"}), on_demand=frozenset({0}))
    ops = list(sweep(shape))
    (route,) = find(ops, kind="route")
    assert [(op.kind, op.lane, op.unit, op.deps) for op in ops[route.id + 1 : route.id + 5]] == [
        ("read_routed", "disk_read", None, (route.id,)),
        ("copy_routed", "h2d", None, (route.id + 1,)),
        ("expert", "gpu", E0, (route.id,)),
        ("routed", "gpu", None, (route.id, route.id + 2)),
    ]
    assert ahead(shape) == [A0, H0]
    assert ahead(replace(shape, on_demand=frozenset())) == [A0, E1, E2, H0]


def test_two_halves_march_half_a_layer_apart():
    """Experts of one half lie between the batches of the other; the second half begins with those that free slots."""
    a0, a1 = UnitId("attention", 0), UnitId("attention", 1)
    e1 = UnitId("expert", 1, 0)
    shape = SweepShape(
        units=SweepUnits.of({a0: "gpu", a1: "cpu", E0: "gpu", E1: "cpu", e1: "cpu", UnitId("head", 2): "gpu"}),
        activation_tiers=("gpu",) * 4,
        half_blocks=2,
    )
    ops = [(op.kind, op.layer, op.unit or op.batch) for op in sweep(shape) if op.kind != "embed"]
    assert ops == [
        *(
            ("project", 0, 0),
            ("project", 0, 1),
            ("attend", 0, 0),
            ("project", 0, 2),
            ("attend", 0, 1),
            ("route", 0, -1),
        ),
        *(("project", 0, 3), ("expert", 0, E0), ("copy", 0, E1), ("expert", 0, E1), ("attend", 0, 2)),
        *(("copy", 1, a1), ("project", 1, 0), ("attend", 0, 3), ("route", 0, -1)),
        *(("project", 1, 1), ("expert", 0, E1), ("expert", 0, E0), ("attend", 1, 0)),
        *(("project", 1, 2), ("attend", 1, 1), ("route", 1, -1)),
        *(("project", 1, 3), ("copy", 1, e1), ("expert", 1, e1), ("attend", 1, 2), ("attend", 1, 3), ("route", 1, -1)),
        *(("collect", 2, -1), ("head", 2, UnitId("head", 2)), ("sample", 2, -1)),
        *(("expert", 1, e1), ("collect", 2, -1), ("head", 2, UnitId("head", 2)), ("sample", 2, -1)),
    ]
    assert [op.releases for op in sweep(shape) if op.releases] == [a0, E1, E0, a1, e1, UnitId("head", 2)]


def test_the_first_half_gets_its_logits_before_the_last_experts_of_the_second():
    e0, e1, h0, h1 = UnitId("expert", 0, 0), UnitId("expert", 0, 1), UnitId("head", 1, 0), UnitId("head", 1, 1)
    shape = SweepShape(
        units=SweepUnits.of({A0: "gpu", e0: "gpu", e1: "cpu", h0: "gpu", h1: "gpu"}),
        activation_tiers=("gpu", "cpu", "gpu"),
        half_blocks=2,
    )
    ops = list(sweep(shape))
    last = [op for op in ops if op.id >= find(ops, kind="route", half=1)[0].id]
    assert [(op.kind, op.half, op.unit or op.batch, op.releases) for op in last] == [
        *(("route", 1, -1, None), ("load_act", 0, 1, None), ("collect", 0, -1, None)),
        *(("head", 0, h0, None), ("head", 0, h1, None), ("sample", 0, -1, None)),
        *(("expert", 1, e1, e1), ("expert", 1, e0, e0), ("collect", 1, -1, None)),
        *(("head", 1, h0, h0), ("head", 1, h1, h1), ("sample", 1, -1, None)),
    ]


def test_all_rows_get_their_tokens_at_the_end_where_the_head_is_streamed():
    h0, h1 = UnitId("head", 1, 0), UnitId("head", 1, 1)
    units = SweepUnits.of({A0: "gpu", E0: "gpu", E1: "cpu", h0: "disk", h1: "gpu"})
    whole = list(sweep(SweepShape(units=units, activation_tiers=("gpu",) * 3, half_blocks=2)))
    assert [op.kind for op in whole if op.lane == "gpu"][-6:] == [
        "expert",
        "expert",
        "collect",
        "head",
        "head",
        "sample",
    ]
    assert [(op.half, op.releases) for op in find(whole, kind="head")] == [(0, h0), (0, h1)]


def test_a_half_that_gets_its_tokens_alone_waits_for_no_expert_of_the_other_one():
    seen = 0
    for shape in in_halves(120):
        ops = list(sweep(shape))
        assert [op.half for op in find(ops, kind="sample")] == ([0, 1] if shape.first_part else [0])
        if shape.first_part:
            seen += 1
            sample = find(ops, kind="sample", half=0)[0]
            own, others = (find(ops, kind="expert", layer=len(shape.units.attention) - 1, half=half) for half in (0, 1))
            assert own[-1].id in reaches(ops, sample) and own[-1].id < sample.id < others[0].id
            assert not {op.id for op in others} & reaches(ops, sample)
    assert seen > 5


def test_a_half_is_projected_again_while_the_last_batch_of_the_other_one_is_attended():
    """Its experts are spread over the batches before that one, so that the CPU always has the next batch."""
    shape = SweepShape(
        units=SweepUnits.of({UnitId("attention", at): "gpu" for at in range(2)} | {E0: "gpu", E1: "gpu"}),
        activation_tiers=("gpu",) * 6,
        cpu_batches=frozenset(range(6)),
        half_blocks=2,
    )
    gpu = [(op.kind, op.layer, max(op.batch, -1)) for op in sweep(shape) if op.lane == "gpu" and op.kind != "embed"]
    second = gpu[gpu.index(("project", 0, 4)) : gpu.index(("project", 1, 1))]
    assert second == [
        *(("project", 0, 4), ("expert", 0, -1), ("attend", 0, 3)),
        *(("project", 0, 5), ("expert", 0, -1), ("attend", 0, 4)),
        *(("project", 1, 0), ("attend", 0, 5), ("route", 0, -1)),
    ]


def test_a_block_marches_as_one_where_two_halves_have_nothing_to_hide():
    shape = replace(small_shape(), half_blocks=2)
    assert shape.first_half == 1
    assert replace(shape, half_blocks=1).first_half == 0
    assert replace(shape, activation_tiers=("gpu",)).first_half == 0
    assert replace(shape, on_demand=frozenset({0})).first_half == 0
    resident = SweepShape(
        units=SweepUnits.of({A0: "gpu", E0: "gpu", H0: "gpu"}), activation_tiers=("gpu",) * 5, half_blocks=2
    )
    assert resident.first_half == 0
    assert list(sweep(resident)) == list(sweep(replace(resident, half_blocks=1)))
    assert replace(resident, cpu_batches=frozenset({1})).first_half == 3


def test_each_half_is_projected_in_the_next_layer_after_all_its_experts():
    for shape in in_halves():
        ops = list(sweep(shape))
        for project in find(ops, kind="project"):
            own = find(ops, kind="expert", layer=project.layer - 1, half=half_of(shape, project.batch))
            assert {op.id for op in own} <= set(range(project.id))
            assert project.layer == 0 or own[-1].id in reaches(ops, project)


@pytest.mark.parametrize("begun_by", ["load_kv", "project"])
def test_no_more_than_two_batches_of_two_halves_are_under_way(begun_by):
    """Two sets of buffers serve fetched KV, and two CPU attention."""
    for shape in in_halves():
        under_way, most = set(), 0
        for op in sweep(shape):
            under_way |= {(op.layer, op.batch)} if op.kind == begun_by else set()
            under_way -= {(op.layer, op.batch)} if op.kind == "attend" else set()
            most = max(most, len(under_way))
        assert most == (2 if begun_by == "project" else min(2, len(shape.units.attention) * len(shape.fetched_batches)))


def test_two_halves_request_fetched_kv_as_soon_as_there_is_a_buffer():
    """The first two at once, then one when a batch that fetches has been attended: in the order in which they are attended."""
    seen = 0
    for shape in in_halves():
        ops = list(sweep(shape))
        loads = find(ops, kind="load_kv")
        attended = [op for op in find(ops, kind="attend") if op.batch in shape.fetched_batches]
        assert [(op.layer, op.batch) for op in loads] == [(op.layer, op.batch) for op in attended]
        assert [op.id for op in loads[:2]] == list(range(len(loads[:2])))
        for load, before in zip(loads[2:], attended):
            seen += 1
            assert not [op for op in ops[before.id + 1 : load.id] if op.lane == "gpu"]
    assert seen >= 20


def test_two_halves_use_each_unit_once_each_and_give_it_back_after_that():
    for shape in in_halves():
        ops = list(sweep(shape))
        for experts in shape.units.experts:
            for step in experts:
                uses = find(ops, kind="expert", unit=step.unit)
                assert [(op.half, op.releases) for op in uses] == [(0, None), (1, step.unit)]
        released = [op.releases for op in ops if op.releases]
        assert len(released) == len(set(released))


def test_same_shape_gives_the_same_operations():
    for overlap in (True, False):
        shape = small_shape()
        assert list(sweep(shape, overlap=overlap)) == list(sweep(shape, overlap=overlap))
    assert shape == small_shape()


@pytest.mark.parametrize("overlap", [True, False])
def test_ids_count_up_and_dependencies_are_smaller(overlap):
    for shape in (*shapes(), *in_halves()):
        ops = list(sweep(shape, overlap=overlap))
        assert [op.id for op in ops] == list(range(len(ops)))
        for op in ops:
            assert all(0 <= d < op.id for d in op.deps)
            assert list(op.deps) == sorted(set(op.deps))
            assert op.lane in LANES


def test_serial_sweep_is_a_chain_of_the_same_operations():
    for shape in (*shapes(), *in_halves()):
        overlapped, serial = list(sweep(shape)), list(sweep(shape, overlap=False))
        assert [(o.kind, o.layer, o.batch, o.unit) for o in serial] == [
            (o.kind, o.layer, o.batch, o.unit) for o in overlapped
        ]
        for with_chain, without in zip(serial, overlapped):
            chain = {with_chain.id - 1} if with_chain.id else set()
            assert set(with_chain.deps) == set(without.deps) | chain


def test_resident_experts_come_first_and_keep_their_order():
    units = SweepUnits.of({A0: "gpu", E0: "disk", E1: "gpu", E2: "cpu", E3: "gpu"})
    assert [step.unit for step in units.experts[0]] == [E1, E3, E0, E2]


def test_route_waits_for_the_attention_of_every_batch():
    for shape in (*shapes(), *in_halves()):
        ops = list(sweep(shape))
        for route in find(ops, kind="route"):
            every = find(ops, kind="attend", layer=route.layer)
            assert sorted(op.batch for op in every) == list(range(len(shape.activation_tiers)))
            attends = [op for op in every if not shape.first_half or half_of(shape, op.batch) == route.half]
            assert {op.id for op in attends} <= reaches(ops, route)


def test_every_streamed_unit_is_read_and_copied_before_its_use():
    for shape in (*shapes(), *in_halves()):
        ops = list(sweep(shape))
        users = {"attention": "attend", "expert": "expert", "head": "head"}
        streamed = set(ahead(shape))
        steps = [*shape.units.attention, *(s for e in shape.units.experts for s in e), *shape.units.head]
        for step in (s for s in steps if s.tier == "gpu" or s.unit in streamed):
            unit, kind = step.unit, users[step.unit.kind]
            uses = find(ops, kind=kind, **({"layer": unit.layer} if kind == "attend" else {"unit": unit}))
            copies, reads = find(ops, kind="copy", unit=unit), find(ops, kind="read", unit=unit)
            assert len(uses) >= (2 if kind == "head" and shape.first_part else 1)
            assert len(copies) == (step.tier != "gpu")
            assert len(reads) == (step.tier == "disk")
            for use in uses:
                assert {op.id for op in (*copies, *reads)} <= reaches(ops, use)
            for read in reads:
                assert read.id in copies[0].deps


def test_experts_on_demand_are_asked_for_once_their_layer_is_routed_and_never_ahead():
    seen = 0
    for shape in shapes():
        ops = list(sweep(shape))
        for layer, experts in enumerate(shape.units.experts):
            streamed = [step for step in experts if step.tier != "gpu"]
            routed = find(ops, kind="routed", layer=layer)
            assert len(routed) == (layer in shape.on_demand)
            if not routed:
                continue
            seen += 1
            (route,), (copied,) = find(ops, kind="route", layer=layer), find(ops, kind="copy_routed", layer=layer)
            assert {route.id, copied.id} <= set(routed[0].deps) and route.id in reaches(ops, copied)
            assert len(find(ops, kind="read_routed", layer=layer)) == any(s.tier == "disk" for s in streamed)
            assert not any(find(ops, unit=step.unit) for step in streamed)
            assert len(find(ops, kind="expert", layer=layer)) == len(experts) - len(streamed)
    assert seen > 10


def test_attention_weights_arrive_before_the_first_projection():
    for shape in (*shapes(), *in_halves()):
        ops = list(sweep(shape))
        for layer, step in enumerate(shape.units.attention):
            for copy in find(ops, kind="copy", unit=step.unit):
                assert all(copy.id in op.deps for op in find(ops, kind="project", layer=layer))


def test_kv_of_the_next_layers_first_batch_is_requested_before_the_experts():
    for shape in shapes():
        ops = list(sweep(shape))
        for layer in range(1, len(shape.units.attention)):
            loads = find(ops, kind="load_kv", layer=layer, batch=0)
            assert len(loads) == (0 in shape.fetched_batches)
            for load in loads:
                assert load.id < find(ops, kind="route", layer=layer - 1)[0].id
                assert load.id > max(op.id for op in find(ops, kind="attend", layer=layer - 1))


def test_kv_of_the_next_batch_is_requested_before_this_one_is_attended():
    for shape in (*shapes(), *in_halves()):
        ops = list(sweep(shape))
        for load in find(ops, kind="load_kv"):
            if load.batch > 0:
                assert load.id < find(ops, kind="attend", layer=load.layer, batch=load.batch - 1)[0].id


def test_new_kv_of_rows_on_disk_alone_is_stored_after_the_old_was_loaded():
    """There it moves the last pages on. The CPU, whose queries come down with it, waits for no other load."""
    for shape in (*shapes(), *in_halves()):
        ops = list(sweep(shape))
        for store in find(ops, kind="store_kv"):
            where = {"layer": store.layer, "batch": store.batch}
            project, loads = find(ops, kind="project", **where)[0], find(ops, kind="load_kv", **where)
            before = loads if store.batch in shape.disk_batches else []
            assert set(store.deps) == {project.id, *(op.id for op in before)}
        for write in find(ops, kind="write_kv"):
            assert find(ops, kind="store_kv", layer=write.layer, batch=write.batch)[0].id in write.deps
        for attend in find(ops, kind="cpu_attend"):
            assert find(ops, kind="store_kv", layer=attend.layer, batch=attend.batch)[0].id in attend.deps


def test_hidden_states_are_stored_before_they_are_loaded_again():
    for shape in (*shapes(), *in_halves()):
        ops = list(sweep(shape))
        for load in find(ops, kind="load_act"):
            stored = find(ops, kind="store_act", layer=load.layer - 1, batch=load.batch)
            assert len(stored) == 1
            assert stored[0].id in load.deps
            assert shape.activation_tiers[load.batch] != "gpu"


def test_fetch_order_is_the_order_of_the_copies():
    for shape in (*shapes(), *in_halves()):
        assert ahead(shape) == [op.unit for op in find(sweep(shape), kind="copy")]


def run_on_lanes(ops, slots, rng):
    """Run every lane in issue order, the lanes in random turns; a copy takes a slot until its unit's last use."""
    lanes = {lane: [op for op in ops if op.lane == lane] for lane in LANES}
    copied = {op.unit for op in ops if op.kind == "copy"}
    done, free = set(), slots
    while any(lanes.values()):
        ready = [
            queue
            for queue in lanes.values()
            if queue and done.issuperset(queue[0].deps) and (queue[0].kind != "copy" or free > 0)
        ]
        if not ready:
            return done
        op = rng.choice(ready).pop(0)
        done.add(op.id)
        free += (op.releases in copied) - (op.kind == "copy")
    return done


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_lanes_in_issue_order_never_wait_for_each_other_for_ever(slots):
    for seed, shape in enumerate(shapes(25)):
        for overlap in (True, False):
            ops = list(sweep(shape, overlap=overlap))
            assert len(run_on_lanes(ops, slots, random.Random(seed))) == len(ops)


def test_two_halves_need_slots_for_a_layer_and_the_attention_of_the_next_and_no_more():
    for seed, shape in enumerate(in_halves(50)):
        away = [[step.tier != "gpu" for step in experts] for experts in shape.units.experts]
        attention = [step.tier != "gpu" for step in (*shape.units.attention, *shape.units.attention[-1:])]
        last = len(away) - 1
        held = max(sum(own) + attention[at] + (attention[at + 1] and at < last) for at, own in enumerate(away))
        ops = list(sweep(shape))
        assert len(run_on_lanes(ops, max(1, held), random.Random(seed))) == len(ops)
        assert held < 2 or len(run_on_lanes(ops, held - 1, random.Random(seed))) < len(ops)


@pytest.mark.parametrize(
    "half_blocks, device, tokens, found",
    [(2, "cpu", 255, 1), (2, "cpu", 256, 2), (1, "cpu", 256, 1), (2, "cuda", 1, 2), (1, "cuda", 256, 1)],
)
def test_on_the_cpu_few_tokens_of_an_expert_march_as_one(half_blocks, device, tokens, found):
    assert halves_of_sweep(half_blocks, device, tokens) == found
