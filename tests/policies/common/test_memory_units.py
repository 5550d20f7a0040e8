"""Sizes as people read them."""

import pytest

from policies.common.memory_units import GIB, MIB, in_units


@pytest.mark.parametrize(
    "nbytes, told",
    [(5, "5 bytes"), (MIB, "1.0 MiB"), (99 * MIB, "99.0 MiB"), (GIB // 2, "0.500 GiB"), (3 * GIB, "3.000 GiB")],
)
def test_a_size_has_the_unit_that_suits_it(nbytes, told):
    assert in_units(nbytes) == told
