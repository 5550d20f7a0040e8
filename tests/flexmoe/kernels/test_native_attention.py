"""Native paged attention agrees with a float64 softmax, and reads nothing that a query must not see."""

import logging
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from flexmoe.kernels.native import library as native
from flexmoe.kernels.native import portable
from flexmoe.kernels.native.attention import paged_attention
from flexmoe.kernels.native.build import build, sources_digest

pytestmark = pytest.mark.skipif(not native.available(), reason="no native library on this machine")

RELATIVE_ERROR = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 8e-4}
# (queries, past tokens) of a row: decode, speculation, chunks and whole prefills, a row without queries
MIXED = [(1, 0), (1, 333), (3, 40), (0, 7), (17, 0), (64, 100), (1, 500), (300, 0), (2, 64), (17, 250)]


class Case:
    """Ragged rows over a pool of permuted pages; whatever a query must not see is NaN."""

    def __init__(self, rows, *, heads=8, kv_heads=2, size=64, page_tokens=16, dtype=torch.float32, window=0):
        generator = torch.Generator().manual_seed(len(rows) * 1000 + size + page_tokens)
        self.rows, self.window, self.scale, self.group = rows, window, size**-0.5, heads // kv_heads
        lengths = [queries + past for queries, past in rows]
        pages = [-(-length // page_tokens) for length in lengths]
        free = torch.randperm(sum(pages) + 3, generator=generator).int()
        pool = torch.full((len(free), 2, page_tokens, kv_heads, size), torch.nan, dtype=dtype)
        self.k_pool, self.v_pool = pool[:, 0], pool[:, 1]
        self.tables = torch.full((len(rows), max(pages) + 2), -1, dtype=torch.int32)
        self.k, self.v = [], []
        for row, (queries, past) in enumerate(rows):
            used, free = free[: pages[row]], free[pages[row] :]
            self.tables[row, : len(used)] = used
            for kept, target in ((self.k, self.k_pool), (self.v, self.v_pool)):
                values = torch.randn(lengths[row], kv_heads, size, generator=generator).to(dtype)
                kept.append(values)
                for t in range(lengths[row]):
                    target[used[t // page_tokens], t % page_tokens] = values[t]
            if window:
                unseen = max(0, past - window + 1) // page_tokens
                pool[self.tables[row, :unseen].long()] = torch.nan
                self.tables[row, :unseen] = -1
        starts = [0]
        for queries, _ in rows:
            starts.append(starts[-1] + queries)
        self.starts = torch.tensor(starts, dtype=torch.int32)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.q = torch.randn(starts[-1], heads, size, generator=generator).to(dtype)

    def run(self, **options):
        options = {"window": self.window, "scale": self.scale, "num_threads": 2} | options
        return paged_attention(self.q, self.k_pool, self.v_pool, self.tables, self.starts, self.lengths, **options)

    def expected(self, sinks=None):
        out = torch.empty(self.q.shape, dtype=torch.float64)
        for row, (queries, past) in enumerate(self.rows):
            at = slice(int(self.starts[row]), int(self.starts[row + 1]))
            k, v = (x[row].double().repeat_interleave(self.group, dim=1) for x in (self.k, self.v))
            scores = torch.einsum("qhd,khd->hqk", self.q[at].double(), k) * self.scale
            position, key = torch.arange(past, past + queries)[:, None], torch.arange(past + queries)
            hidden = (key > position) | ((key <= position - self.window) if self.window else False)
            scores = scores.masked_fill(hidden, -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, queries, 1)], dim=-1)
            out[at] = torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., : len(k)], v)
        return out


def assert_close(out, expected, relative_error=None):
    assert not out.isnan().any()
    error = (out.double() - expected).abs().max() / expected.abs().max()
    assert error < (relative_error or RELATIVE_ERROR[out.dtype]), f"relative error {error:.2e}"


@pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=str)
@pytest.mark.parametrize("size", [64, 128, 32, 80, 24, 7])
def test_every_storage_type_and_head_size_agrees_with_float64(dtype, size):
    case = Case(MIXED, size=size, dtype=dtype)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize(
    "heads, kv_heads", [(4, 1), (8, 2), (3, 3), (16, 4), (6, 2), (7, 1), (12, 1), (16, 1), (40, 1)]
)
@pytest.mark.parametrize("size", [64, 24])
def test_every_group_size_agrees_with_float64(heads, kv_heads, size):
    case = Case(MIXED, heads=heads, kv_heads=kv_heads, size=size)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("heads, kv_heads", [(3, 3), (8, 2), (6, 2), (14, 2), (8, 1), (12, 1), (16, 1), (40, 1)])
