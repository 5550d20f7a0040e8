"""The configurations of packed weights: every format in every placement, many rows and few."""

from collections import Counter

import pytest

from cost_model import Hardware, ModelArch
from cost_model.model.packing import packed_as
from policies.policy import WEIGHT_FORMATS
from scripts.gpu.context import reduced_model
from scripts.make_checkpoint import SIZES
from scripts.validation.packed import FEW, PLACEMENTS, draw_packed

SECONDS = (0.01, 60.0)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    plain = ModelArch.from_dir(
        reduced_model(tmp_path_factory.mktemp("model"), SIZES["demo"] | {"num_hidden_layers": 2})
    )
    archs = {f"small-{format}": packed_as(plain, format) for format in WEIGHT_FORMATS}
    return draw_packed(archs, Hardware.preset("cpu"), 1, seconds=SECONDS)


def test_every_format_is_there_in_every_placement(found):
    assert [c.name for c in found] == [f"{format}-{place}" for format in WEIGHT_FORMATS for place in PLACEMENTS]
    assert all(c.model == f"small-{c.kind}" for c in found)
    for c in found:
        gpu, cpu = c.policy.w_gpu_percent, c.policy.w_cpu_percent
        on_disk, resident = gpu + cpu == 0, gpu == 100
        assert {"disk": on_disk, "resident": resident, "tiers": gpu and cpu and gpu + cpu < 100}[c.name.split("-")[1]]


def test_few_rows_and_many_both_schedules_and_two_caches_of_int8(found):
    few = [len(c.rows) <= FEW.requests[1] for c in found]
    assert sum(few) == 6 and all({*few[at : at + 3]} == {True, False} for at in range(0, 12, 3))
    assert set(Counter(c.policy.schedule for c in found)) == {"rolling", "static"}
    assert sum(c.policy.compress_cache for c in found) == 2
