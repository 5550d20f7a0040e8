"""gpt-oss: float32 greedy ids are transformers', in both layouts, and KV is held and moved by window."""

import random

import pytest
import torch
from transformers import GptOssConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cost_model.model.arch import ModelArch
from flexmoe import LLM, SamplingParams
from flexmoe.errors import DataError
from flexmoe.kernels.linear import unpack
from flexmoe.models.common.yarn import yarn
from flexmoe.models.loader import load_model
from flexmoe.params import Resumed
from policies import Policy, Workload
from tests.support.exactness import CHOICES, PLACEMENTS, Case, check, make_llm
from tests.support.references import DRAWN, HOMES, reference, request, run
from tests.support.tiny import GEN_LEN, offload
from tests.support.tiny_gpt_oss import ORIGINAL, drawn, made, recipe

pytestmark = pytest.mark.usefixtures("one_thread", "loads_cost_their_bytes")


def cases(count, seed):
    """Random ways to run; `CHOICES` has the values of every field."""
    rng = random.Random(seed)
    names = [name for name in CHOICES if name != "variant"]
    return [Case(variant="", **{name: rng.choice(CHOICES[name]) for name in names}) for _ in range(count)]


#: Prompts of one token, around the window and the pages, beyond YaRN's original context and longer than a chunk.
LENGTHS = (1, 5, 15, 16, 17, 33, ORIGINAL - 6, ORIGINAL + 1, 100, 150)


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """By whether its experts are packed."""
    return {
        packed: made(recipe(), tmp_path_factory.mktemp("gpt-oss"), LENGTHS, packed=packed) for packed in (False, True)
    }


WAYS = [
    (at % 2 == 1, case)
    for at, case in enumerate(
        cases(4, 21) + [Case(variant="", placement=p, prefill_tokens=37) for p in PLACEMENTS[3:5]]
    )
]
MORE = [(packed, case) for packed in (False, True) for case in cases(60, 22 + packed)]


@pytest.mark.parametrize("packed, case", WAYS, ids=str)
def test_greedy_ids_equal_transformers(packed, case, variants, tmp_path, monkeypatch):
    check(variants[packed], case, "cpu", tmp_path, monkeypatch, longest=max(LENGTHS) + GEN_LEN)


@pytest.mark.slow
@pytest.mark.parametrize("packed, case", MORE, ids=str)
def test_greedy_ids_equal_transformers_in_many_more_ways(packed, case, variants, tmp_path, monkeypatch):
    check(variants[packed], case, "cpu", tmp_path, monkeypatch, longest=max(LENGTHS) + GEN_LEN)


def check_drawn(seed, tmp_path, monkeypatch):
    variant = made(drawn(seed), tmp_path, LENGTHS, packed=seed % 2 == 1)
    (case,) = cases(1, 3000 + seed)
    check(variant, case, "cpu", tmp_path, monkeypatch, longest=max(LENGTHS) + GEN_LEN)


@pytest.mark.parametrize("seed", range(2))
def test_greedy_ids_of_random_configs_equal_transformers(seed, tmp_path, monkeypatch):
    check_drawn(seed, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 60))
def test_greedy_ids_of_many_random_configs_equal_transformers(seed, tmp_path, monkeypatch):
    check_drawn(seed, tmp_path, monkeypatch)