@pytest.mark.parametrize("size", [64, 24, 96])
def test_every_group_size_agrees_with_float64_in_bf16(heads, kv_heads, size):
    case = Case(MIXED, heads=heads, kv_heads=kv_heads, size=size, dtype=torch.bfloat16)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("queries", [1, 2, 4, 5, 20])
def test_contexts_at_the_ends_of_pages_and_chunks_agree_with_float64_in_bf16(queries):
    pasts = [0, 14, 15, 16, 30, 31, 32, 47, 60, 62, 63, 64, 65, 126, 127, 128, 129, 640]
    case = Case([(queries, past) for past in pasts], dtype=torch.bfloat16)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("heads", [8, 16, 32])
def test_scores_that_rise_along_the_row_keep_their_weights_in_bf16(heads):
    """The largest score so far changes in every chunk, by little and by much."""
    case = Case([(1, 700), (3, 400), (70, 300)], heads=heads, dtype=torch.bfloat16)
    for row in range(3):
        rise = torch.linspace(0.1, 6, len(case.k[row]))[:, None, None]
        case.k[row] = (case.k[row].abs() * rise).to(torch.bfloat16)
        for t, keys in enumerate(case.k[row]):
            case.k_pool[case.tables[row, t // 16], t % 16] = keys
    case.q = case.q.abs()
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("page_tokens", [1, 4, 16, 32, 5])
@pytest.mark.parametrize("window", [0, 1, 20, 70, 300, 10_000])
def test_window_and_page_size_agree_with_float64_and_read_no_unseen_page(page_tokens, window, dtype):
    case = Case(MIXED, page_tokens=page_tokens, window=window, dtype=dtype)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(16, 2), (8, 4), (6, 2), (7, 7), (40, 1)])
@pytest.mark.parametrize("window, size", [(0, 64), (20, 24), (128, 64)])
def test_sinks_count_in_the_softmax_of_their_heads(dtype, heads, kv_heads, window, size):
    case = Case(MIXED, heads=heads, kv_heads=kv_heads, size=size, window=window, dtype=dtype)
    sinks = torch.linspace(-30, 12, heads)
    assert_close(case.run(sinks=sinks), case.expected(sinks))


def test_sinks_of_another_shape_or_dtype_are_refused():
    case = Case(MIXED)
    for wrong in (torch.zeros(7), torch.zeros(8, dtype=torch.bfloat16), torch.zeros(16)[::2]):
        with pytest.raises(ValueError, match=r"sinks must be fp32 \[8\]"):
            case.run(sinks=wrong)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_many_decode_rows_agree_with_float64(count):
    case = Case([(1, 13 * i % 97) for i in range(count)], heads=8, kv_heads=4, dtype=torch.bfloat16)
    assert_close(case.run(), case.expected())


