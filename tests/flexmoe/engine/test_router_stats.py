"""What the routers choose is counted as transformers' routers choose it, whatever the policy, and without a wait."""

import json
from functools import cache

import numpy as np
import pytest
import torch

from cost_model import ModelArch
from cost_model.routing.router_stats import RouterStats
from flexmoe import SamplingParams
from flexmoe.engine import router_counter
from flexmoe.engine.router_counter import RouterCounter, coactivation_bytes
from flexmoe.errors import UsageError
from tests.support import tiny_families
from tests.support.command_lines import THREE_TIERS, body
from tests.support.exactness import Case, make_llm
from tests.support.tiny import MARGIN, router_margins

pytestmark = pytest.mark.usefixtures("one_thread", "loads_cost_their_bytes")

GENERATED = 4


@pytest.fixture
def llm_of(tmp_path, monkeypatch):
    """`llm_of(variant, ...)`: an LLM under a `Case` of those fields, closed afterwards."""
    made = []

    def call(variant, device="cpu", *, router_stats=True, **case):
        made.append(
            make_llm(variant, Case(eos=False, **case), device, tmp_path, monkeypatch, router_stats=router_stats)
        )
        return made[-1]

    yield call
    for llm in made:
        llm.close()


@torch.no_grad()
def chosen_by_transformers(variant, rows):
    """The experts that transformers chooses for every token that is computed to generate `GENERATED` tokens: per layer
    int64 ``[T, K]``; and the rows in which it is undecided nowhere, the only ones that are counted."""
    model, chosen, decided = variant.model, {}, []
    routers = {n: m for n, m in model.named_modules() if n.endswith((".mlp.gate", ".mlp.router"))}
    seen = {}
    hooks = [
        module.register_forward_hook(lambda _, args, out, at=int(name.split(".")[2]): seen.update({at: out[2]}))
        for name, module in routers.items()
    ]
    for row in rows:
        ids = variant.prompts[row] + variant.greedy[row][: GENERATED - 1]
        out = model(torch.tensor([ids]), output_router_logits=True)
        best = out.logits[0, -GENERATED:].topk(2).values
        if router_margins(model, out.router_logits).min() > MARGIN and (best[:, 0] - best[:, 1]).min() > MARGIN:
            decided.append(row)
            for layer, ids_TK in seen.items():
                chosen.setdefault(layer, []).append(ids_TK)
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(pieces) for layer, pieces in chosen.items()}, decided


def generate(llm, variant, rows):
    prompts = [variant.prompts[row] for row in rows]
    llm.generate(prompts, SamplingParams(max_tokens=GENERATED, ignore_eos=True))


def brute_force(ids_TK, experts):
    """Counts and co-activation of a layer, token by token and pair by pair."""
    counts, together = [0] * experts, [[0] * experts for _ in range(experts)]
    for chosen in ids_TK.tolist():
        for i in chosen:
            counts[i] += 1
            for j in chosen:
                together[i][j] += 1
    return counts, together


SHORT = (0, 1, 2, 5, 6, 8, 9, 10, 12)  # of up to 50 tokens: no row crosses the switch of a LongRoPE


# Against transformers.


@pytest.fixture(scope="module")
def chosen_of(variants):
    """`chosen_of(name)`: what transformers chooses in the short rows, and which of them count; found once."""
    return cache(lambda name: chosen_by_transformers(variants(name), SHORT))


@pytest.mark.parametrize("name", tiny_families.RECIPES)
def test_counts_and_coactivation_are_those_of_transformers_routers(name, variants, chosen_of, llm_of):
    variant = variants(name)
    chosen, rows = chosen_of(name)
    assert len(rows) >= len(SHORT) - 1
    llm = llm_of(variant)
    generate(llm, variant, rows)
    arch = llm.model.arch
    assert sorted(chosen) == [layer for layer in range(arch.num_layers) if not arch.is_dense(layer)]
    for layer, ids_TK in chosen.items():
        counts, together = brute_force(ids_TK, arch.num_experts)
        got = llm.router_stats(layer)
        assert got.counts.tolist() == counts and got.coactivation.tolist() == together
        assert (got.layer, got.tokens) == (layer, len(ids_TK))
        assert got.counts.sum() == got.tokens * arch.top_k


