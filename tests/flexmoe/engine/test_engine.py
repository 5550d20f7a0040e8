"""Rows through the engine: who enters, who leaves, what comes back, and what is left behind."""

import gc
import itertools
import threading
import weakref

import pytest
import torch

from cost_model.model.weight_units import units_of
from flexmoe import LLM, EngineRequest, SamplingParams
from flexmoe.engine import build
from flexmoe.errors import UsageError
from flexmoe.system.trace import Recorder
from policies import Policy, Workload
from tests.support.drawn import drawn
from tests.support.engines import RESIDENT, STREAMED, is_clean
from tests.support.tiny import GEN_LEN, PROMPT_LENGTHS, assert_greedy, offload

pytestmark = pytest.mark.usefixtures("one_thread", "loads_cost_their_bytes")


@pytest.fixture
def make(tiny, tmp_path):
    """`make(percent, rows=, ...)`: an LLM over a tiny checkpoint, closed afterwards."""
    made = []

    def call(
        percent=RESIDENT, *, name="gqa-8-to-2", rows=4, batches=1, prefill_tokens=1000, schedule="rolling", **options
    ):
        policy_options = {k: options.pop(k) for k in ("overlap", "cpu_attention_percent") if k in options}
        policy = Policy.from_percent(
            percent,
            gpu_batch_size=rows,
            num_gpu_batches=batches,
            prompt_len=60,
            gen_len=GEN_LEN,
            prefill_tokens=prefill_tokens,
            schedule=schedule,
            **policy_options,
        )
        options = offload(tmp_path) | {"workload": Workload(prompt_len=60, gen_len=GEN_LEN)} | options
        made.append(LLM(tiny(name).directory, policy=policy, **options))
        return made[-1]

    yield call
    for llm in made:
        llm.close()


@pytest.mark.parametrize(
    ("percent", "small"),
    [((0, 0, 100, 0, 100, 0), False), ((0, 0, 0, 0, 100, 0), True), ((0, 0, 100, 0, 0, 0), True)],
    ids=("weights alone", "kv", "hidden states"),
)
def test_weights_are_read_in_small_pieces_where_small_transfers_wait_behind_them(make, monkeypatch, percent, small):
    monkeypatch.setattr(build, "SHARED_PIECE_BYTES", 4096)
    read, add = [], Recorder.add

    def spy(self, lane, name, start_s, end_s, nbytes=0):
        if lane.startswith("disk_read/") and not lane.startswith(("disk_read/kv", "disk_read/act")):
            read.append(nbytes)
        add(self, lane, name, start_s, end_s, nbytes)

    monkeypatch.setattr(Recorder, "add", spy)
    make(percent).generate([[5, 6, 7]], SamplingParams(max_tokens=2))
    assert read and (max(read) <= 2 * 4096) == small


def request(variant, row, max_tokens=GEN_LEN, **params):
    params = {"ignore_eos": True} | params
    return EngineRequest(
        request_id=str(row),
        prompt_token_ids=tuple(variant.prompts[row]),
        params=SamplingParams(max_tokens=max_tokens, **params),
    )


def ids(output):
    return list(output.outputs[0].token_ids)


# Entering and leaving.


def test_a_finished_row_frees_its_pages_and_its_place_is_refilled_in_the_next_sweep(make, tiny):
    variant, llm = tiny(), make(rows=2)
    engine = llm.engine
    for row, length in ((1, 2), (2, 6), (5, 3)):
        engine.submit(request(variant, row, length))
    assert engine.step() == []
    held = engine.cache.free("gpu")
    (done,) = engine.step()
    assert done.request_id == "1" and ids(done) == variant.expected(1, 2)
    assert engine.cache.free("gpu") > held
    assert [row.request.request_id for row in engine.scheduler.running] == ["2"]
    engine.step()
    assert {row.request.request_id for row in engine.scheduler.running} == {"2", "5"}
    assert [sweep.rows for sweep in engine.sweeps][-1] == 2
    assert [sweep.tokens for sweep in engine.sweeps][-1] == 1 + len(variant.prompts[5]), (
        "prefill and decode share the sweep"
    )


@pytest.mark.parametrize("pace", (16, 50))
def test_no_sweep_takes_more_than_prefill_tokens_prompt_tokens(pace, make, tiny):
    llm = make(rows=8, prefill_tokens=pace)
    llm.generate(tiny().prompts, SamplingParams(max_tokens=3, ignore_eos=True))
    assert max(llm.metrics()["prompt_tokens_per_sweep"]) <= pace