@pytest.mark.parametrize("dtype", RELATIVE_ERROR, ids=str)
def test_threads_do_not_change_a_bit(dtype):
    case = Case(MIXED * 3, dtype=dtype)
    assert torch.equal(case.run(num_threads=1), case.run(num_threads=2))
    assert torch.equal(case.run(num_threads=1), case.run(num_threads=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_rows_do_not_change_a_bit(dtype):
    case = Case(MIXED, dtype=dtype)
    together = case.run()
    for row in range(len(MIXED)):
        begin, end = case.starts[row : row + 2].tolist()
        alone = paged_attention(
            case.q[begin:end],
            case.k_pool,
            case.v_pool,
            case.tables[row : row + 1],
            torch.tensor([0, end - begin], dtype=torch.int32),
            case.lengths[row : row + 1],
            scale=case.scale,
        )
        assert torch.equal(alone, together[begin:end])


@pytest.mark.parametrize("window", [0, 50])
@pytest.mark.parametrize("chunk", [2, 7, 64, 100])
def test_chunked_prefill_is_close_to_whole_prefill(window, chunk):
    case = Case([(300, 0)], window=window)
    whole = case.run()
    for begin in range(0, 300, chunk):
        end = min(300, begin + chunk)
        part = paged_attention(
            case.q[begin:end],
            case.k_pool,
            case.v_pool,
            case.tables,
            torch.tensor([0, end - begin]).int(),
            torch.tensor([end]).int(),
            scale=case.scale,
            window=window,
        )
        torch.testing.assert_close(part, whole[begin:end], rtol=1e-5, atol=2e-6)


def test_strided_queries_and_a_given_output_are_used_in_place():
    case = Case(MIXED)
    expected = case.run()
    wide = torch.full((len(case.q), 5, *case.q.shape[1:]), torch.nan)
    wide[:, 2] = case.q
    case.q, out = wide[:, 2], torch.full(expected.shape, torch.nan)
    assert case.run(out=out) is out
    assert torch.equal(out, expected)


def test_large_scores_stay_finite():
    case = Case(MIXED)
    case.q *= 300
    assert_close(case.run(), case.expected(), 1e-3)  # fp32 scores of some thousands are off by 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [64, 7])
def test_storage_conversions_round_as_torch_does(dtype, size):
    """One key has the weight 1, so the output is its value exactly; two equal keys give their mean, rounded."""
    case = Case([(1, 0)], heads=1, kv_heads=1, size=size, dtype=dtype)
    values = torch.tensor([0.0, -0.0, 6e-8, -5.9e-5, 1e-3, 3.14159, -65504.0]).to(dtype).repeat(10)[:size]
    case.v_pool[case.tables[0, 0].long(), 0, 0] = values
    assert torch.equal(case.run()[0, 0], values)
    case = Case([(1, 1)], heads=1, kv_heads=1, size=size, dtype=dtype)
    page = case.tables[0, 0].long()
    case.k_pool[page, :2, 0] = 1.0
    pair = case.v_pool[page, :2, 0].float()
    assert torch.equal(case.run()[0, 0], (pair.sum(0) / 2).to(dtype))


def test_no_rows_and_no_queries_are_accepted():
    case = Case([(0, 5), (0, 9)])
    assert case.run().shape == (0, 8, 64)
    case.tables, case.starts, case.lengths = case.tables[:0], case.starts[:1], case.lengths[:0]
    assert case.run().shape == (0, 8, 64)


def broken(change):
    case = Case([(2, 10), (1, 30)])
    change(case)
    return case


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda c: setattr(c, "q", c.q.double()), "must share fp32"),
        (lambda c: setattr(c, "k_pool", c.k_pool.half()), "must share fp32"),
        (lambda c: setattr(c, "q", c.q.to("meta")), "CPU tensors"),
        (lambda c: setattr(c, "q", c.q[..., :32]), "are not"),
        (lambda c: setattr(c, "q", c.q[:, :7]), "evenly"),
        (lambda c: setattr(c, "q", c.q.transpose(0, 1).contiguous().transpose(0, 1)), "contiguous"),
        (lambda c: setattr(c, "v_pool", c.v_pool.contiguous()), "page stride"),
        (lambda c: setattr(c, "tables", c.tables.long()), "int32"),
        (lambda c: setattr(c, "starts", c.starts[:-1]), "page_tables"),
        (lambda c: setattr(c, "window", -1), "window"),
        (lambda c: c.starts.__setitem__(1, 9), "q_starts"),
        (lambda c: c.lengths.__setitem__(0, 1), "context_lens"),
        (lambda c: c.lengths.__setitem__(0, 1000), "context_lens"),
        (lambda c: c.tables.__setitem__((1, 1), -1), "page_tables"),
        (lambda c: c.tables.__setitem__((1, 1), 99), "page_tables"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_with_a_sentence(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        broken(change).run()


def test_a_process_keeps_one_openmp_runtime():
    Case(MIXED).run()
    maps = Path("/proc/self/maps").read_text()
    assert len(set(re.findall(r"/\S*lib(?:gomp|omp|iomp5)\b\S*", maps))) <= 1


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )


def test_pages_that_lie_apart_are_not_taken_for_one_run_of_keys():
    """The last of sixteen keys is where it would be if they lay side by side; those between are elsewhere."""
    case = Case([(1, 15)], page_tokens=4, dtype=torch.bfloat16)
    case.k_pool, case.v_pool = (torch.full((9, 4, 2, 64), torch.nan, dtype=torch.bfloat16) for _ in range(2))
    case.tables[0, :4] = torch.tensor([0, 6, 8, 3])
    for kept, pool in ((case.k, case.k_pool), (case.v, case.v_pool)):
        for t, values in enumerate(kept[0]):
            pool[case.tables[0, t // 4], t % 4] = values
    assert_close(case.run(), case.expected())


def test_it_can_be_disabled():
    result = run_python(
        "from flexmoe.kernels.native import library as native; print(native.available())", FLEXMOE_NATIVE="0"
    )
    assert result.stdout.strip() == "False" and not result.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the sets of instructions are those of x86-64")
def test_it_can_be_compiled_for_fewer_instructions(monkeypatch):
    case = Case(MIXED, dtype=torch.bfloat16)
    expected = case.run()
    for name in ("base", "avx2"):
        monkeypatch.setenv("FLEXMOE_NATIVE", name)
        native.load.cache_clear()
        try:
            assert native.load() is not None
            torch.testing.assert_close(case.run(), expected, rtol=2e-2, atol=6e-3)
        finally:
            native.load.cache_clear()


def test_unknown_instructions_are_one_warning_with_those_that_there_are():
    code = "from flexmoe.kernels.native import library as native; print(native.available(), native.available())"
    result = run_python(code, FLEXMOE_NATIVE="avx9")
    assert result.stdout.strip() == "False False"
    assert result.stderr.count("it may be 0 or one of base, avx2, avx512, bf16, amx") == 1


def test_a_missing_compiler_is_one_warning(tmp_path):
    code = "from flexmoe.kernels.native import library as native; print(native.available(), native.available())"
    result = run_python(code, PATH=str(tmp_path), CXX="", FLEXMOE_CACHE=str(tmp_path))
    assert result.stdout.strip() == "False False"
    assert result.stderr.count("no C++ compiler was found") == 1


def test_a_library_that_came_with_the_package_needs_no_compiler(tmp_path, monkeypatch):
    name = f"flexmoe-{sources_digest()}.so"
    for where, expected in ((name, True), ("flexmoe-of-other-sources.so", False)):
        directory = tmp_path / str(expected)
        directory.mkdir()
        (directory / where).write_bytes(build().read_bytes())
        monkeypatch.setattr(portable, "_DIRECTORY", directory)
        assert (portable.prebuilt() == directory / where) == expected
        with monkeypatch.context() as patch:
            patch.setenv("PATH", str(tmp_path))
            patch.setenv("CXX", "")
            native.load.cache_clear()
            assert (native.load() is not None) == expected
    native.load.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the sets of instructions are those of x86-64")
def test_one_library_for_all_cpus_gives_what_that_of_this_cpu_gives(tmp_path, monkeypatch):
    case = Case(MIXED, dtype=torch.bfloat16)
    expected = case.run()
    monkeypatch.setattr(portable, "_DIRECTORY", tmp_path)
    path = portable.build_portable()
    assert {"flexmoe_attention", "flexmoe_products", "flexmoe_norm"} <= set(portable.functions())
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    native.load.cache_clear()
    try:
        assert portable.prebuilt() == path and native.available()
        torch.testing.assert_close(case.run(), expected)
    finally:
        native.load.cache_clear()


def test_who_starts_together_compiles_once(tmp_path, monkeypatch):
    compiler, log = tmp_path / "c++", tmp_path / "log"
    compiler.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exit\necho once >> {log}\nsleep 0.2\n'
        'for last; do :; done\necho library > "$last"\n'
    )
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("FLEXMOE_CACHE", str(tmp_path / "cache"))
    with ThreadPoolExecutor() as pool:
        found = set(pool.map(lambda _: build(), range(3)))
    assert log.read_text() == "once\n" and found.pop().read_text() == "library\n" and not found


def test_a_cache_directory_open_to_others_is_refused(tmp_path, monkeypatch, caplog):
    tmp_path.chmod(0o777)
    monkeypatch.setenv("FLEXMOE_CACHE", str(tmp_path))
    native.load.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert native.load() is None
    native.load.cache_clear()
    assert "writable by everyone" in caplog.text


def test_plain_threads_serve_where_there_is_no_openmp_runtime():
    case, library = Case(MIXED), native.load()
    expected = case.run()
    library.flexmoe_set_parallel(None)
    try:
        assert torch.equal(case.run(), expected)
    finally:
        library.flexmoe_set_parallel(native.gomp_parallel())
