"""The first value that is not finite ends the run, and the error says where it is."""

import math

import pytest
import torch

from flexmoe import LLM, SamplingParams
from flexmoe.debugging.finite import NonFiniteError, is_finite, wrong_rows
from flexmoe.engine import build
from policies import Policy, Workload
from tests.support.edited import edited, large, spoil
from tests.support.engines import RESIDENT, STREAMED, is_clean
from tests.support.tiny import offload
from tests.support.tiny_gpt_oss import recipe

pytestmark = pytest.mark.usefixtures("small_halves", "one_thread")
#: A token that no prompt of the tests has by chance.
BAD = 7
SOUND = [11 + 3 * at for at in range(40)]
GREEDY = SamplingParams(max_tokens=3, ignore_eos=True)
#: Tensor of the checkpoint and a place of it; what the sentence begins with; the tensors of the unit that it blames.
WEIGHTS = {
    "embedding": ("model.embed_tokens.weight", (SOUND[5], 3), "hidden_states of embed (layer -1)", "rows of the table"),
    "input norm": ("model.layers.1.input_layernorm.weight", 2, "query of layers.1.attention (layer 1)", "input_norm"),
    "value": ("model.layers.0.self_attn.v_proj.weight", (1, 2), "value of layers.0.attention (layer 0)", "v"),
    "output": (
        "model.layers.2.self_attn.o_proj.weight",
        (1, 2),
        "hidden_states_after_attention of layers.2.attention (layer 2)",
        "o",
    ),
    "router": (
        "model.layers.1.block_sparse_moe.gate.weight",
        (3, 1),
        "router_logits of layers.1.attention (layer 1)",
        "router",
    ),
    "final norm": ("model.norm.weight", 0, "final_norm of head.0 (layer 3)", "norm"),
    "head": ("lm_head.weight", (9, 9), "logits of head.0 (layer 3)", "head"),
}


@pytest.fixture
def make(tmp_path):
    made = []

    def call(directory, percent=RESIDENT, policy=(), **options):
        policy = Policy.from_percent(
            percent, gpu_batch_size=2, num_gpu_batches=2, prompt_len=40, gen_len=6, **dict(policy)
        )
        options = {"workload": Workload(prompt_len=40, gen_len=6), "check_finite": True} | options
        made.append(LLM(directory, policy=policy, **offload(tmp_path), **options))
        return made[-1]

    yield call
    for llm in made:
        llm.close()


def broken(tiny, directory, name, at, value=math.nan):
    def edit(tensors):
        tensors[name][at] = value

    return edited(tiny, directory, edit)


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_nan_among_the_weights_is_named_by_layer_and_unit(case, tiny, make, tmp_path):
    name, at, begins, blamed = WEIGHTS[case]
    llm = make(broken(tiny, tmp_path / "m", name, at))
    with pytest.raises(NonFiniteError) as raised:
        llm.generate([SOUND], GREEDY)
    sweep = 1 if "head.0" in begins else 0  # the one in which the prompt ends
    assert str(raised.value).startswith(f"{begins} is not finite in sweep {sweep}: it holds nan for row 0, position ")
    assert f"the unit's weights hold such values too ({blamed}): weights of the checkpoint" in str(raised.value)


@pytest.mark.parametrize(
    "percent, policy, on_demand",
    [
        pytest.param(RESIDENT, {}, False, id="resident"),
        pytest.param(STREAMED, {"half_blocks": 2}, False, id="streamed"),
        pytest.param(RESIDENT, {"experts_per_unit": 4}, False, id="grouped"),
        pytest.param((20, 0, 100, 0, 100, 0), {}, True, id="on demand"),
    ],
)
@pytest.mark.parametrize("matrix", ["w1", "w2"])
def test_a_nan_in_an_expert_is_named_by_its_number(matrix, percent, policy, on_demand, tiny, make, tmp_path, request):
    if on_demand:
        request.getfixturevalue("loads_cost_their_bytes")
    directory = broken(tiny, tmp_path / "m", f"model.layers.2.block_sparse_moe.experts.1.{matrix}.weight", (5, 2))
    llm = make(directory, percent, policy, **({"gpu_mem": 1.0} if on_demand else {}))
    prompts = [[11]] if on_demand else [SOUND[:20], SOUND[20:], SOUND[5:9], SOUND[7:21]]
    with pytest.raises(NonFiniteError) as raised:
        llm.generate(prompts, SamplingParams(max_tokens=20, ignore_eos=True))
    unit = "layers.2.expert.0-3" if "experts_per_unit" in policy else "layers.2.expert.1"
    assert str(raised.value).startswith(f"expert_output of {unit} (layer 2, expert 1) is not finite in sweep ")
    assert "weights of the checkpoint are probably damaged" in str(raised.value)
    assert bool(llm.engine.feed.metrics()["on_demand_sweeps"]) == on_demand