@pytest.mark.parametrize(
    "case",
    [
        {"placement": (100, 0, 100, 0, 100, 0), "batches": (16, 1), "prefill_tokens": 1000},
        {"placement": (0, 0, 0, 0, 0, 0), "prefill_tokens": 37, "cpu_attention": 100},
        {"placement": (30, 30, 30, 30, 30, 30), "schedule": "static", "batches": (3, 2)},
        {"placement": (0, 100, 0, 100, 0, 100), "overlap": False, "batches": (1, 2)},
    ],
    ids=str,
)
def test_totals_do_not_depend_on_policy_chunks_or_schedule(case, variants, chosen_of, llm_of):
    variant = variants("qwen3")
    chosen, rows = chosen_of("qwen3")
    llm = llm_of(variant, **case)
    generate(llm, variant, rows)
    for layer, ids_TK in chosen.items():
        counts, together = brute_force(ids_TK, llm.model.arch.num_experts)
        assert llm.router_stats(layer).counts.tolist() == counts
        assert llm.router_stats(layer).coactivation.tolist() == together


def test_a_skewed_router_is_seen_as_such(tiny, llm_of):
    variant = tiny("skewed")
    llm = llm_of(variant)
    generate(llm, variant, range(6))
    for layer in range(3):
        balance = llm.router_stats(layer).balance
        assert llm.router_stats(layer).counts.argmax() == 0
        assert balance.max_over_mean > 1.8 and balance.relative_entropy < 0.8


# What is counted.


def test_tokens_that_a_restart_computes_again_count_again(tiny, llm_of):
    variant = tiny()
    llm = llm_of(variant, disturbed="sent-back")
    generate(llm, variant, range(8))
    metrics = llm.metrics()
    needed = metrics["prompt_tokens"] + metrics["generated_tokens"] - 8  # the last token of a row is not computed
    assert metrics["restarts"] > 0
    assert llm.router_stats(0).tokens == metrics["run_tokens"] > needed


def test_statistics_go_on_from_one_call_to_the_next_and_outlive_the_engine(tiny, llm_of):
    variant, llm = tiny(), None
    llm = llm_of(variant)
    generate(llm, variant, [1])
    first = llm.router_stats(2)
    generate(llm, variant, [1])
    llm.close()
    second = llm.router_stats(2)
    assert second.counts.tolist() == (2 * first.counts).tolist()
    assert second.coactivation.tolist() == (2 * first.coactivation).tolist()


def test_without_asking_there_are_counts_and_balance_but_no_coactivation(tiny, llm_of):
    variant = tiny()
    llm = llm_of(variant, router_stats=False)
    generate(llm, variant, [1, 2])
    stats = llm.router_stats(1)
    assert stats.tokens == len(variant.prompts[1] + variant.prompts[2]) + 2 * (GENERATED - 1)
    assert stats.balance.max_over_mean >= 1 and stats.coactivation is None
    with pytest.raises(UsageError, match="router_stats=True"):
        llm.engine.router_counter.stats()


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 16 * 7, 1 << 20])
def test_coactivation_is_exact_in_chunks_of_any_size_and_beyond_what_float32_counts(chunk_bytes, monkeypatch):
    monkeypatch.setattr(router_counter, "_CHUNK_BYTES", chunk_bytes)
    arch = ModelArch.from_name("phi-3.5-moe")
    counter = RouterCounter(arch, torch.device("cpu"), coactivation=True)
    ids_TK = torch.rand(100, 16).argsort(dim=1)[:, :2]
    counts, together = brute_force(ids_TK, 16)
    counter._together[3] += 2**24
    counter.add(3, ids_TK, counts)
    assert counter.layer(3).coactivation.tolist() == (torch.tensor(together) + 2**24).tolist()


# Waiting and memory.


def test_counting_needs_nothing_from_the_device():
    counter = RouterCounter(ModelArch.from_name("mixtral-8x7b"), torch.device("meta"), coactivation=True)
    counter.add(0, torch.zeros(9, 2, dtype=torch.int64, device="meta"), [9, 9, 0, 0, 0, 0, 0, 0])
    with pytest.raises(NotImplementedError):  # a tensor of this device has no data: reading any would have failed so
        counter.layer(0)