def test_static_blocks_march_together(make, tiny):
    llm = make(rows=4, schedule="static")
    llm.generate([tiny().prompts[row] for row in (1, 2, 6, 8, 9, 10)], SamplingParams(max_tokens=3, ignore_eos=True))
    assert llm.metrics()["rows_in_flight"] == [4, 4, 4, 2, 2, 2]


def test_an_aborted_row_is_gone_whether_it_runs_or_waits(make, tiny):
    variant, llm = tiny(), make(STREAMED, rows=2)
    engine = llm.engine
    for row in (1, 2, 5):
        engine.submit(request(variant, row, 4))
    engine.step()
    assert engine.abort("2") and engine.abort("5")
    assert not engine.abort("5") and not engine.abort("nobody")
    finished = list(itertools.chain.from_iterable(engine.step() for _ in range(3)))
    assert [out.request_id for out in finished] == ["1"]
    assert ids(finished[0]) == variant.expected(1, 4)
    assert is_clean(llm)


def test_a_restart_loses_no_token_and_counts_none_twice(make, tiny):
    variant, llm = tiny(), make(STREAMED, rows=4, prefill_tokens=50)
    engine, scheduler = llm.engine, llm.engine.scheduler
    rows = (1, 2, 3, 4)
    for row in rows:
        engine.submit(request(variant, row))
    outputs = {}
    for sweep in itertools.count():
        if not engine.unfinished:
            break
        if sweep in (1, 3, 5, 9) and scheduler.running:
            scheduler.preempt(scheduler.running[-1])
        outputs |= {int(out.request_id): ids(out) for out in engine.step()}
    for row in rows:
        assert_greedy(variant, row, outputs[row], variant.expected(row))
    metrics = llm.metrics()
    assert metrics["restarts"] == 4
    assert metrics["prompt_tokens"] == sum(PROMPT_LENGTHS[row] for row in rows)
    assert metrics["generated_tokens"] == len(rows) * GEN_LEN
    assert is_clean(llm)


# Ends.


def test_a_row_ends_at_its_max_tokens_for_length(make, tiny):
    llm = make()
    (out,) = llm.generate([tiny().prompts[3]], SamplingParams(max_tokens=1, ignore_eos=True))
    assert ids(out) == tiny().expected(3, 1)
    assert out.outputs[0].finish_reason == "length"


def test_a_row_without_max_tokens_ends_at_the_default_of_the_engine(make, tiny):
    llm = make(gen_len=5)
    (out,) = llm.generate([tiny().prompts[3]], SamplingParams(ignore_eos=True))
    assert ids(out) == tiny().expected(3, 5)


def test_a_row_ends_at_either_eos_id_of_the_checkpoint_and_keeps_it(make, tiny):
    variant, llm = tiny(), make(rows=8)
    outputs = llm.generate(variant.prompts, SamplingParams(max_tokens=GEN_LEN))
    ends = set()
    for row, out in enumerate(outputs):
        want = variant.expected(row, eos=True)
        assert ids(out) == want
        stopped = want[-1] in variant.eos_ids
        assert out.outputs[0].finish_reason == ("stop" if stopped else "length")
        ends |= {want[-1]} if stopped else set()
    assert ends == set(variant.eos_ids)


def test_a_stop_token_id_ends_a_row_even_when_eos_is_ignored(make, tiny):
    variant, llm = tiny(), make()
    stop = variant.greedy[4][5]
    (out,) = llm.generate(
        [variant.prompts[4]], SamplingParams(max_tokens=GEN_LEN, ignore_eos=True, stop_token_ids=(stop,))
    )
    assert ids(out) == variant.greedy[4][: variant.greedy[4].index(stop) + 1]
    assert out.outputs[0].finish_reason == "stop"


def test_a_row_ends_where_the_context_of_the_model_ends(make, tiny):
    llm = make(longest_row=512)
    context = llm.model.arch.max_position
    prompt = (tiny().prompts[4] * 2)[: context - 3]
    (out,) = llm.generate([prompt], SamplingParams(max_tokens=50, ignore_eos=True))
    assert len(ids(out)) == 3
    assert out.outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    "prompt, reason",
    [([], "no tokens"), ([1, 300], "outside the vocabulary of 300"), ([-1], "outside"), ([5] * 512, "leaves no room")],
)
def test_a_request_that_can_never_run_is_refused_with_the_reason(prompt, reason, make):
    llm = make()
    refused = EngineRequest(request_id="0", prompt_token_ids=tuple(prompt), params=SamplingParams(max_tokens=4))
    assert reason in llm.check(refused)
    with pytest.raises(UsageError, match=reason):
        llm.engine.submit(refused)