@pytest.mark.parametrize("packed", [False, True])
def test_logits_of_every_position_are_transformers(packed, variants, tmp_path, monkeypatch):
    variant = variants[packed]
    llm = make_llm(variant, Case(placement=(0, 50, 0, 50, 0, 0), prefill_tokens=37), "cpu", tmp_path, monkeypatch)
    try:
        for prompt in variant.prompts[5:]:
            with torch.no_grad():
                want = variant.model(torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(llm.logits(prompt), want, atol=2e-3, rtol=1e-4)
    finally:
        llm.close()


def test_unpacked_values_are_transformers_bit_for_bit(variants):
    model = load_model(str(variants[True].directory))
    checkpoint, arch = model.checkpoint, model.arch.grouped(4)
    parts = load_model(str(variants[True].directory)).grouped(4).family.parts(checkpoint.tensors)
    for unit in [unit for unit in parts if unit.kind == "expert"][:3]:
        tensors = {part.role: _read(checkpoint, part) for part in parts[unit]}
        weights = model.family.expert_weights(unit.layer, tensors)
        for role, matrices in (("gate_up", weights._gate_up[0]), ("down", weights._down)):
            name = f"model.layers.{unit.layer}.mlp.experts.{role}_proj"
            blocks, scales = (_whole(checkpoint, f"{name}_{what}") for what in ("blocks", "scales"))
            for dtype in (torch.bfloat16, torch.float32):
                want = convert_moe_packed_tensors(blocks, scales, dtype=dtype).transpose(1, 2)
                for at, expert in enumerate(unit.experts):
                    assert torch.equal(unpack(matrices[at], torch.empty(matrices[at].shape, dtype=dtype)), want[expert])
                    got = matrices[at].unpack(torch.empty(matrices[at].shape, dtype=dtype))
                    assert torch.equal(got, want[expert])
    assert arch.is_packed("expert") and not arch.is_packed("attention")


def _whole(checkpoint, name):
    info = checkpoint.tensors[name]
    with open(info.path, "rb") as file:
        file.seek(info.offset)
        return torch.frombuffer(bytearray(file.read(info.nbytes)), dtype=info.dtype).view(info.shape)


def _read(checkpoint, part):
    flat = _whole(checkpoint, part.tensor).flatten()
    return flat[part.first_element : part.first_element + torch.Size(part.shape).numel()].view(part.shape)


@pytest.mark.parametrize("values", [{}, {"truncate": False}, {"beta_fast": 8.0, "beta_slow": 2.0}, {"mscale": 0.7, "mscale_all_dim": 1.2}, {"attention_factor": 1.4}, {"factor": 1.0}], ids=str)  # fmt: skip
def test_yarn_is_transformers(values):
    values = {
        "rope_type": "yarn",
        "rope_theta": 1.5e5,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
    } | values
    config = GptOssConfig(rope_parameters=dict(values))
    want, want_scale = ROPE_INIT_FUNCTIONS["yarn"](config)
    periods = 1.5e5 ** (torch.arange(0, 64, 2).float() / 64)
    got, scale = yarn(periods, 1.5e5, config.max_position_embeddings, values)
    assert torch.equal(got, want) and scale == want_scale


# KV by window.


@pytest.mark.parametrize("tier", ["gpu", "cpu", "disk"])
def test_a_row_that_decodes_holds_the_pages_of_its_window_alone(tier, variants, tmp_path):
    arch = load_model(str(variants[False].directory)).arch
    assert [(group.window, group.layers) for group in arch.kv_groups] == [(None, (1, 3)), (20, (0, 2))]
    percents = {"gpu": (100, 0), "cpu": (0, 100), "disk": (0, 0)}[tier]
    policy = Policy.from_percent(
        (100, 0, *percents, 100, 0), gpu_batch_size=1, num_gpu_batches=1, prompt_len=100, gen_len=30, prefill_tokens=200
    )
    options = {"workload": Workload(prompt_len=100, gen_len=30), "longest_row": 130, "offload_dir": str(tmp_path)}
    with LLM(variants[False].directory, policy=policy, device="cpu", dtype="float32", **options) as llm:
        engine, held = llm.engine, []
        scheduler, step = engine.scheduler, engine.step

        def watched():
            finished = step()
            for row in scheduler.running:
                kv = row.held_kv()
                held.append((kv.length, *(len(table.pages) for table in kv.tables)))
                assert row.pages == len(kv.pages) and engine.cache.free(tier) == engine.cache.total(tier) - row.pages
            return finished

        engine.step = watched
        llm.generate([variants[False].prompts[8]], SamplingParams(max_tokens=30, ignore_eos=True))
    assert held[0] == (100, 7, 3) and len(held) == 29
    assert all(windowed == 3 and full == -(-length // 16) for length, full, windowed in held)


def test_planned_kv_bytes_are_those_of_the_pools_and_by_window(variants, tmp_path, monkeypatch):
    variant = variants[False]
    llm = make_llm(variant, Case(placement=(100, 0, 40, 30, 100, 0)), "cpu", tmp_path, monkeypatch)
    try:
        plan, cache, arch = llm.engine.plan, llm.engine.cache, llm.engine.plan.allocation
        assert plan.memory.parts["gpu"]["kv"] == cache.gpu.nbytes == arch.kv_pages["gpu"] * 16 * 2 * 2 * 2 * 16 * 4
        assert plan.memory.parts["cpu"]["kv"] == cache.cpu.nbytes
        assert plan.memory.parts["disk"]["kv"] == cache.total("disk") * cache.page_bytes * 2
    finally:
        llm.close()


def test_kv_of_a_window_of_128_is_half_of_the_layers_and_nine_pages_of_the_others():
    arch = ModelArch.from_name("gpt-oss-120b")
    from cost_model.memory.allocation import allocate, kv_layout

    layout = kv_layout(arch.kv_groups)
    assert (layout.full, layout.windowed, layout.window, layout.ring) == (1, 1, 128, 9)
    assert (layout.held(64), layout.held(768), layout.held(100_000)) == (8, 48 + 9, 6250 + 9)
    policy = Policy.from_percent(
        (10, 90, 0, 100, 100, 0), gpu_batch_size=64, num_gpu_batches=10, prompt_len=512, gen_len=256
    )
    pages = allocate(arch, policy, Workload(prompt_len=512, gen_len=256), device="cuda").kv_pages["cpu"]
    rows = 640 * (648 / 16 + 9)
    entering = policy.prefill_tokens / 512 * (32 - 9)
    assert rows + entering <= pages <= rows + entering + 1


@pytest.mark.parametrize("home, prefill_tokens", [("gpu", 1000), ("all", 37), ("disk", 1000)])
def test_samples_of_one_prompt_share_its_pages_of_both_kinds(home, prefill_tokens, variants, tmp_path):
    percent, on_cpu = HOMES[home]
    policy = Policy.from_percent(
        percent,
        gpu_batch_size=3,
        num_gpu_batches=1,
        prompt_len=100,
        gen_len=GEN_LEN,
        prefill_tokens=prefill_tokens,
        cpu_attention_percent=on_cpu,
    )
    workload, prompt = Workload(prompt_len=100, gen_len=GEN_LEN), variants[False].prompts[8]
    with LLM(variants[False].directory, policy=policy, workload=workload, **offload(tmp_path)) as llm:
        (out,) = run(llm, request(prompt, max_tokens=GEN_LEN, n=3, **DRAWN)).values()
        assert llm.metrics()["prompt_tokens"] == len(prompt)
    want = [reference(variants[False], prompt, GEN_LEN, index=index, **DRAWN)[0] for index in range(3)]
    assert [list(o.token_ids) for o in out.outputs] == want


@pytest.mark.parametrize("home", ["gpu", "all"])
def test_resumed_samples_are_those_of_rows_on_their_own(home, variants, tmp_path):
    percent, on_cpu = HOMES[home]
    policy = Policy.from_percent(
        percent, gpu_batch_size=3, num_gpu_batches=1, prompt_len=100, gen_len=GEN_LEN, cpu_attention_percent=on_cpu
    )
    workload, prompt = Workload(prompt_len=100, gen_len=GEN_LEN), variants[False].prompts[8]
    want = [reference(variants[False], prompt, GEN_LEN, index=index, **DRAWN)[0] for index in range(3)]
    had = [Resumed(token_ids=tuple(ids[:count])) for ids, count in zip(want, (7, 0, 3))]
    with LLM(variants[False].directory, policy=policy, workload=workload, **offload(tmp_path)) as llm:
        (out,) = run(llm, request(prompt, resumed=tuple(had), max_tokens=GEN_LEN, n=3, **DRAWN)).values()
    assert [list(o.token_ids) for o in out.outputs] == want


# What is refused.


FP8 = {
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.*.mlp.router"],
}


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types in the config is"),
        ({"layer_types": ["chunked_attention"] * 36}, "sliding_attention or full_attention for each layer"),
        ({"sliding_window": 0}, "sliding_window in the config is 0"),
        ({"quantization_config": FP8}, "asks for fp8 of attention and expert"),
    ],
    ids=str,
)
def test_what_gpt_oss_does_not_have_is_refused_by_name(change, sentence):
    from cost_model.model.known_shapes import known_config

    with pytest.raises(DataError, match=sentence):
        ModelArch.from_config(known_config("gpt-oss-120b") | change)


def test_known_shapes_are_those_of_the_hub():
    small, large = (ModelArch.from_name(f"openai/gpt-oss-{size}") for size in ("20b", "120b"))
    assert (small.parameters, large.parameters) == (20_914_757_184, 116_829_156_672)
    assert (large.expert_bytes, large.total_bytes) == (13_236_480, 65_248_815_744)
    assert large.full_layers == tuple(range(1, 36, 2)) and large.sinks
