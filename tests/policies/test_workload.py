"""The job in a few numbers: what it may hold, and that its JSON gives it back."""

import pytest

from policies import Workload
from policies.common.errors import UsageError


def test_json_gives_the_workload_back():
    whole = Workload(prompt_len=8, gen_len=4, num_requests=12, rows_per_prompt=2.5, scored_tokens=3)
    assert Workload(**whole.to_json()) == whole
    assert "rows_per_prompt" not in Workload(prompt_len=8, gen_len=4).to_json()


@pytest.mark.parametrize("value", [0, 0.5, float("nan"), float("inf"), "2", True])
def test_a_prompt_has_at_least_one_row(value):
    with pytest.raises(UsageError, match="rows_per_prompt"):
        Workload(prompt_len=8, gen_len=4, num_requests=12, rows_per_prompt=value)