def test_a_row_longer_than_every_tiers_cache_is_refused_and_the_longest_that_fits_runs(make):
    llm = make(kv_tokens=64, longest_row=60)
    room = llm.largest_row_tokens
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    fits = EngineRequest(request_id="0", prompt_token_ids=(7,) * (room - 4), params=params)
    too_long = EngineRequest(request_id="1", prompt_token_ids=(7,) * (room - 3), params=params)
    assert llm.check(fits) is None
    assert "were planned for at most" in llm.check(too_long)
    outputs = {out.request_id: out for out in llm.stream([fits, too_long])}
    assert len(ids(outputs["0"])) == 5
    assert outputs["1"].error and outputs["1"].outputs == []
    assert is_clean(llm)


# Stream and generate.


def test_stream_pulls_no_more_than_a_block_beyond_what_runs(make, tiny):
    variant, llm = tiny(), make(rows=2)
    pulled = []

    def source():
        for row in itertools.cycle((1, 2, 6)):
            pulled.append(row)
            yield request(variant, row, 3)

    stream = llm.stream(source())
    assert pulled == []
    for done in range(1, 9):
        next(stream)
        assert len(pulled) <= done + 2 * 2 + 1
    stream.close()
    assert is_clean(llm)


def test_stream_yields_rows_as_they_finish(make, tiny):
    llm = make(rows=3)
    lengths = {1: 9, 2: 2, 6: 5}
    order = [out.request_id for out in llm.stream(request(tiny(), row, n) for row, n in lengths.items())]
    assert order == ["2", "6", "1"]


def test_generate_keeps_the_order_of_the_prompts_and_takes_parameters_per_prompt(make, tiny):
    variant, llm = tiny(), make(STREAMED, rows=3)
    rows, lengths = (4, 0, 7, 2, 5), (2, 9, 1, 12, 6)
    outputs = llm.generate(
        [variant.prompts[r] for r in rows], [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths]
    )
    for row, length, out in zip(rows, lengths, outputs, strict=True):
        assert out.prompt_token_ids == tuple(variant.prompts[row])
        assert ids(out) == variant.expected(row, length)


def test_generate_refuses_all_when_one_prompt_cannot_run_and_runs_nothing(make, tiny):
    llm = make()
    with pytest.raises(UsageError, match="prompt 1: .*outside the vocabulary"):
        llm.generate([tiny().prompts[1], [999]], SamplingParams(max_tokens=2))
    with pytest.raises(UsageError, match="2 prompts but 1 sampling parameters"):
        llm.generate([[1], [2]], [SamplingParams()])
    assert llm.metrics()["sweeps"] == 0 and is_clean(llm)
    assert llm.generate([]) == []


@pytest.mark.parametrize(
    "percent, overlap",
    [
        pytest.param(percent, overlap, marks=pytest.mark.slow if (at + serial) % 2 else ())
        for at, percent in enumerate((RESIDENT, STREAMED, (0, 0, 0, 0, 0, 0)))
        for serial, overlap in enumerate((True, False))
    ],
    ids=str,
)
def test_closing_the_stream_half_way_leaves_an_engine_that_runs_the_next_job_exactly(percent, overlap, make, tiny):
    variant, llm = tiny(), make(percent, rows=3, prefill_tokens=40, overlap=overlap)
    stream = llm.stream(request(variant, row, 2 + row % 4) for row in range(16))
    for _ in range(3):
        next(stream)
    stream.close()
    assert is_clean(llm)
    for row, out in enumerate(llm.generate(variant.prompts[:6], SamplingParams(max_tokens=GEN_LEN, ignore_eos=True))):
        assert_greedy(variant, row, ids(out), variant.expected(row))


def test_an_error_of_the_source_leaves_a_clean_engine(make, tiny):
    llm = make(STREAMED, rows=2)

    def source():
        for row in range(6):
            yield request(tiny(), row, 3)
        raise ValueError("the source broke")

    with pytest.raises(ValueError, match="the source broke"):
        list(llm.stream(source()))
    assert is_clean(llm)


# Counting.


