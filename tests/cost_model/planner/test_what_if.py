"""What a change of the model would give: shapes in fewer bytes."""

from dataclasses import fields, replace

import pytest

from cost_model.model.arch import ModelArch
from cost_model.model.packed_format import PackedFormat
from cost_model.model.weight_units import units_of
from cost_model.planner.what_if import Packed
from policies.units import UnitId

MIXTRAL = ModelArch.from_name("mixtral-8x7b")


def packed(**bits):
    return Packed(**{field.name: getattr(MIXTRAL, field.name) for field in fields(ModelArch)}, **bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_take_fewer_bytes_in_attention_and_experts_alone(bits):
    """A scale of 16 bits for each 128 weights comes on top; router and norms stay, and the head comes in smaller chunks."""
    small = replace(MIXTRAL, packed=PackedFormat(method="compressed-tensors", codec="integer", bits=bits, columns=128))
    whole, less = ({unit.id: unit.stored_bytes for unit in units_of(arch)} for arch in (MIXTRAL, small))
    part = (bits + 16 / 128) / 16
    for layer in (0, 31):
        expert = UnitId("expert", layer, 7)
        assert less[expert] == whole[expert] * part
        attention = UnitId("attention", layer)
        kept = 2 * (MIXTRAL.router_params + 2 * MIXTRAL.hidden)
        assert less[attention] - kept == (whole[attention] - kept) * part
    heads = [sum(size for unit, size in sizes.items() if unit.kind == "head") for sizes in (whole, less)]
    assert heads[0] == heads[1] and sum(less.values()) == small.total_bytes
    assert small.total_bytes == pytest.approx(part * MIXTRAL.total_bytes, rel=0.03)


def test_a_packed_kv_cache_takes_fewer_bytes_and_the_weights_do_not():
    small = packed(kv_bits=8)
    assert small.kv_bytes_per_token() * 2 == MIXTRAL.kv_bytes_per_token()
    assert [unit.stored_bytes for unit in units_of(small)] == [unit.stored_bytes for unit in units_of(MIXTRAL)]
