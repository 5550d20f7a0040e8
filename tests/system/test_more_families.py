"""Float32 greedy ids and logits of the families in `tests.support.tiny_models` are transformers'; see `test_family_parity`."""

import random

import pytest
import torch

from tests.support.exactness import CHOICES, Case, check, make_llm
from tests.support.tiny_models import RECIPES

pytestmark = pytest.mark.usefixtures("one_thread", "loads_cost_their_bytes")

#: Rows of up to so many tokens in the quick tests; the slow ones have all.
SHORT = 100


def cases(count, seed):
    """Random ways to run; `CHOICES` has the values of every field."""
    rng = random.Random(seed)
    names = [name for name in CHOICES if name != "variant"]
    return [Case(variant="", **{name: rng.choice(CHOICES[name]) for name in names}) for _ in range(count)]


WAYS = [(name, case) for at, name in enumerate(RECIPES) for case in cases(6, 50 + at)]
#: One way of each family is quick.
QUICK = [(name, Case(variant="", kv_tokens=480)) for name in RECIPES if not name.endswith("-packed")]


@pytest.mark.parametrize("name, case", QUICK, ids=str)
def test_greedy_ids_of_a_family_equal_transformers(name, case, variants, tmp_path, monkeypatch):
    check(variants(name), case, "cpu", tmp_path, monkeypatch, longest=SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("name, case", WAYS, ids=str)
def test_greedy_ids_of_a_family_equal_transformers_wherever_things_live(name, case, variants, tmp_path, monkeypatch):
    check(variants(name), case, "cpu", tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_logits_of_every_position_are_transformers(name, variants, tmp_path, monkeypatch):
    variant = variants(name)
    llm = make_llm(variant, Case(placement=(0, 50, 0, 0, 0, 0), prefill_tokens=37), "cpu", tmp_path, monkeypatch)
    try:
        for prompt in variant.prompts[:8]:
            with torch.no_grad():
                wanted = variant.model(torch.tensor([prompt])).logits[0]
            torch.testing.assert_close(llm.logits(prompt), wanted, atol=2e-3, rtol=1e-4)
    finally:
        llm.close()
