"""The kernels of attention over pages: flash, masked, and native."""

import pytest

from flexmoe.kernels.masked_attention import masked_paged_attention
from flexmoe.kernels.native import library as native
from flexmoe.kernels.paged_attention import paged_attention
from flexmoe.kernels.varlen_attention import varlen_paged_attention

PATHS = [
    pytest.param(varlen_paged_attention, id="varlen"),
    pytest.param(masked_paged_attention, id="masked"),
    pytest.param(
        paged_attention,
        id="native",
        marks=pytest.mark.skipif(not native.available(), reason="no native library on this machine"),
    ),
]
