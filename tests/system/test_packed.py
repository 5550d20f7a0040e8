"""Packed checkpoints give the ids of transformers with the values that their numbers stand for, wherever they live."""

import pytest

from tests.support.drawn import drawn
from tests.support.exactness import Case, check
from tests.support.packed import CONFIGS, FAMILIES, MORE_FAMILIES, packed, plain

pytestmark = pytest.mark.usefixtures("one_thread", "loads_cost_their_bytes")
#: Weights GPU/CPU, KV GPU/CPU, activations GPU/CPU; the rest is on disk.
PLACEMENTS = [(100, 0, 100, 0, 100, 0), (0, 100, 100, 0, 100, 0), (0, 0, 50, 0, 100, 0), (30, 30, 30, 30, 30, 30)]
PAIRS = [(family, form) for family in FAMILIES for form in CONFIGS]


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """Packed models by family and format, made when they are asked for."""
    root, known = tmp_path_factory.mktemp("packed"), {}

    def variant(family, form):
        if family not in known:
            known[family] = plain(family, root / family)
        if (family, form) not in known:
            known[family, form] = packed(known[family], form, root / f"{family}-{form}")
        return known[family, form]

    return variant


@pytest.mark.parametrize(
    "family, form, placement, staged",
    drawn(
        [(*pair, placement, staged) for pair in PAIRS for placement in PLACEMENTS for staged in (False, True)],
        pairs=[(2, 3)],
    ),
)
def test_ids_are_those_of_the_values(family, form, placement, staged, variants, tmp_path, monkeypatch):
    case = Case(placement=placement, batches=(2, 2), staged=staged, eos=False)
    check(variants(family, form), case, "cpu", tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "family, form, placement",
    [
        pytest.param(family, form, placement, marks=[] if at == 3 and form == "fp8" else pytest.mark.slow)
        for family in MORE_FAMILIES
        for form in ("fp8", "fp8-channel", "int4")
        for at, placement in enumerate(PLACEMENTS)
    ],
)
def test_ids_of_further_families_are_those_of_the_values(family, form, placement, variants, tmp_path, monkeypatch):
    case = Case(placement=placement, batches=(2, 2), eos=False)
    check(variants(family, form), case, "cpu", tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "form", [form if at % 4 == 2 else pytest.param(form, marks=pytest.mark.slow) for at, form in enumerate(CONFIGS)]
)
def test_few_rows_get_their_packed_experts_on_demand(form, variants, tmp_path, monkeypatch):
    case = Case(placement=(0, 50, 100, 0, 100, 0), batches=(1, 1), eos=False)
    metrics = check(variants("qwen3_moe", form), case, "cpu", tmp_path, monkeypatch)
    assert metrics["expert_cache"]["loads"] > 0
