"""A unit is known by a value; its name is for people, and no two units share one."""

import pytest

from policies.common.errors import UsageError
from policies.units import EMBEDDING, Unit, UnitId, expert_unit


def test_names_of_units_say_which_experts_they_hold():
    assert [str(expert_unit(3, experts)) for experts in (range(5, 6), range(8, 16))] == [
        "layers.3.expert.5",
        "layers.3.expert.8-15",
    ]
    for experts in (range(1), range(5, 6), range(8, 16)):
        assert expert_unit(3, experts).experts == experts


def test_other_units_are_named_by_their_layer_or_their_place_in_the_head():
    assert [str(unit) for unit in (EMBEDDING, UnitId("attention", 7), UnitId("head", 32, 2))] == [
        "embed",
        "layers.7.attention",
        "head.2",
    ]


def test_a_single_expert_is_the_unit_that_holds_it_alone():
    assert UnitId("expert", 3, 5) == expert_unit(3, range(5, 6)) != expert_unit(3, range(5, 7))
    assert len({UnitId("expert", 3, 5), expert_unit(3, range(5, 6)), UnitId("expert", 4, 5)}) == 2


def test_units_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="kind 'norm'"):
        UnitId("norm", 0)
    with pytest.raises(UsageError, match="stored_bytes of unit embed"):
        Unit(EMBEDDING, 0)