def test_row_sample_and_position_are_named_and_the_others_run_afterwards(tiny, make, tmp_path):
    want = make(edited(tiny, tmp_path / "sound", lambda tensors: None)).generate([SOUND[:9]], GREEDY)
    directory = broken(tiny, tmp_path / "m", "model.embed_tokens.weight", (BAD, 0), math.inf)
    llm = make(directory, STREAMED, {"half_blocks": 2})
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"holds inf for row 1, position 12; "):
            llm.generate([SOUND[:9], [*SOUND[:12], BAD, 30], SOUND[:5]], GREEDY)
        assert is_clean(llm)
    assert llm.generate([SOUND[:9]], GREEDY)[0].outputs == want[0].outputs


def large_products(tensors):
    """In float16 the weights are sound, and what they give is not."""
    for name in tensors:
        if ".w3." in name:
            tensors[name] *= 3e4


@pytest.mark.parametrize("edit, weights", [(large, "hold such values too (down)"), (large_products, "are finite")])
def test_overflow_names_another_dtype(edit, weights, tiny, make, tmp_path):
    llm = make(edited(tiny, tmp_path / "m", edit), dtype="float16")
    with pytest.raises(NonFiniteError) as raised:
        llm.generate([SOUND], GREEDY)
    assert f"the unit's weights {weights}: " in str(raised.value) and "run with dtype='bfloat16'" in str(raised.value)
    assert ("probably damaged" in str(raised.value)) == (edit is large)
    make(tmp_path / "m", dtype="bfloat16").generate([SOUND], GREEDY)


def test_an_expert_that_is_masked_by_minus_infinity_is_no_error(variants, make, tmp_path):
    from tests.support.tiny import make as make_checkpoint

    directory = make_checkpoint(recipe(num_hidden_layers=2), tmp_path / "m").directory
    spoil(directory, "model.layers.1.mlp.router.bias", 3, -math.inf)
    llm = make(directory)
    llm.generate([SOUND], GREEDY)
    assert llm.router_stats(1).counts[3] == 0 and llm.router_stats(1).tokens == len(SOUND) + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_finite_values_are_finite_and_single_ones_that_are_not_are_found(dtype):
    x = torch.full((4, 300), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(x) and is_finite(x, masked=True) and is_finite(x[:0])
    for value in (math.inf, -math.inf, math.nan):
        x[2, 7] = value
        assert not is_finite(x) and wrong_rows(x).tolist() == [2]
        assert is_finite(x, masked=True) == (value == -math.inf)
    assert wrong_rows(x, masked=True).tolist() == [2]


def test_without_it_nothing_watches(tiny, tmp_path, monkeypatch):
    for name in ("Watch", "WatchedFamily", "WatchedDispatch", "SpanRecorder", "DebugRecords"):
        monkeypatch.setattr(build, name, lambda *_, **__: pytest.fail("something of debug mode was made"))
    policy = Policy.from_percent(RESIDENT, gpu_batch_size=2, num_gpu_batches=1, prompt_len=40, gen_len=6)
    with LLM(tiny().directory, policy=policy, workload=Workload(prompt_len=40, gen_len=6), **offload(tmp_path)) as llm:
        llm.generate([SOUND], GREEDY)