@pytest.mark.parametrize("pace, schedule", drawn(list(itertools.product((23, 1000), ("rolling", "static")))))
def test_prompt_and_generated_tokens_add_up(pace, schedule, make, tiny):
    llm = make(STREAMED, rows=4, batches=2, prefill_tokens=pace, schedule=schedule)
    outputs = llm.generate(tiny().prompts, SamplingParams(max_tokens=5))
    metrics = llm.metrics()
    assert metrics["prompt_tokens"] == sum(PROMPT_LENGTHS) == sum(metrics["prompt_tokens_per_sweep"])
    assert metrics["generated_tokens"] == sum(len(ids(out)) for out in outputs)
    # What a sweep advances are prompt tokens and the tokens generated before; the last of a row never enters.
    assert sum(metrics["tokens_per_sweep"]) == sum(PROMPT_LENGTHS) + sum(len(ids(out)) - 1 for out in outputs)
    assert max(metrics["rows_in_flight"]) <= 8
    assert len(metrics["sweep_s"]) == metrics["sweeps"] == len(metrics["rows_in_flight"])
    assert metrics["wall_s"] == pytest.approx(sum(metrics["sweep_s"]))


def test_lanes_count_the_bytes_of_every_streamed_unit_in_every_sweep(make, tiny):
    llm = make((0, 40, 100, 0, 100, 0), rows=8, expert_cache="off")
    llm.generate(tiny().prompts[:8], SamplingParams(max_tokens=4, ignore_eos=True))
    placement, arch, metrics = llm.engine.plan.allocation.placement, llm.model.arch, llm.metrics()
    on_host = sum(u.stored_bytes for u in units_of(arch) if placement.tier_of[u.id] == "cpu" and u.kind != "embed")
    on_disk = sum(u.stored_bytes for u in units_of(arch) if placement.tier_of[u.id] == "disk" and u.kind != "embed")
    h2d = sum(v["bytes"] for k, v in metrics["lanes"].items() if k.split("/")[0] == "h2d")
    read = sum(v["bytes"] for k, v in metrics["lanes"].items() if k.split("/")[0] == "disk_read")
    assert h2d >= metrics["sweeps"] * on_host
    assert read >= metrics["sweeps"] * on_disk > 0


# Waiting and looking ahead.