def test_counting_adds_no_host_wait(tiny, llm_of):
    variant = tiny()
    llm = llm_of(variant)
    dispatch = llm.engine.executor._experts
    dispatch._starts_host = torch.empty(llm.model.arch.num_experts + 1, dtype=torch.int64)  # CUDA's way
    generate(llm, variant, range(4))
    assert llm.engine.device.host_waits == llm.metrics()["sweeps"] * llm.model.arch.num_layers


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_on_cuda_counting_never_synchronizes():
    arch = ModelArch.from_name("mixtral-8x7b")
    counter = RouterCounter(arch, torch.device("cuda"), coactivation=True)
    ids_TK = torch.rand(5000, 8).argsort(dim=1)[:, :2]
    counts, together = brute_force(ids_TK, 8)
    on_device = ids_TK.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        counter.add(1, on_device, counts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert counter.layer(1).coactivation.tolist() == together


def test_the_memory_of_coactivation_is_part_of_the_plan(tiny, llm_of):
    with_it, without = (llm_of(tiny(), router_stats=asked).engine for asked in (True, False))
    wanted = coactivation_bytes(with_it.model.arch)
    parts = with_it.plan.memory.parts["gpu"]
    assert {**parts, "router statistics": None} == {**without.plan.memory.parts["gpu"], "router statistics": None}
    assert parts["router statistics"] == wanted > sum(t.nbytes for t in with_it.router_counter._together.values())


# What is refused.


def test_what_has_no_statistics_is_told_in_a_sentence(variants, llm_of):
    llm = llm_of(variants("qwen3"))
    with pytest.raises(UsageError, match="layer 0 has routed no token yet"):
        llm.router_stats(0)
    generate(llm, variants("qwen3"), [1])
    assert llm.router_stats(0).tokens > 0
    with pytest.raises(UsageError, match="layer 1 is dense"):
        llm.router_stats(1)
    for wrong, said in ((4, "layers 0 to 3"), (-1, "layer is -1"), (True, "layer is True"), ("0", "layer is '0'")):
        with pytest.raises(UsageError, match=said):
            llm.router_stats(wrong)


# The command line.


def test_a_job_writes_the_statistics_of_the_tokens_that_it_computed(job, main):
    stats, metrics = job.directory / "stats.json", job.directory / "m.json"
    code, out, err = main(job.args(*THREE_TIERS, "--router-stats", str(stats), "--metrics-json", str(metrics)))
    assert (code, err) == (0, "") and f"router statistics: {stats}" in out
    loaded, arch = RouterStats.load(stats), ModelArch.from_dir(job.model)
    assert loaded.tokens == json.loads(metrics.read_text())["run_tokens"]
    assert loaded.model == arch.fingerprint() and loaded.layers == tuple(range(arch.num_layers))
    generated = sum(body(line)["usage"]["completion_tokens"] for line in job.lines())
    prompt = sum(body(line)["usage"]["prompt_tokens"] for line in job.lines())
    assert loaded.tokens == prompt + generated - len(job.lines())
    assert json.loads(stats.read_text())["kind"] == "flexmoe.router-stats"


def test_a_benchmark_writes_them_too_and_leaves_dense_layers_out(variants, job, main):
    stats = job.directory / "stats.json"
    flags = ["--prompt-len", "9", "--gen-len", "3", "--num-prompts", "5", "--router-stats", str(stats)]
    assert main(job.args(*flags, model=variants("qwen3").directory, files=False))[0] == 0
    document = json.loads(stats.read_text())
    assert [layer["layer"] for layer in document["layers"]] == [0, 2, 3] and document["tokens"] == 5 * (9 + 2)
    assert all(np.trace(layer["coactivation"]) == 5 * 11 * 4 for layer in document["layers"])


def test_a_start_that_routes_nothing_writes_no_statistics_and_says_so(job, main):
    stats = job.directory / "stats.json"
    assert main(job.args())[0] == 0
    code, out, err = main(job.args("--router-stats", str(stats)))
    assert (code, err) == (0, "") and "no router statistics" in out and not stats.exists()
    job.write([{"prompt": [999]}])
    code, out, _ = main(job.args("--overwrite", "--router-stats", str(stats)))
    assert code == 3 and not stats.exists()


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_loaded(job, main, monkeypatch):
    monkeypatch.setattr("flexmoe.batch.job_parts.load_model", lambda *_: pytest.fail("the model was opened"))
    code, _, err = main(job.args("--router-stats", "/no/such/stats.json"))
    assert code == 74 and "/no/such" in err
    code, _, err = main(job.args("--router-stats", str(job.directory / "in.jsonl")))
    assert code == 2 and "choose another" in err
