"""Compressed KV: stored as a plain reference says, and attended as its values are."""

import pytest
import torch

from cost_model.model.kv_bytes import kv_head_bytes
from flexmoe.formats.packed_kv import head_words, pack, unpack
from flexmoe.kernels.masked_attention import masked_paged_attention
from flexmoe.kernels.native import attention as native_attention
from flexmoe.kernels.native import library as native
from flexmoe.kernels.ragged import Ragged
from tests.support import flash
from tests.support.attention_paths import PATHS

PAGE = 16
#: (queries, past tokens) of a row: decode at borders of pages, verification, chunks, whole prompts.
MIXED = [(1, 0), (1, 15), (1, 16), (4, 31), (33, 0), (1, 250), (17, 64), (48, 100)]


def reference(head):
    """(numbers, scale) of one head, number by number."""
    largest = max(abs(x) for x in head)
    scale = torch.tensor(largest / 127, dtype=torch.float32).to(torch.bfloat16).item()
    numbers = [0 if scale == 0 else round(float(torch.tensor(x) / torch.tensor(scale))) for x in head]
    return [max(-127, min(127, n)) for n in numbers], scale


def values(words, size):
    return unpack(words, torch.empty(*words.shape[:-1], size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads, size", [(1, 1), (3, 7), (2, 16), (4, 33), (1, 128)])
def test_a_head_is_stored_as_its_rounded_numbers_and_one_scale(heads, size, dtype):
    generator = torch.Generator().manual_seed(size)
    x = (torch.randn(5, heads, size, generator=generator) * 10.0 ** torch.arange(-3, 2)[:, None, None]).to(dtype)
    words = pack(x)
    assert words.shape == (5, heads, head_words(size))
    assert words.element_size() * words.shape[-1] == kv_head_bytes(size, 2, compressed=True)
    raw, scales = words.view(torch.int8), words[..., -1:].view(torch.bfloat16)
    for t in range(5):
        for g in range(heads):
            numbers, scale = reference(x[t, g].tolist())
            assert raw[t, g, :size].tolist() == numbers and scales[t, g].item() == scale
    error = (values(words, size) - x.float()).abs()
    assert bool((error <= 0.51 * x.float().abs().amax(-1, keepdim=True) / 127 * (1 + 2**-8)).all())


def test_zeros_stay_zeros_and_the_extremes_of_float32_keep_their_size():
    x = torch.tensor([[0.0, 0.0], [3e38, -1e38], [1e-36, 2e-37], [1e-45, 0.0]]).unsqueeze(1)
    found = values(pack(x), 2)
    assert found[0].tolist() == [[0.0, 0.0]] and not found.isnan().any()
    torch.testing.assert_close(found[1:3], x[1:3], rtol=0.02, atol=0)
    assert abs(found[3]).max() <= 1e-44


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_head_with_a_value_that_is_not_finite_becomes_nan_and_the_others_do_not(bad):
    x = torch.ones(1, 3, 8)
    x[0, 1, 4] = bad
    found = values(pack(x), 8)
    assert found[0, 1].isnan().all() and not found[0, [0, 2]].isnan().any()


class Rows:
    """Ragged rows over compressed pools of permuted pages, and the same pools unpacked."""

    def __init__(self, *, heads, kv_heads, size, dtype, seed=0, rows=MIXED):
        generator = torch.Generator().manual_seed(seed)
        lengths = [q + past for q, past in rows]
        pages = [-(-n // PAGE) for n in lengths]
        order = torch.randperm(sum(pages), generator=generator).split(pages)
        x = torch.randn(2, sum(pages), PAGE, kv_heads, size, generator=generator).to(dtype)
        x[:, 3, 5] = 0  # a token of zeros
        self.pools = pack(x)
        self.plain = values(self.pools, size)
        self.q = torch.randn(sum(q for q, _ in rows), heads, size, generator=generator).to(dtype)
        self.ragged = Ragged.of([q for q, _ in rows], lengths, [table.tolist() for table in order])

    def expected(self, window, sinks=None):
        """Over the unpacked values in float32."""
        return masked_paged_attention(self.q.float(), *self.plain, self.ragged, window=window, sinks=sinks)


@pytest.mark.parametrize("attend", PATHS)
@pytest.mark.parametrize(
    "heads, kv_heads, size", [(8, 2, 64), (4, 4, 128), (6, 1, 16), (12, 1, 80), (6, 3, 33), (16, 2, 7)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compressed_pages_are_attended_as_their_values(attend, heads, kv_heads, size, dtype, monkeypatch):
    flash.pretended(monkeypatch)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    rows = Rows(heads=heads, kv_heads=kv_heads, size=size, dtype=dtype)
    for window in (None, 20):
        out = attend(rows.q, *rows.pools, rows.ragged, window=window)
        assert out.dtype == dtype
        torch.testing.assert_close(out.float(), rows.expected(window), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("attend", PATHS[:2])
@pytest.mark.parametrize("room", [64, 17])
def test_compressed_pages_are_unpacked_into_the_workspace(attend, room, monkeypatch):
    flash.pretended(monkeypatch)
    rows = Rows(heads=4, kv_heads=2, size=16, dtype=torch.float32)
    workspace = torch.full((2, room, PAGE, 2, 16), torch.nan)
    out = attend(rows.q, *rows.pools, rows.ragged, window=None, workspace=workspace)
    torch.testing.assert_close(out, rows.expected(None), atol=1e-5, rtol=1e-5)
    assert not workspace[:, 0].isnan().all()


@pytest.mark.skipif(not native.available(), reason="no native library on this machine")
@pytest.mark.parametrize("width", [7, 10])
def test_compressed_heads_of_another_size_are_refused(width):
    rows = Rows(heads=4, kv_heads=2, size=16, dtype=torch.float32)
    pool = rows.pools[0, ..., :1].expand(-1, -1, -1, width).contiguous()
    ragged = rows.ragged
    with pytest.raises(ValueError, match="are not"):
        native_attention.paged_attention(
            rows.q, pool, pool, ragged.tables, ragged.q_starts, ragged.contexts, scale=0.25
        )


def native_out(rows, pools, **options):
    ragged = rows.ragged
    arguments = ragged.tables, ragged.q_starts, ragged.contexts
    return native_attention.paged_attention(rows.q, *pools, *arguments, scale=rows.q.shape[-1] ** -0.5, **options)


def spread(*, heads, size):
    """Rows whose numbers are of unlike sizes: a number of a query 40 times the others, tokens with values 1,000 times those of others,
    and a first token that has most of the weight and nearly no value."""
    rows = Rows(heads=heads, kv_heads=1, size=size, dtype=torch.bfloat16)
    rows.q[..., 3] *= 40
    generator = torch.Generator().manual_seed(size)
    pools = rows.plain.clone()
    pools[1] *= 10.0 ** (3 * torch.rand(pools.shape[1:4], generator=generator)).unsqueeze(-1) / 100
    for table in rows.ragged.tables:
        pools[0, table[0], 0], pools[1, table[0], 0] = pools[0, table[0], 0].abs() * 2, 1e-3
    rows.pools = pack(pools)
    rows.plain = values(rows.pools, size)
    return rows


@pytest.mark.skipif(not native.available(), reason="no native library on this machine")
@pytest.mark.parametrize("heads", [1, 4, 7, 8, 12, 16])
@pytest.mark.parametrize("size", [64, 128, 33])
def test_numbers_of_unlike_sizes_keep_the_error_of_bf16(heads, size):
    rows = spread(heads=heads, size=size)
    expected = rows.expected(None)
    error = (native_out(rows, rows.pools).float() - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.max() < 1e-2
    plain = rows.plain.to(torch.bfloat16)
    of_plain = (native_out(rows, plain).float() - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.mean() < 1.1 * of_plain.mean()


@pytest.mark.skipif(not native.available(), reason="no native library on this machine")
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("heads", [8, 16])
def test_a_nan_reaches_the_outputs_of_its_head_and_no_other(where, heads):
    rows = Rows(heads=heads, kv_heads=2, size=64, dtype=torch.bfloat16)
    row, token = 5, int(rows.ragged.q_starts[5])  # decode of 251 tokens
    clean = native_out(rows, rows.pools)
    if where == "query":
        rows.q[token, 0, 9] = torch.nan
        wrong = [0]
    else:
        plain = rows.plain.clone()
        plain[int(where == "value"), rows.ragged.tables[row, 3], 4, 0, 9] = torch.nan
        rows.pools, wrong = pack(plain), range(heads // 2)
    found = native_out(rows, rows.pools)
    assert found[token, [*wrong]].isnan().all()
    found[token, [*wrong]] = clean[token, [*wrong]]
    torch.testing.assert_close(found, clean, atol=1e-2, rtol=1e-2)


@pytest.mark.skipif(not native.available(), reason="no native library on this machine")
@pytest.mark.parametrize("queries, heads, kv_heads", [(1, 8, 2), (1, 8, 1), (1, 3, 3), (2, 4, 2), (3, 2, 1), (4, 4, 2)])
@pytest.mark.parametrize("window", [0, 1, 20])
@pytest.mark.parametrize("size", [64, 24])
def test_contexts_at_the_ends_of_pages_and_chunks_are_attended_as_their_values(queries, heads, kv_heads, window, size):
    pasts = [0, 1, 2, 13, 14, 15, 16, 28, 30, 31, 32, 33, 47, 60, 62, 63, 64, 65, 95, 96, 97, 640]
    rows = [(queries, past) for past in pasts]
    case = Rows(heads=heads, kv_heads=kv_heads, size=size, dtype=torch.bfloat16, rows=rows)
    for threads in (1, 16):  # all heads of a row together, and each by itself
        out = native_out(case, case.pools, window=window, num_threads=threads)
        torch.testing.assert_close(out.float(), case.expected(window or None), atol=1e-2, rtol=1e-2)


@pytest.mark.skipif(not native.available(), reason="no native library on this machine")
@pytest.mark.parametrize("heads, kv_heads", [(8, 2), (8, 1), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sinks_count_beside_compressed_keys(heads, kv_heads, dtype):
    case, sinks = Rows(heads=heads, kv_heads=kv_heads, size=64, dtype=dtype), torch.linspace(-20, 8, heads)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    out = native_out(case, case.pools, sinks=sinks).float()
    torch.testing.assert_close(out, case.expected(None, sinks), atol=tolerance, rtol=tolerance)


@pytest.mark.skipif(not native.available(), reason="no native library on this machine")
@pytest.mark.parametrize("size", [256, 512, 528])
def test_the_largest_numbers_of_large_heads_do_not_overflow(size):
    """Every other key is the query's opposite, and all numbers are the largest that there are."""
    case = Rows(heads=8, kv_heads=2, size=size, dtype=torch.bfloat16, rows=[(1, 99), (2, 64)])
    pools = torch.ones(*case.plain.shape)
    pools[:, :, ::2] = -1
    case.q, case.pools = torch.ones_like(case.q), pack(pools)
    assert case.pools[..., :-1].view(torch.int8).abs().min() == 127
    torch.testing.assert_close(native_out(case, case.pools).float(), torch.ones(case.q.shape), atol=1e-2, rtol=0)


@pytest.mark.skipif(not native.available(), reason="no native library on this machine")
def test_neither_threads_nor_other_rows_change_a_bit():
    rows = Rows(heads=12, kv_heads=3, size=64, dtype=torch.bfloat16)
    whole = native_out(rows, rows.pools, num_threads=1)
    assert torch.equal(native_out(rows, rows.pools, num_threads=2), whole)
    assert torch.equal(native_out(rows, rows.pools, num_threads=5), whole)
    starts = rows.ragged.q_starts
    for row in (0, 3, 5):
        begin, end = starts[row : row + 2].tolist()
        alone = native_attention.paged_attention(
            rows.q[begin:end], *rows.pools, rows.ragged.tables[row : row + 1], torch.tensor([0, end - begin]).int(),
            rows.ragged.contexts[row : row + 1], scale=64**-0.5,
        )  # fmt: skip
        assert torch.equal(alone, whole[begin:end])
