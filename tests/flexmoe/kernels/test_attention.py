"""All kernels of attention agree with a plain float64 softmax, and read no slot that a query must not see."""

import logging
import random

import pytest
import torch

from cost_model.memory.memory_plan import mask_bytes
from flexmoe.kernels import masked_attention
from flexmoe.kernels import paged_attention as choice
from flexmoe.kernels.masked_attention import buckets_of, masked_paged_attention
from flexmoe.kernels.native import library as native
from flexmoe.kernels.paged_attention import paged_attention
from flexmoe.kernels.ragged import Ragged
from flexmoe.kernels.varlen_attention import gives_log_sums, varlen_paged_attention
from tests.support import flash
from tests.support.allocations import Allocations
from tests.support.attention_paths import PATHS

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

    def reference(self, window=None, sinks=None):
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
            scores = scores.masked_fill(hidden, -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, count, 1)], dim=-1)
            out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(k)], v))
        return torch.cat(out)


@pytest.fixture(autouse=True)
def op(monkeypatch):
    """Flash attention on the CPU."""
    return flash.pretended(monkeypatch)


#: By how many pages K and V are copied at a time: all that there are, and no more than the longest row has.
ROOMS = [pytest.param(None, id="made-when-absent"), pytest.param(64, id="for-all"), pytest.param(17, id="for-a-row")]
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
@pytest.mark.parametrize("window", [None, 7, 40])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_sinks_count_in_the_softmax_of_their_heads(attend, window, dtype):
    rows = Rows(MIXED, dtype=dtype)
    sinks = torch.linspace(-4, 4, 8).to(dtype)
    out = attend(rows.q, rows.k_pool, rows.v_pool, rows.ragged, window=window, sinks=sinks)
    want = rows.reference(window, sinks)
    assert out.dtype == dtype and (want - rows.reference(window)).abs().max() > 0.1
    torch.testing.assert_close(out.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_flash_attention_serves_sinks_only_where_its_sums_are_right(op, monkeypatch):
    device, dtype = torch.device("cpu"), torch.bfloat16
    assert gives_log_sums.__wrapped__(device, dtype)
    right = op._returned
    monkeypatch.setattr(op, "_returned", lambda *made: (right(*made)[0], right(*made)[1].mT.contiguous()))
    assert not gives_log_sums.__wrapped__(device, dtype)
    monkeypatch.setattr(choice, "has_flash_attention", lambda device: True)
    monkeypatch.setattr(choice, "gives_log_sums", lambda device, dtype: False)
    cuda = torch.device("cuda")
    assert choice._chosen(cuda, dtype, 64, False, False).name == "varlen"
    kernel = choice._chosen(cuda, dtype, 64, True, False)
    assert kernel.name == "masked" and "sinks" in kernel.reason


@pytest.mark.parametrize("attend", PATHS)
@pytest.mark.parametrize("window, pages", [(1, 1), (16, 2), (17, 2), (18, 3), (40, 4)])
def test_rows_that_decode_read_the_pages_of_their_window_alone(attend, window, pages):
    rows = Rows([(1, past) for past in range(200, 232)], size=8)
    for table, length in zip(rows.ragged.tables, rows.ragged.contexts.tolist()):
        unseen = (length - window) // PAGE
        rows.k_pool[table[:unseen].long()] = rows.v_pool[table[:unseen].long()] = torch.nan
        table[:unseen] = -1
    out = attend(rows.q, rows.k_pool, rows.v_pool, rows.ragged, window=window, workspace=workspace_of(rows, pages))
    torch.testing.assert_close(out.double(), rows.reference(window), atol=1e-5, rtol=1e-5)


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


@pytest.mark.parametrize("attend", [varlen_paged_attention, masked_paged_attention])
def test_index_tensors_serve_every_layer_of_a_sweep(attend):
    rows = Rows(MIXED)
    first = attend(rows.q, rows.k_pool, rows.v_pool, rows.ragged, window=None)
    (plan,) = rows.ragged.plans.values()
    calls = plan.calls
    second = attend(rows.q, rows.k_pool, rows.v_pool, rows.ragged, window=None)
    assert list(rows.ragged.plans.values()) == [plan] and plan.calls is calls
    assert torch.equal(first, second)


@pytest.mark.parametrize("name, attend", [("varlen", varlen_paged_attention), ("masked", masked_paged_attention)])
def test_a_plan_made_before_the_first_layer_is_the_one_that_is_used(name, attend):
    rows = Rows(MIXED)
    kernel = choice.Kernel(name, "a test")
    about = {"heads": 8, "shared": 4, "page_tokens": PAGE, "room": 64, "window": 40}
    plan = choice.plan_attention(rows.ragged, kernel, torch.float32, **about)
    assert plan.packed.dtype == torch.int32 and plan.calls is None
    attend(rows.q, rows.k_pool, rows.v_pool, rows.ragged, window=40, workspace=workspace_of(rows, 64))
    assert list(rows.ragged.plans.values()) == [plan] and plan.calls


def test_bucket_holds_equal_runs_of_like_contexts():
    ragged = Ragged.of([1, 1, 1, 5, 1, 5, 0], [10, 300, 40, 20, 310, 25, 9], [[0]] * 7)
    assert sorted(map(sorted, buckets_of(ragged))) == [[0, 2], [1, 4], [3, 5]]


def test_ragged_counts_the_context_tokens():
    ragged = Ragged.of([1, 3], [17, 3], [[4, 2], [1]])
    assert (ragged.seen_tokens(), ragged.seen_tokens(4), ragged.seen_tokens(1)) == (20, 4 + 3, 1 + 3)
    assert ragged.q_starts.tolist() == [0, 1, 4]
    assert ragged.tables.tolist() == [[4, 2], [1, 0]]


def workspace_of(rows, room):
    return None if room is None else torch.full((2, room, *rows.k_pool.shape[1:]), torch.nan, dtype=rows.k_pool.dtype)


@pytest.mark.parametrize("attend", [varlen_paged_attention, masked_paged_attention])
@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("window", [None, 16, 40])
def test_copies_of_keys_and_values_fit_any_workspace_that_takes_the_longest_row(attend, room, window):
    rows = Rows(MIXED)
    out = attend(rows.q, rows.k_pool, rows.v_pool, rows.ragged, window=window, workspace=workspace_of(rows, room))
    torch.testing.assert_close(out.double(), rows.reference(window), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attend", [varlen_paged_attention, masked_paged_attention])
def test_the_result_goes_where_the_caller_wants_it(attend):
    rows = Rows(MIXED)
    out = torch.full_like(rows.q, torch.nan)
    assert attend(rows.q, rows.k_pool, rows.v_pool, rows.ragged, window=None, out=out) is out
    torch.testing.assert_close(out.double(), rows.reference(), atol=1e-5, rtol=1e-5)


def test_many_rows_that_decode_are_one_call(op):
    rows = Rows([(1, past) for past in range(0, 300, 3)])
    out = varlen_paged_attention(rows.q, rows.k_pool, rows.v_pool, rows.ragged, window=None)
    torch.testing.assert_close(out.double(), rows.reference(), atol=1e-5, rtol=1e-5)
    assert [(most, count) for most, count, _ in op.calls] == [(1, 100)]


def test_rows_that_decode_are_attended_apart_from_longer_runs(op):
    rows = Rows(MIXED)
    varlen_paged_attention(rows.q, rows.k_pool, rows.v_pool, rows.ragged, window=None)
    assert [(most, count) for most, count, _ in op.calls] == [(1, 4), (48, 5)]


def test_no_more_is_copied_than_the_workspace_takes(op):
    rows = Rows([(1, past) for past in range(10, 200, 10)])
    varlen_paged_attention(rows.q, rows.k_pool, rows.v_pool, rows.ragged, window=None, workspace=workspace_of(rows, 30))
    assert len(op.calls) > 3 and max(keys for _, _, keys in op.calls) <= 30 * PAGE


def test_pages_that_a_window_hides_are_not_copied(op):
    rows = Rows([(1, 999), (1, 500), (1, 3)])
    out = varlen_paged_attention(rows.q, rows.k_pool, rows.v_pool, rows.ragged, window=32)
    torch.testing.assert_close(out.double(), rows.reference(32), atol=1e-5, rtol=1e-5)
    assert [keys for _, _, keys in op.calls] == [PAGE * (3 + 3 + 1)]


def test_rows_that_lie_one_after_another_are_attended_where_they_are(op):
    rows = Rows([(1, 40), (1, 7), (1, 90)])
    order = torch.cat([row[: -(-int(n) // PAGE)] for row, n in zip(rows.ragged.tables, rows.ragged.contexts)]).long()
    k_pool, v_pool = rows.k_pool[order], rows.v_pool[order]
    tables, first = [], 0
    for context in rows.ragged.contexts.tolist():
        tables.append(list(range(first, first := first + -(-context // PAGE))))
    ragged = Ragged.of([1, 1, 1], rows.ragged.contexts.tolist(), tables)
    refused = torch.empty(0)  # a copy into it would raise
    out = varlen_paged_attention(rows.q, k_pool, v_pool, ragged, window=None, workspace=refused.view(2, 0, 0))
    torch.testing.assert_close(out.double(), rows.reference(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [1, 3000, 40_000])
@pytest.mark.parametrize("window", [None, 16, 40])
def test_masked_attention_is_cut_into_pieces_that_keep_its_masks_within_their_memory(budget, window, monkeypatch):
    monkeypatch.setattr(masked_attention, "MASK_BYTES", budget)
    rows = Rows(MIXED)
    out = masked_paged_attention(rows.q, rows.k_pool, rows.v_pool, rows.ragged, window=window)
    torch.testing.assert_close(out.double(), rows.reference(window), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("runs", [MIXED, [(200, 0), (180, 60)], [(1, 900)] * 5, [(100, 2000)]], ids=str)
@pytest.mark.parametrize("budget", [60_000, 500_000, 32 << 20])
def test_masks_take_no_more_than_is_planned_for_them(runs, window, budget, monkeypatch):
    monkeypatch.setattr(masked_attention, "MASK_BYTES", budget)
    rows = Rows(runs, heads=8, kv_heads=2, size=8)
    longest = max(sum(run) for run in runs)
    workspace = workspace_of(rows, -(-longest // PAGE))
    masked_paged_attention(rows.q, rows.k_pool, rows.v_pool, rows.ragged, window=window, workspace=workspace)  # indices
    with Allocations() as counted:
        masked_paged_attention(rows.q, rows.k_pool, rows.v_pool, rows.ragged, window=window, workspace=workspace)
    queries = 8 * rows.q.nbytes  # the plan's workspace has them: queries in the kernel's order, the result, twice
    least = -(-longest // PAGE) * PAGE * mask_bytes(4, 4)
    assert counted.peak <= max(budget, least) + queries


KERNELS = [
    ("cpu", torch.float32, 128, None, "native", "streams the pages in place"),
    ("cuda", torch.bfloat16, 128, (8, 0), "varlen", "one call"),
    ("cuda", torch.float16, 64, (8, 9), "varlen", "one call"),
    ("cuda", torch.bfloat16, 128, (9, 0), "varlen", "one call"),
    ("cuda", torch.float16, 128, (7, 5), "masked", "compute capability 8.0"),
    ("cuda", torch.float32, 128, (9, 0), "masked", "16 bits only"),
    ("cuda", torch.bfloat16, 512, (9, 0), "masked", "no heads of 512"),
    ("cuda", torch.bfloat16, 20, (9, 0), "masked", "no heads of 20"),
]


@pytest.mark.parametrize("device, dtype, size, capability, name, reason", KERNELS, ids=str)
def test_the_kernel_follows_from_device_and_numbers_and_is_logged_once(
    device, dtype, size, capability, name, reason, monkeypatch, caplog
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(native, "available", lambda: True)
    choice._logged.cache_clear()
    caplog.set_level(logging.INFO, "flexmoe")
    kernels = [choice.choose_kernel(torch.device(device), dtype, size) for _ in range(2)]
    choice._logged.cache_clear()
    assert {kernel.name for kernel in kernels} == {name} and reason in kernels[0].reason
    assert [name in message and reason in message for message in caplog.messages] == [True]


def test_without_the_native_library_the_cpu_takes_masks(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    assert choice.choose_kernel(torch.device("cpu"), torch.float32, 64).name == "masked"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 16, 40])
def test_the_chosen_kernel_agrees_with_float64_on_cuda(dtype, window, monkeypatch):
    monkeypatch.undo()
    for seed in range(5):
        rows = Rows(MIXED, heads=32, kv_heads=8, size=128, dtype=dtype, seed=seed)
        q, k, v = (x.cuda() for x in (rows.q, rows.k_pool, rows.v_pool))
        out = paged_attention(q, k, v, rows.ragged, window=window)
        tolerance = {torch.float32: 1e-4}.get(dtype, 2e-2)
        torch.testing.assert_close(out.double().cpu(), rows.reference(window), atol=tolerance, rtol=tolerance)
