"""What a change of the model would give: shapes in fewer bytes."""

from dataclasses import fields

import pytest

from cost_model.model.arch import ModelArch
from cost_model.model.weight_units import units_of
from cost_model.planner.what_if import Packed

MIXTRAL = ModelArch.from_name("mixtral-8x7b")


def packed(**bits):
    return Packed(**{field.name: getattr(MIXTRAL, field.name) for field in fields(ModelArch)}, **bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_take_fewer_bytes_in_attention_and_experts_alone(bits):
    for whole, small in zip(units_of(MIXTRAL), units_of(packed(weight_bits=bits)), strict=True):
        assert whole.id == small.id
        is_packed = whole.kind in ("attention", "expert")
        assert small.stored_bytes == pytest.approx(whole.stored_bytes * (bits / 16 if is_packed else 1), abs=1)


def test_a_packed_kv_cache_takes_fewer_bytes_and_the_weights_do_not():
    small = packed(kv_bits=8)
    assert small.kv_bytes_per_token() * 2 == MIXTRAL.kv_bytes_per_token()
    assert [unit.stored_bytes for unit in units_of(small)] == [unit.stored_bytes for unit in units_of(MIXTRAL)]
