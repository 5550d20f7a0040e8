import pytest

from scripts.benchmark import loads


def _groups(job):
    """Prompt tokens by max_tokens."""
    sums = {}
    for prompt, length in zip(job.prompts, job.max_tokens, strict=True):
        sums[length] = sums.get(length, 0) + len(prompt)
    return sums


@pytest.mark.parametrize("ragged", [False, True])
def test_every_group_of_a_staggered_job_holds_exactly_one_sweeps_pace(ragged):
    job = loads.staggered_job(sweeps=9, tokens_per_sweep=1000, prompt_len=120, vocab=512, seed=1, ragged=ragged)
    assert set(_groups(job)) == set(range(1, 10))
    assert set(_groups(job).values()) == {job.prefill_tokens}


def test_lengths_of_a_staggered_job_descend_and_its_sweeps_are_nearly_equal():
    job = loads.staggered_job(sweeps=9, tokens_per_sweep=1000, prompt_len=120, vocab=512, seed=1, ragged=True)
    assert list(job.max_tokens) == sorted(job.max_tokens, reverse=True)
    assert job.fewest_sweeps == 9
    group = job.rows // 9
    per_sweep = [job.prefill_tokens + group * k for k in range(9)]
    assert sum(per_sweep) == job.processed_tokens
    assert sum(per_sweep) / 9 == pytest.approx(1000, rel=0.01)
    assert max(per_sweep) - min(per_sweep) < 0.1 * 1000


def test_ragged_prompts_of_a_group_differ():
    job = loads.staggered_job(sweeps=2, tokens_per_sweep=1000, prompt_len=100, vocab=512, seed=1, ragged=True)
    lengths = [len(prompt) for prompt in job.prompts]
    assert max(lengths) > 1.3 * min(lengths)


def test_a_sized_job_has_the_asked_ratio_of_disk_to_compute():
    compute = loads.Compute(((75.0, 0.2), (750.0, 1.1)))
    for kind, aim in loads.AIM.items():
        job = loads.size_job(kind, disk_s=1.4, compute=compute, run_s=20, vocab=512, seed=0)
        disk_s = 1.4 * job.fewest_sweeps
        compute_s = compute.seconds(job)
        assert disk_s / compute_s == pytest.approx(aim, rel=0.05)
        assert loads.in_class(kind, disk_s, compute_s)
        assert max(disk_s, compute_s) <= 25


def test_a_measured_job_corrects_the_next_prediction():
    compute = loads.Compute(((10.0, 0.11), (1000.0, 1.1)))
    for rows in (2, 20, 60, 200):
        job = loads.equal_job(rows=rows, prompt_len=10, new_tokens=5, vocab=512, seed=0)
        compute = compute.corrected(job, 3.0 * rows)
        assert compute.seconds(job) == pytest.approx(3.0 * rows)
        assert compute.tokens(3.0 * rows / 5) == pytest.approx(job.processed_tokens / 5)


def test_sweeps_of_few_tokens_and_of_many_are_on_lines_of_their_own():
    compute = loads.Compute(((100.0, 0.5), (800.0, 2.0)))
    few = loads.staggered_job(sweeps=4, tokens_per_sweep=12, prompt_len=4, vocab=512, seed=0, ragged=False)
    compute = compute.corrected(few, 4 * 0.1)
    assert compute.tokens(0.1) == pytest.approx(few.processed_tokens / 4)
    assert compute.tokens(1.25) == pytest.approx(450)


def test_jobs_repeat_with_their_seed():
    one, two, other = (loads.ragged_job(rows=20, vocab=512, seed=seed) for seed in (7, 7, 8))
    assert one == two != other


def test_the_ragged_job_keeps_its_bounds():
    job = loads.ragged_job(rows=256, vocab=512, seed=0)
    lengths = [len(prompt) for prompt in job.prompts]
    assert 8 <= min(lengths) <= max(lengths) <= 512
    assert 1 <= min(job.max_tokens) <= max(job.max_tokens) <= 64
    assert min(map(min, job.prompts)) >= loads.FIRST_TOKEN


def test_tokens_are_counted_once():
    job = loads.equal_job(rows=3, prompt_len=10, new_tokens=4, vocab=512, seed=0)
    assert job.new_tokens == 12
    assert job.processed_tokens == 3 * (10 + 3)
    assert job.prefill_tokens == 30
    assert job.kv_tokens == 3 * loads.PAGE_TOKENS


@pytest.mark.parametrize(("total", "weights"), [(10, [1.0]), (10, [1.0] * 10), (1001, [0.5, 1.5, 1.0])])
def test_split_sums_to_the_total(total, weights):
    sizes = loads.split(total, weights)
    assert sum(sizes) == total
    assert min(sizes) >= 1


def test_split_refuses_what_cannot_be_split():
    with pytest.raises(ValueError, match="cannot be split"):
        loads.split(2, [1.0] * 3)


def test_classes_are_told_apart():
    assert loads.in_class("disk-bound", 2.0, 1.0)
    assert not loads.in_class("disk-bound", 1.9, 1.0)
    assert loads.in_class("compute-bound", 1.0, 2.0)
    assert not loads.in_class("compute-bound", 1.1, 2.0)
    assert loads.in_class("balanced", 0.8, 1.0)
    assert not loads.in_class("balanced", 1.3, 1.0)


def test_probes_agree_within_a_fifth():
    assert loads.probes_agree(1.0, 1.2)
    assert not loads.probes_agree(1.21, 1.0)


def test_the_limit_is_the_slower_side():
    assert loads.limit_fraction(9.0, 5.0, 10.0) == 0.9
    assert loads.limit_fraction(5.0, 8.0, 10.0) == 0.8


def test_batches_hold_every_row_once_and_sorting_saves_padding():
    job = loads.ragged_job(rows=100, vocab=512, seed=0)
    padded = {}
    for by_length in (False, True):
        cut = loads.batches(job, 16, by_length=by_length)
        assert sorted(i for batch in cut for i in batch) == list(range(100))
        assert max(map(len, cut)) == 16
        padded[by_length] = sum(loads.padded_tokens(job, batch) for batch in cut)
    assert job.prompt_tokens <= padded[True] < padded[False]


def test_a_batch_runs_to_its_longest_row():
    job = loads.ragged_job(rows=10, vocab=512, seed=0)
    assert loads.batch_steps(job, range(10)) == max(job.max_tokens) - 1


def test_a_sample_of_batches_is_spread_evenly():
    assert loads.spread(16, 4) == [2, 6, 10, 14]
    assert loads.spread(2, 4) == [0, 1]


def test_a_cost_line_never_starts_below_zero():
    assert loads.line_through((1.0, 3.0), (2.0, 5.0)) == (1.0, 2.0)
    fixed, each = loads.line_through((1.0, 1.0), (2.0, 3.0))
    assert fixed == 0.0
    assert each == 1.5
    assert loads.line_through((1.0, 3.0), (2.0, 2.0)) == (0.0, 3.0)


def test_fill_and_drain_are_no_steady_state():
    rows = [0, 5, 9, 9] + [10] * 20 + [7, 2]
    assert loads.steady_mean(rows, 2) == 10
    with pytest.raises(ValueError, match="no steady state"):
        loads.steady_mean(rows, 20)


def test_median_of_even_and_odd_counts():
    assert loads.median([3, 1, 2]) == 2
    assert loads.median([4, 1, 2, 3]) == 2.5
