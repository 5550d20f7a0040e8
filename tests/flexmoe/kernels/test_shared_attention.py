"""Attention of rows that share pages is that of rows by themselves, and reads what they share once."""

import random

import pytest
import torch

from flexmoe.formats.packed_kv import pack, unpack
from flexmoe.kernels.log_sums import Merged, attend_all
from flexmoe.kernels.masked_attention import masked_paged_attention
from flexmoe.kernels.native import library as native
from flexmoe.kernels.native.attention import paged_attention as native_attention
from flexmoe.kernels.paged_attention import paged_attention
from flexmoe.kernels.ragged import Ragged, SharedKeys, find_shared
from tests.support import flash
from tests.support.attention_paths import PATHS

PAGE = 16
needs_native = pytest.mark.skipif(not native.available(), reason="no native library on this machine")


@pytest.fixture(autouse=True)
def kernel_calls(monkeypatch):
    """Flash attention on the CPU; what counts its calls."""
    return flash.pretended(monkeypatch)


class Shared:
    """Rows of which some begin with the same pages.

    Args:
        rows: (pages in common with others as a tuple of (pages so far, number), tokens past those, queries) of each row.
    """

    def __init__(self, rows, *, heads=4, kv_heads=2, size=8, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        self.rows, self.group = rows, heads // kv_heads
        self.marks = [tuple((pages * PAGE, number) for pages, number in marks) for marks, *_ in rows]
        known, tables, count = {}, [], 0
        for marks, past, queries in rows:
            table, begin = [], 0
            for pages, number in marks:
                key = (*marks[: marks.index((pages, number)) + 1],)
                if key not in known:
                    known[key] = list(range(count, count + pages - begin))
                    count += pages - begin
                table += known[key]
                begin = pages
            own = -(-(past + queries) // PAGE)
            tables.append(table + list(range(count, count + own)))
            count += own
        order = torch.randperm(count, generator=generator)
        self.tables = [[int(order[page]) for page in table] for table in tables]
        pools = torch.randn(2, count, PAGE, kv_heads, size, generator=generator).to(dtype)
        self.k_pool, self.v_pool = pools[0].clone(), pools[1].clone()
        self.queries = [queries for *_, queries in rows]
        self.contexts = [(marks[-1][0] if marks else 0) * PAGE + past + queries for marks, past, queries in rows]
        self.q = torch.randn(sum(self.queries), heads, size, generator=generator).to(dtype)

    def ragged(self, shared=True):
        ragged = Ragged.of(self.queries, self.contexts, self.tables)
        ragged.shared = find_shared(self.marks) if shared else ()
        return ragged

    def reference(self, sinks=None):
        """By float64, row by row, as if nothing were shared."""
        out, at = [], 0
        for table, queries, context in zip(self.tables, self.queries, self.contexts):
            k, v = (
                pool[table].flatten(0, 1)[:context].double().repeat_interleave(self.group, 1)
                for pool in (self.k_pool, self.v_pool)
            )
            q = self.q[at : at + queries].double()
            at += queries
            scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
            hidden = torch.arange(context) > torch.arange(context - queries, context)[:, None]
            scores = scores.masked_fill(hidden, -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, queries, 1)], -1)
            out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :context], v))
        return torch.cat(out)


A, B = (2, 0), (5, 1)
#: (marks, own tokens, queries)
CASES = {
    "alike": [((A,), 5, 1)] * 3,
    "one row by itself": [((), 40, 1), ((A,), 3, 1), ((A,), 0, 1)],
    "nested": [((A,), 1, 1), ((A, B), 20, 1), ((A, B), 0, 1), ((A,), 7, 1)][::1],
    "diverging": [((A, B), 3, 1), ((A, B), 9, 1), ((A, (4, 2)), 0, 1), ((A, (4, 2)), 33, 1)],
    "two families": [((A,), 3, 1), ((A,), 8, 1), (((3, 7),), 0, 1), (((3, 7),), 1, 1)],
    "longer runs": [((A,), 0, 40), ((A,), 5, 1), ((A,), 16, 3)],
    "the only one of its family here": [((A,), 4, 1), ((), 3, 2), (((1, 9),), 2, 1)],
    "many": [((A, B), i % 30, 1 + (i % 7 == 0)) for i in range(40)],
}