def test_a_moe_layer_waits_for_the_device_at_most_once_and_on_cpu_never(make, tiny, monkeypatch):
    llm = make(STREAMED, rows=4)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    llm.generate(tiny().prompts[:4], params)
    assert llm.engine.device.host_waits == 0
    # CUDA's way through the routing: counts go to a host buffer, and the thread waits for that copy alone.
    dispatch = llm.engine.executor._experts
    dispatch._starts_host = torch.empty(llm.model.arch.num_experts + 1, dtype=torch.int64)
    before = llm.metrics()["sweeps"]
    outputs = llm.generate(tiny().prompts[:4], params)
    assert [ids(out) for out in outputs] == [tiny().expected(row, 3) for row in range(4)]
    sweeps = llm.metrics()["sweeps"] - before
    assert llm.engine.device.host_waits == sweeps * llm.model.arch.num_layers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_on_cuda_a_sweep_waits_once_per_moe_layer_and_never_for_the_device(make, tiny, monkeypatch):
    llm = make(STREAMED, rows=4, device="cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("a device-wide wait"))
    llm.generate(tiny().prompts[:4], SamplingParams(max_tokens=3, ignore_eos=True))
    assert llm.engine.device.host_waits <= llm.metrics()["sweeps"] * llm.model.arch.num_layers


@pytest.mark.parametrize("weights", [(0, 0), (0, 100), (0, 50)], ids=str)
def test_the_stream_is_ahead_by_no_more_than_its_slots(weights, make, tiny, monkeypatch):
    """Units that have been asked for and not been released never exceed the slots, which hold less than the model."""
    from flexmoe.weights import transfers
    from flexmoe.weights.stream import WeightStream

    lock, ahead, most, freed = threading.Lock(), [0], [0], WeightStream.release

    class CountingFetch(transfers.Fetch):
        def __init__(self, unit, slot, **rest):
            with lock:
                ahead[0] += slot is not None
                most[0] = max(most[0], ahead[0])
            super().__init__(unit, slot, **rest)

    def counted_release(self, unit):
        with lock:
            ahead[0] -= unit in self._held
        freed(self, unit)

    monkeypatch.setattr(transfers, "Fetch", CountingFetch)
    monkeypatch.setattr(WeightStream, "release", counted_release)
    llm = make((*weights, 100, 0, 100, 0), rows=4, expert_cache="off")
    llm.generate(tiny().prompts[:4], SamplingParams(max_tokens=4, ignore_eos=True))
    slots, units = llm.engine.plan.allocation.slots, len(units_of(llm.model.arch)) - 1
    assert 0 < most[0] <= slots < units


# Several engines.


def test_two_engines_in_one_process_take_turns_and_share_nothing(make, tiny):
    first, second = make((0, 0, 0, 0, 0, 0), rows=3), make(STREAMED, name="window", rows=2)
    streams = [
        llm.stream(request(tiny(name), row, 6) for row in range(8))
        for llm, name in ((first, "gqa-8-to-2"), (second, "window"))
    ]
    outputs = [{}, {}]
    for pair in itertools.zip_longest(*streams):
        for seen, out in zip(outputs, pair):
            if out is not None:
                seen[int(out.request_id)] = ids(out)
    for seen, name in zip(outputs, ("gqa-8-to-2", "window")):
        for row in range(8):
            assert_greedy(tiny(name), row, seen[row], tiny(name).expected(row, 6))


def test_two_engines_in_two_threads_generate_exactly(make, tiny):
    llms, outputs = [make((0, 30, 30, 30, 0, 50), rows=3) for _ in range(2)], [None, None]
    params = SamplingParams(max_tokens=6, ignore_eos=True)

    def work(i):
        outputs[i] = llms[i].generate(tiny().prompts[:8], params)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for out in outputs:
        assert [ids(o) for o in out] == [tiny().expected(row, 6) for row in range(8)]


def test_memory_of_an_engine_goes_with_its_last_user_and_waits_for_no_garbage_collector(tiny, tmp_path):
    policy = Policy.from_percent((10, 20, 0, 50, 0, 0), gpu_batch_size=2, num_gpu_batches=2, prompt_len=60, gen_len=4)
    llm = LLM(tiny().directory, policy=policy, workload=Workload(prompt_len=60, gen_len=4), **offload(tmp_path))
    llm.generate(tiny().prompts[:3], SamplingParams(max_tokens=3))
    held = [weakref.ref(part) for part in (llm.engine, llm.engine.cache, llm.engine.store)]
    llm.close()
    gc.collect()
    gc.disable()
    try:
        del llm
        assert [ref() for ref in held] == [None] * 3
    finally:
        gc.enable()


def test_closing_an_engine_ends_its_threads_and_leaves_no_file(tiny, tmp_path):
    before = set(threading.enumerate())
    policy = Policy.from_percent((10, 20, 0, 0, 0, 0), gpu_batch_size=2, num_gpu_batches=2, prompt_len=60, gen_len=4)
    llm = LLM(tiny().directory, policy=policy, workload=Workload(prompt_len=60, gen_len=4), **offload(tmp_path))
    llm.generate(tiny().prompts[:3], SamplingParams(max_tokens=3))
    assert list((tmp_path / "offload").iterdir()) == [], "a killed run would leave its files behind"
    llm.close()
    assert set(threading.enumerate()) <= before


def test_a_second_stream_is_refused_while_one_is_open_and_takes_no_row_from_it(make, tiny):
    llm, variant = make(), tiny()
    stream = llm.stream([request(variant, row) for row in range(6)])
    first = next(stream)
    with pytest.raises(UsageError, match="another stream"):
        llm.generate([variant.prompts[0]], SamplingParams(max_tokens=2))
    assert len({first.request_id, *(out.request_id for out in stream)}) == 6


def test_a_closed_engine_says_so_and_closing_twice_does_nothing(make, tiny):
    llm = make()
    llm.close()
    llm.close()
    with pytest.raises(UsageError, match="closed"):
        llm.generate([tiny().prompts[0]])


def test_an_engine_that_cannot_be_built_leaves_no_thread(make, monkeypatch):
    before = set(threading.enumerate())
    monkeypatch.setattr("flexmoe.engine.build.KVCache", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "no space")))
    with pytest.raises(OSError):
        make()
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("prompt", ([1.5, 2], [True, 2], ["1", "2"], b"abc", None))
def test_a_prompt_that_is_neither_text_nor_ids_is_refused(prompt, make):
    with pytest.raises(UsageError, match="prompt 0"):
        make().generate([prompt])
