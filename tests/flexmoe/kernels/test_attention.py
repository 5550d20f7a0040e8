"""Both attention paths agree with a plain float64 softmax, and read no slot that a query must not see."""

import random

import pytest
import torch

from flexmoe.kernels.native import library as native
from flexmoe.kernels.paged_attention import Ragged, buckets_of, paged_attention, torch_paged_attention

PAGE = 16
#: (queries, past tokens) of a row: decode, verification, chunks, whole prompts, and decodes of very unlike lengths.
MIXED = [(1, 0), (1, 250), (4, 31), (33, 0), (17, 64), (1, 12), (2, 15), (1, 31), (48, 100)]


class Rows:
    """Ragged rows over a pool of permuted pages; every slot that holds no token is NaN."""

    def __init__(self, rows, *, heads=8, kv_heads=2, size=16, dtype=torch.float32, seed=0):
        generator = torch.Generator().manual_seed(seed)
        lengths = [q + past for q, past in rows]
        pages = [-(-n // PAGE) for n in lengths]
        order = torch.randperm(sum(pages) + 3, generator=generator).tolist()
        self.k_pool = torch.full((len(order), PAGE, kv_heads, size), torch.nan, dtype=dtype)
        self.v_pool = self.k_pool.clone()
        self.runs, self.group = rows, heads // kv_heads
        self.k, self.v, tables = [], [], []
        for length, count in zip(lengths, pages):
            table, order = order[:count], order[count:]
            tables.append(table)
            for kept, pool in ((self.k, self.k_pool), (self.v, self.v_pool)):
                values = torch.randn(length, kv_heads, size, generator=generator).to(dtype)
                kept.append(values)
                for t in range(length):
                    pool[table[t // PAGE], t % PAGE] = values[t]
        self.q = torch.randn(sum(q for q, _ in rows), heads, size, generator=generator).to(dtype)
        self.ragged = Ragged.of([q for q, _ in rows], lengths, tables)

    def reference(self, window=None):
        out, start = [], 0
        for (count, past), k, v in zip(self.runs, self.k, self.v):
            q = self.q[start : start + count].double()
            start += count
            k, v = (x.double().repeat_interleave(self.group, dim=1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
            position, key = torch.arange(past, past + count)[:, None], torch.arange(past + count)
            hidden = key > position
            if window is not None:
                hidden |= key <= position - window
            out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
        return torch.cat(out)


PATHS = [
    pytest.param(torch_paged_attention, id="torch"),
    pytest.param(
        paged_attention,
        id="native",
        marks=pytest.mark.skipif(not native.available(), reason="no native library on this machine"),
    ),
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("attend", PATHS)
@pytest.mark.parametrize("window", [None, 1, 7, 16, 40, 1000])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_ragged_rows_agree_with_float64(attend, window, dtype):
    rows = Rows(MIXED, dtype=dtype)
    out = attend(rows.q, rows.k_pool, rows.v_pool, rows.ragged, window=window)
    assert out.dtype == dtype and not out.isnan().any()
    torch.testing.assert_close(out.double(), rows.reference(window), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("attend", PATHS)
@pytest.mark.parametrize("heads, kv_heads, size", [(4, 4, 8), (4, 1, 24), (6, 2, 32), (8, 2, 80)])
def test_every_grouping_and_head_size_agrees_with_float64(attend, heads, kv_heads, size):
    rows = Rows(MIXED, heads=heads, kv_heads=kv_heads, size=size, seed=size)
    out = attend(rows.q, rows.k_pool, rows.v_pool, rows.ragged, window=None)
    torch.testing.assert_close(out.double(), rows.reference(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attend", PATHS)
def test_random_mixtures_agree_with_float64(attend):
    for seed in range(15):
        rng = random.Random(seed)
        runs = [(rng.choice([1, 1, 1, 2, 5, 40]), rng.choice([0, 3, 16, 47, 200])) for _ in range(rng.randint(1, 9))]
        window = rng.choice([None, 5, 64])
        rows = Rows(runs, seed=seed)
        out = attend(rows.q, rows.k_pool, rows.v_pool, rows.ragged, window=window)
        torch.testing.assert_close(out.double(), rows.reference(window), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attend", PATHS)
def test_queries_that_are_a_slice_of_a_larger_tensor_are_attended(attend):
    rows = Rows(MIXED)
    larger = torch.cat([torch.full_like(rows.q[:3], torch.nan), rows.q, torch.full_like(rows.q[:2], torch.nan)])
    out = attend(larger[3 : 3 + len(rows.q)], rows.k_pool, rows.v_pool, rows.ragged, window=None)
    torch.testing.assert_close(out.double(), rows.reference(), atol=1e-5, rtol=1e-5)


def test_index_tensors_serve_every_layer_of_a_sweep():
    rows = Rows(MIXED)
    first = torch_paged_attention(rows.q, rows.k_pool, rows.v_pool, rows.ragged, window=None)
    plans = next(iter(rows.ragged._plans.values()))
    second = torch_paged_attention(rows.q, rows.k_pool, rows.v_pool, rows.ragged, window=None)
    assert next(iter(rows.ragged._plans.values())) is plans
    assert torch.equal(first, second)


def test_bucket_holds_equal_runs_of_like_contexts():
    ragged = Ragged.of([1, 1, 1, 5, 1, 5, 0], [10, 300, 40, 20, 310, 25, 9], [[0]] * 7)
    assert sorted(map(sorted, buckets_of(ragged))) == [[0, 2], [1, 4], [3, 5]]


def test_ragged_counts_the_context_tokens():
    ragged = Ragged.of([1, 3], [17, 3], [[4, 2], [1]])
    assert ragged.kv_tokens == 20
    assert ragged.q_starts.tolist() == [0, 1, 4]
    assert ragged.tables.tolist() == [[4, 2], [1, 0]]