def sorted_rows(rows):
    return sorted(rows, key=lambda row: tuple((pages * PAGE, number) for pages, number in row[0]))


@pytest.mark.parametrize("attend", PATHS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -2.0, 3.0, 0.0])])
def test_rows_that_share_pages_are_attended_as_by_themselves(attend, name, sinks):
    rows = Shared(sorted_rows(CASES[name]))
    out = attend(rows.q, rows.k_pool, rows.v_pool, rows.ragged(), window=None, sinks=sinks)
    torch.testing.assert_close(out.double(), rows.reference(sinks), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attend", PATHS)
@pytest.mark.parametrize("heads, kv_heads, size", [(1, 1, 8), (8, 1, 64), (6, 3, 24), (8, 8, 128)])
def test_random_families_agree_with_float64_in_any_shape(attend, heads, kv_heads, size):
    for seed in range(8):
        rng = random.Random(seed)
        marks = [(), (A,), (A, B), (A, (3, 2)), (A, B, (9, 3)), ((8, 4),)]
        rows = [(rng.choice(marks), rng.choice([0, 3, 16, 40]), rng.choice([1, 1, 1, 2, 30])) for _ in range(12)]
        case = Shared(sorted_rows(rows), heads=heads, kv_heads=kv_heads, size=size, seed=seed)
        out = attend(case.q, case.k_pool, case.v_pool, case.ragged(), window=None)
        torch.testing.assert_close(out.double(), case.reference(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("attend", PATHS)
def test_a_window_leaves_what_is_shared_alone(attend):
    rows = Shared(sorted_rows(CASES["alike"]))
    alone = attend(rows.q, rows.k_pool, rows.v_pool, rows.ragged(shared=False), window=20)
    assert torch.equal(attend(rows.q, rows.k_pool, rows.v_pool, rows.ragged(), window=20), alone)


@pytest.mark.parametrize("attend", PATHS)
def test_compressed_pages_are_shared_too(attend):
    rows = Shared(sorted_rows(CASES["nested"]), size=32)
    k_pool, v_pool = pack(rows.k_pool), pack(rows.v_pool)
    rows.k_pool, rows.v_pool = (unpack(pool, torch.empty_like(rows.k_pool)) for pool in (k_pool, v_pool))
    out = attend(rows.q, k_pool, v_pool, rows.ragged(), window=None)
    torch.testing.assert_close(out.double(), rows.reference(), atol=1e-5, rtol=1e-5)


@needs_native
@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_native_attention_shares_in_16_bits(dtype, error):
    rows = Shared(sorted_rows(CASES["many"]), heads=8, kv_heads=2, size=64, dtype=dtype)
    out = paged_attention(rows.q, rows.k_pool, rows.v_pool, rows.ragged(), window=None)
    torch.testing.assert_close(out.double(), rows.reference(), atol=error, rtol=error)


@needs_native
@pytest.mark.parametrize("size", [64, 24])
@pytest.mark.parametrize("heads", [8, 16, 6])
@pytest.mark.parametrize("sinks", [False, True])
def test_native_attention_shares_compressed_pages_with_bf16_queries(size, heads, sinks):
    rows = Shared(sorted_rows(CASES["many"]), heads=heads, kv_heads=2, size=size, dtype=torch.bfloat16)
    k_pool, v_pool = pack(rows.k_pool), pack(rows.v_pool)
    rows.k_pool, rows.v_pool = (unpack(pool, torch.empty(rows.k_pool.shape)) for pool in (k_pool, v_pool))
    scores = torch.linspace(-2, 3, heads) if sinks else None
    out = paged_attention(rows.q, k_pool, v_pool, rows.ragged(), window=None, sinks=scores)
    torch.testing.assert_close(out.double(), rows.reference(scores), atol=2e-2, rtol=2e-2)


@needs_native
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_result_of_a_row_depends_neither_on_threads_nor_on_how_many_share(threads):
    rows = Shared(sorted_rows(CASES["many"]), heads=8, kv_heads=2, size=64)
    ragged = rows.ragged()
    arguments = ragged.tables, ragged.q_starts, ragged.contexts
    whole = native_attention(
        rows.q, rows.k_pool, rows.v_pool, *arguments, scale=0.1, shared=ragged.shared_index(), num_threads=threads
    )
    few = Ragged.of(rows.queries[:2], rows.contexts[:2], rows.tables[:2])
    tokens, shared = int(few.q_starts[-1]), torch.tensor([[0, 2, 0, 5 * PAGE]], dtype=torch.int32)
    part = native_attention(
        rows.q[:tokens], rows.k_pool, rows.v_pool, few.tables, few.q_starts, few.contexts, scale=0.1, shared=shared
    )
    assert torch.equal(whole[:tokens], part)


@needs_native
@pytest.mark.parametrize(
    "shared",
    [
        [[0, 1, 0, 32], [0, 4, 32, 64]],
        [[0, 3, 16, 32]],
        [[0, 3, 0, 20]],
        [[0, 3, 0, 48]],
        [[2, 2, 0, 16]],
        [[0, 9, 0, 16]],
        [[-1, 3, 0, 16]],
        [[0, 3, 0, 16], [0, 2, 32, 32]],
    ],
)
def test_native_attention_refuses_what_is_not_shared(shared):
    rows = Shared(sorted_rows(CASES["alike"]))
    ragged = rows.ragged()
    with pytest.raises(ValueError, match="shared must list beginnings"):
        native_attention(
            rows.q, rows.k_pool, rows.v_pool, ragged.tables, ragged.q_starts, ragged.contexts, scale=1.0,
            shared=torch.tensor(shared, dtype=torch.int32),
        )  # fmt: skip


@needs_native
def test_native_attention_refuses_rows_with_other_pages():
    rows = Shared(sorted_rows(CASES["alike"]))
    rows.tables[2][1] = rows.tables[2][2]
    with pytest.raises(ValueError, match="in the same whole pages"):
        paged_attention(rows.q, rows.k_pool, rows.v_pool, rows.ragged(), window=None)


# What neighbours have in common.


@pytest.mark.parametrize(
    "marks, found",
    [
        ([(), ()], []),
        ([((16, 0),), ((16, 0),)], [(0, 2, 0, 16)]),
        ([((16, 0),), ((16, 1),)], []),
        ([(), ((16, 0),), ((16, 0), (32, 1)), ((16, 0), (32, 1))], [(1, 4, 0, 16), (2, 4, 16, 32)]),
        ([((16, 0), (32, 1)), ((16, 0), (32, 1))], [(0, 2, 0, 32)]),
        (
            [((16, 0), (32, 1), (64, 2)), ((16, 0), (32, 1), (64, 2)), ((16, 0), (32, 1))],
            [(0, 3, 0, 32), (0, 2, 32, 64)],
        ),
        ([((16, 0), (32, 1)), ((16, 0), (32, 2))], [(0, 2, 0, 16)]),
    ],
)
def test_neighbours_with_the_same_numbers_share(marks, found):
    assert find_shared(marks) == tuple(SharedKeys(*each) for each in found)


def test_shared_tokens_are_seen_once():
    ragged = Ragged.of([1, 1, 1], [40, 50, 60], [[0, 1, 2], [0, 1, 3, 4], [0, 1, 5, 6]])
    ragged.shared = (SharedKeys(0, 3, 0, 32),)
    assert ragged.seen_tokens() == 150 - 2 * 32 and ragged.common_pages(16).tolist() == [2, 2, 2]


def test_parts_of_the_keys_merge_to_all_of_them():
    torch.manual_seed(0)
    q, k, v = torch.randn(5, 4, 8), torch.randn(50, 2, 8) * 30, torch.randn(50, 2, 8)
    merged = Merged(q)
    for part in (slice(0, 1), slice(1, 33), slice(33, 50)):
        merged.add(slice(0, 5), *attend_all(q, k[part], v[part]))
    torch.testing.assert_close(merged.result(q, None, None), attend_all(q, k, v)[0], atol=1e-5, rtol=1e-4)


def test_masked_attention_keeps_scores_within_its_memory(monkeypatch):
    from flexmoe.kernels import log_sums

    rows = Shared(sorted_rows(CASES["many"]))
    expected = masked_paged_attention(rows.q, rows.k_pool, rows.v_pool, rows.ragged(), window=None)
    monkeypatch.setattr(log_sums, "_SCORE_BYTES", 1)
    out = masked_paged_attention(rows.q, rows.k_pool, rows.v_pool, rows.ragged(), window=None)
    torch.testing.assert_close(out, expected)
