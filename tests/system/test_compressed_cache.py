"""With an int8 KV cache, greedy ids are those of transformers' model whose keys and values are rounded in the same way."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from flexmoe import LLM
from flexmoe.errors import UsageError
from flexmoe.formats.packed_kv import pack, unpack
from policies import Policy
from tests.support import flash
from tests.support.engines import RESIDENT
from tests.support.exactness import DEVICES, Case, check
from tests.support.tiny import offload, transformers_greedy

pytestmark = pytest.mark.usefixtures("one_thread", "loads_cost_their_bytes")
_ROWS = 9
#: One number in some thousands lies so near to the middle of two steps that the last bit of float32 decides; a step moves a
#: logit by some 1e-4.
_MARGIN = 1e-3


def _rounded(x):
    """Keys or values ``[B, G, S, Dh]`` as an int8 cache gives them back."""
    return unpack(pack(x), torch.empty_like(x))


def _attention(module, query, key, value, *rest, **options):
    return sdpa_attention_forward(module, query, _rounded(key), _rounded(value), *rest, **options)


AttentionInterface.register("sdpa_int8", _attention)
AttentionMaskInterface.register("sdpa_int8", sdpa_mask)


@pytest.fixture(scope="module")
def rounded(tiny):
    """`rounded(name)`: a tiny checkpoint with a transformers model that rounds keys and values, and its greedy ids."""
    made = {}

    def call(name):
        if name not in made:
            plain = tiny(name)
            model = copy.deepcopy(plain.model)
            model.config._attn_implementation = "sdpa_int8"
            prompts = plain.prompts[:_ROWS]
            greedy = [transformers_greedy(model, prompt, eos_token_id=None) for prompt in prompts]
            made[name] = replace(plain, model=model, prompts=prompts, greedy=greedy)
        return made[name]

    return call


CASES = [
    Case(placement=(100, 0, 100, 0, 100, 0)),
    Case(placement=(100, 0, 0, 100, 100, 0), cpu_attention=100),
    Case(placement=(100, 0, 0, 100, 100, 0), cpu_attention=0, prefill_tokens=37),
    Case(placement=(100, 0, 0, 0, 100, 0)),
    Case(placement=(30, 30, 30, 30, 30, 30), batches=(3, 6), disturbed="sent-back"),
    Case(placement=(10, 20, 30, 30, 30, 30), native=False, variant="wide-heads"),
    Case(placement=(0, 100, 0, 50, 100, 0), variant="window", schedule="static", overlap=False),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [replace(case, compress_cache=True, eos=False) for case in CASES], ids=str)
def test_greedy_ids_are_those_of_rounded_keys_and_values(case, device, rounded, tmp_path, monkeypatch):
    check(rounded(case.variant), case, device, tmp_path, monkeypatch, margin=_MARGIN)


def test_a_plain_cache_gives_other_ids(rounded, tmp_path, monkeypatch):
    with pytest.raises(AssertionError, match="margins"):
        check(rounded("gqa-8-to-2"), replace(CASES[0], eos=False), "cpu", tmp_path, monkeypatch, margin=_MARGIN)


@pytest.mark.parametrize("flash_attention", [False, True], ids=["masks", "flash"])
def test_the_branches_of_cuda_give_the_same_ids(flash_attention, pretend, rounded, tmp_path, monkeypatch):
    op = flash.everywhere(monkeypatch) if flash_attention else None
    case = Case(placement=(30, 30, 30, 30, 30, 30), compress_cache=True, eos=False)
    check(rounded(case.variant), case, "cuda", tmp_path, monkeypatch, margin=_MARGIN)
    assert op is None or op.calls


def test_an_llm_takes_the_option_and_vllms_name_for_it(tiny, tmp_path):
    for options in ({"compress_cache": True}, {"kv_cache_dtype": "int8"}):
        with LLM(tiny().directory, policy=None, **offload(tmp_path), **options) as llm:
            assert llm.engine.config.policy.compress_cache and llm.engine.cache.gpu.dtype is torch.int16
    with LLM(tiny().directory, policy=None, **offload(tmp_path), kv_cache_dtype="auto") as llm:
        assert not llm.engine.config.policy.compress_cache


@pytest.mark.parametrize(
    "options, said",
    [
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype"),
        ({"kv_cache_dtype": "int8", "compress_cache": False}, "kv_cache_dtype"),
        ({"compress_cache": 3}, "compress_cache"),
    ],
    ids=str,
)
def test_an_llm_refuses_other_ways_to_store_kv(options, said, tiny, tmp_path):
    with pytest.raises(UsageError, match=said):
        LLM(tiny().directory, policy=None, **offload(tmp_path), **options)


def test_a_given_policy_already_says_whether_the_cache_is_compressed(tiny, tmp_path):
    policy = Policy.from_percent(RESIDENT, gpu_batch_size=2, num_gpu_batches=1, prompt_len=8, gen_len=8)
    with pytest.raises(UsageError, match="compress_cache"):
        LLM(tiny().directory, policy=policy, **offload(tmp_path), compress_cache=True)
