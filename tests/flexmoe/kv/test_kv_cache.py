"""Ragged KV in three tiers: pages are counted exactly, shared by reference, and come back as they were written."""

import errno
import os
import random
import threading
import time
from dataclasses import replace

import pytest
import torch

from cost_model.model.arch import LayerGroup
from flexmoe.errors import StorageError
from flexmoe.kv.batch import Block, Run
from flexmoe.kv.cache import KVCache, KVExhausted, PageAllocator
from flexmoe.kv.transfers import KVLanes
from flexmoe.system.device import Device
from policies.admission.row_state import AttentionMode
from policies.common.memory_units import SYSTEM_PAGE_BYTES
from tests.support.kv_sweeps import HEADS, LAYERS, SHAPE, SIZE, TIER, Bench, History
from tests.support.pretend_cuda import Event, PretendCuda

B = 16
KINDS = ["gpu", "fetch", "cpu", "disk"]
TIERS = ["gpu", "cpu", "disk"]
TOKEN_BYTES = SHAPE.token_bytes


def cache_of(tmp_path, gpu=0, cpu=0, disk=0, tails=4):
    return KVCache(Device("cpu"), SHAPE, {"gpu": gpu, "cpu": cpu, "disk": disk}, tails if disk else 0, tmp_path)


def free(cache, tier):
    return cache.free(tier)


def filled(cache, tier, tokens):
    row = cache.open(tier)
    cache.reserve(row, tokens)
    row.length = tokens
    return row


@pytest.fixture
def bench(tmp_path):
    before, made = set(threading.enumerate()), []

    def make(pages, **options):
        made.append(Bench(tmp_path, pages, **options))
        return made[-1]

    yield make
    for b in made:
        b.close()
    assert set(threading.enumerate()) == before, "a thread is left"
    assert list(tmp_path.iterdir()) == [], "a killed run would leave the file behind"


# Pages.


def test_a_row_gets_neighbouring_pages_and_the_next_one_those_that_it_leaves():
    allocator = PageAllocator(12)
    first, second = [allocator.take()], [allocator.take()]
    for _ in range(3):
        second.append(allocator.take(after=second[-1]))
    assert second == list(range(second[0], second[0] + 4))
    first.append(allocator.take(after=first[-1]))  # its neighbour is taken
    assert first[1] not in second
    for page in reversed(second):
        allocator.drop(page)
    third = [allocator.take()]
    for _ in range(3):
        third.append(allocator.take(after=third[-1]))
    assert third == second


def test_allocator_hands_out_every_page_once_and_takes_it_back():
    allocator = PageAllocator(5)
    taken = [allocator.take() for _ in range(5)]
    assert sorted(taken) == list(range(5)) and allocator.free == 0
    with pytest.raises(KVExhausted):
        allocator.take()
    allocator.drop(taken[2])
    assert allocator.take() == taken[2]


def test_shared_page_is_free_only_after_its_last_holder():
    allocator = PageAllocator(1)
    page = allocator.take()
    allocator.share(page)
    allocator.drop(page)
    assert allocator.free == 0
    allocator.drop(page)
    assert allocator.free == 1


@pytest.mark.parametrize("tier", TIERS)
def test_row_holds_the_pages_that_its_tokens_need(tmp_path, tier):
    cache = cache_of(tmp_path, **{tier: 10})
    row = cache.open(tier)
    for tokens, pages in [(1, 1), (14, 1), (1, 1), (1, 2), (30, 3), (17, 4)]:
        cache.reserve(row, tokens)
        row.length += tokens
        assert len(row.pages) == pages == cache.layout.covering(row.length)
        assert free(cache, tier) == 10 - pages
    cache.close(row)
    assert free(cache, tier) == 10 and row.pages == [] and row.length == 0


@pytest.mark.parametrize("tier", TIERS)
def test_reserve_takes_all_or_nothing(tmp_path, tier):
    cache = cache_of(tmp_path, **{tier: 4})
    row, other = filled(cache, tier, 20), filled(cache, tier, 1)
    held = list(row.pages)
    with pytest.raises(KVExhausted):
        cache.reserve(row, 12 + 17)
    assert row.pages == held and free(cache, tier) == 1
    cache.reserve(row, 12 + 16)
    assert len(row.pages) == 3 and free(cache, tier) == 0
    cache.close(other)
    assert free(cache, tier) == 1


@pytest.mark.parametrize("tier", ["gpu", "cpu"])
def test_truncate_frees_the_pages_that_only_the_cut_tokens_needed(tmp_path, tier):
    cache = cache_of(tmp_path, **{tier: 6})
    row = filled(cache, tier, 70)
    for length, pages in [(70, 5), (65, 5), (64, 4), (33, 3), (1, 1), (0, 0)]:
        cache.truncate(row, length)
        assert (row.length, len(row.pages), free(cache, tier)) == (length, pages, 6 - pages)
    for wrong in (1, -1):
        with pytest.raises(ValueError, match="cannot truncate a row of 0 tokens"):
            cache.truncate(row, wrong)


def test_disk_row_is_cut_in_its_tail_or_at_a_page_boundary_only(tmp_path):
    cache = cache_of(tmp_path, disk=6)
    row = filled(cache, "disk", 40)
    cache.truncate(row, 33)
    for inside in (31, 17, 1):
        with pytest.raises(ValueError, match="page boundary"):
            cache.truncate(row, inside)
    cache.truncate(row, 32)
    with pytest.raises(ValueError, match="page boundary"):
        cache.truncate(row, 20)
    cache.truncate(row, 16)
    cache.truncate(row, 0)
    assert free(cache, "disk") == 6


def test_disk_tier_takes_as_many_rows_as_it_has_tails(tmp_path):
    cache = cache_of(tmp_path, disk=20, tails=2)
    rows = [cache.open("disk") for _ in range(2)]
    assert cache.free_tails == 0
    with pytest.raises(KVExhausted):
        cache.open("disk")
    cache.close(rows[0])
    assert cache.free_tails == 1 and cache.open("disk").tail >= 0


@pytest.mark.parametrize("tier", TIERS)
def test_fork_shares_full_pages_and_copies_the_growing_one(tmp_path, tier):
    cache = cache_of(tmp_path, **{tier: 8})
    row = filled(cache, tier, 2 * B + 3)
    pool = {"gpu": cache.gpu, "cpu": cache.cpu, "disk": cache.tail}[tier]
    slot = row.tail if tier == "disk" else row.pages[2]
    pool[:, :, slot] = torch.randn(pool[:, :, slot].shape)
    twin = cache.fork(row)
    assert twin.pages[:2] == row.pages[:2] and twin.pages[2] != row.pages[2]
    assert twin.length == row.length and free(cache, tier) == 8 - 4
    copy = twin.tail if tier == "disk" else twin.pages[2]
    assert copy != slot and torch.equal(pool[:, :, copy], pool[:, :, slot])
    cache.close(row)
    assert free(cache, tier) == 8 - 3, "the shared pages stay while the twin holds them"
    cache.close(twin)
    assert free(cache, tier) == 8


@pytest.mark.parametrize("tier", TIERS)
def test_fork_at_a_page_boundary_takes_no_block(tmp_path, tier):
    cache = cache_of(tmp_path, **{tier: 2})
    row = filled(cache, tier, 2 * B)
    twin = cache.fork(row)
    assert twin.pages == row.pages and free(cache, tier) == 0
    with pytest.raises(KVExhausted):
        cache.reserve(twin, 1)


@pytest.mark.parametrize("tier", TIERS)
def test_fork_without_room_changes_nothing(tmp_path, tier):
    cache = cache_of(tmp_path, **{tier: 2})
    row = filled(cache, tier, B + 1)
    tails = cache.free_tails
    with pytest.raises(KVExhausted):
        cache.fork(row)
    assert cache.free_tails == tails
    cache.close(row)
    assert free(cache, tier) == 2


@pytest.mark.parametrize("tier", TIERS)
def test_shared_beginning_takes_nothing_and_outlives_the_row_it_came_from(tmp_path, tier):
    cache = cache_of(tmp_path, **{tier: 8}, tails=2)
    row = filled(cache, tier, 2 * B + 3)
    tails = cache.free_tails
    beginning = cache.share(row, 2 * B)
    assert (beginning.pages, beginning.length) == (row.pages[:2], 2 * B)
    assert (free(cache, tier), cache.free_tails) == (8 - 3, tails)
    cache.close(row)
    assert free(cache, tier) == 8 - 2
    twins = [cache.fork(beginning)]
    cache.reserve(twins[0], 1)
    assert twins[0].pages[:2] == beginning.pages and free(cache, tier) == 8 - 3
    cache.close(beginning)
    assert free(cache, tier) == 8 - 3, "the shared pages stay while the twin holds them"
    cache.close(twins[0])
    assert free(cache, tier) == 8 and cache.free_tails == cache.tails


def test_row_that_shares_a_page_is_not_cut_inside_it(tmp_path):
    cache = cache_of(tmp_path, gpu=6)
    row = filled(cache, "gpu", 2 * B)
    twin = cache.fork(row)
    with pytest.raises(ValueError, match="shared"):
        cache.truncate(twin, B + 3)  # the next token would be written into the other row's page
    cache.truncate(twin, B)
    assert twin.pages == row.pages[:1]
    cache.truncate(row, B + 3)  # nobody shares this one any more
    assert row.length == B + 3


def test_many_random_rows_never_leak_a_block(tmp_path):
    cache, rng, rows = cache_of(tmp_path, gpu=30, cpu=30, disk=30, tails=5), random.Random(4), []
    for _ in range(2000):
        action = rng.choice(["open", "grow", "grow", "cut", "fork", "close"])
        row = rng.choice(rows) if rows else None
        try:
            if action == "open" or row is None:
                rows.append(cache.open(rng.choice(TIERS)))
            elif action == "grow":
                tokens = rng.randint(1, 40)
                cache.reserve(row, tokens)
                row.length += tokens
            elif action == "cut":
                cache.truncate(row, row.length // B * B)
            elif action == "fork":
                rows.append(cache.fork(row))
            else:
                cache.close(row)
                rows.remove(row)
        except KVExhausted:
            pass
        for tier in TIERS:
            held = {b for r in rows if r.tier == tier for b in r.pages}
            assert free(cache, tier) == 30 - len(held)
        assert cache.free_tails == 5 - sum(r.tier == "disk" for r in rows)
    for row in rows:
        cache.close(row)
    assert all(free(cache, tier) == 30 for tier in TIERS)


# What comes back.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "int8"])
def test_kv_written_over_many_sweeps_comes_back_equal(bench, kind, window, compressed):
    b = bench((60, 60, 60), window=window, seed=KINDS.index(kind), compressed=compressed)
    rng = random.Random(KINDS.index(kind))
    rows = [b.open(kind) for _ in range(4)]
    for _ in range(9):
        b.sweep(rows, [rng.choice([1, 1, 2, 15, 16, 17, 40]) for _ in rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [1, 17, 40])
def test_layers_with_and_without_a_window_come_back_equal_and_hold_what_they_see(bench, kind, window):
    groups = LayerGroup(None, (1,)), LayerGroup(window, (0,))
    b, rng = bench((90, 90, 90), groups=groups, seed=window), random.Random(window)
    rows = [b.open(kind) for _ in range(4)]
    for at in range(12):
        if at == 6:  # the twin has the row's pages, and what is behind the window is gone in both
            b.cache.close(rows[3].kv)
            rows[3] = b.fork(rows[0])
        b.sweep(rows, [rng.choice([1, 1, 1, 2, 16, 50]) for _ in rows])
        for row in rows:
            full, windowed = row.kv.tables
            assert len(full.pages) == b.cache.layout.covering(row.kv.length)
            assert len(row.kv.pages) == b.cache.layout.held(row.kv.length)
            assert windowed.first == b.cache.layout.kept_from(row.kv.length)
    for row in rows:
        b.cache.close(row.kv)
    assert all(b.cache.free(tier) == 90 for tier in TIERS)


def test_layers_with_a_window_move_what_it_shows(bench):
    b = bench((0, 40, 40), groups=(LayerGroup(None, (1,)), LayerGroup(33, (0,))))
    row = b.open("fetch")
    b.sweep([row], [200])
    before = b.moved("h2d")
    b.sweep([row], [1])  # from the page of the first token that is seen
    assert b.moved("h2d") - before == TOKEN_BYTES * (200 + 200 - (200 - 32) // B * B)


def test_a_beginning_is_shared_while_what_follows_it_sees_it(tmp_path):
    shape = replace(SHAPE, groups=(LayerGroup(None, (1,)), LayerGroup(20, (0,))))
    cache = KVCache(Device("cpu"), shape, {"gpu": 40, "cpu": 0, "disk": 0})
    row = cache.open("gpu")
    cache.reserve(row, 100)
    cache.advance(row, 100)
    beginning = cache.share(row, 96)
    assert [(t.first, len(t.pages)) for t in beginning.tables] == [(0, 6), (4, 2)]
    assert len(beginning.pages) == cache.layout.before(96)
    twin = cache.fork(beginning)
    cache.reserve(twin, 1)
    assert len(twin.pages) == cache.layout.during(96, 1)
    with pytest.raises(ValueError, match="would see what is gone"):
        cache.share(row, 48)
    with pytest.raises(ValueError, match="behind the window"):
        cache.truncate(row, 48)
    for held in (row, twin, beginning):
        cache.close(held)
    assert cache.free("gpu") == 40


def test_page_boundaries_are_crossed_one_token_at_a_time_on_disk(bench):
    b = bench((0, 0, 20))
    rows = [b.open("disk"), b.open("disk")]
    b.sweep(rows, [B - 2, 2 * B])
    for _ in range(B + 4):
        b.sweep(rows, [1, 1])
    assert [r.kv.length for r in rows] == [2 * B + 2, 3 * B + 4]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "int8"])
def test_mixed_groups_in_one_batch_come_back_equal_while_rows_come_and_go(bench, seed, compressed):
    b = bench((40, 80, 60), seed=seed, batch_rows=(2, 3, 5, 8)[seed], compressed=compressed)
    rng = random.Random(seed)
    rows = []
    for _ in range(12):
        for row in list(rows):
            if rng.random() < 0.15:
                b.cache.close(row.kv)
                rows.remove(row)
        while len(rows) < 6:
            rows.append(b.open(rng.choice(KINDS)))
        b.sweep(rows, [rng.choice([1, 1, 1, 3, 16, 33]) if r.kv.length < 90 else 1 for r in rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "int8"])
def test_forked_rows_grow_apart_and_both_come_back_equal(bench, kind, compressed):
    b = bench((60, 60, 60), compressed=compressed)
    row = b.open(kind)
    for length in (35, 1, 1):
        b.sweep([row], [length])
    twin = b.fork(row)
    for lengths in ([1, 1], [20, 3], [1, 16], [1, 1]):
        b.sweep([row, twin], lengths)
    b.cache.close(row.kv)
    new = b.open(kind)
    b.sweep([new, twin], [50, 1])
    b.sweep([new, twin], [1, 1])


GROUPS = {
    "full": (),
    "windowed": (LayerGroup(None, (1,)), LayerGroup(20, (0,))),
    "all windowed": (LayerGroup(20, (0, 1)),),
}


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "int8"])
def test_a_beginning_is_copied_from_tier_to_tier(bench, source, target, groups, compressed):
    if TIER[source] == TIER[target]:
        return
    b = bench(
        (60, 60, 60),
        groups=GROUPS[groups],
        compressed=compressed,
        device=PretendCuda(),
        staging_pages=40,
        write_pages=12,
        batch_rows=4,
    )
    first_page = b.open(target)
    b.sweep([first_page], [16])  # the pages have other numbers there
    row = b.open(source)
    b.sweep([row], [32])
    short = b.cache.share(row.kv, 32)
    b.sweep([row], [64])
    long = b.cache.share(row.kv, 96)
    before = b.cache.free(TIER[target])
    there, first = b.copy(row, short, target)
    assert before - b.cache.free(TIER[target]) == b.cache.layout.before(32)
    further, second = b.copy(row, long, target, there)
    assert before - b.cache.free(TIER[target]) == b.cache.layout.before(32) + b.cache.layout.before(
        96
    ) - b.cache.layout.shared(32)
    assert [end for end, _ in further.shared] == [32, 96] and further.shared[:1] == there.shared
    assert not set(further.shared) & set(long.shared), "rows of different tiers share no page"
    for held in (row.kv, short, long):
        b.cache.close(held)
    assert b.cache.free(TIER[source]) == 60
    other = b.open(source)  # where the pages were
    for lengths in ([120, 1, 17], [1, 40, 1], [1, 1, 1]):
        b.sweep([other, first, second], lengths)
    for held in (first_page.kv, other.kv, there, further, first.kv, second.kv):
        b.cache.close(held)
    assert all(b.cache.free(tier) == 60 for tier in TIERS) and b.cache.free_tails == b.cache.tails


def test_a_copy_without_room_changes_nothing(tmp_path):
    cache = cache_of(tmp_path, gpu=4, cpu=3)
    pages = cache.share(filled(cache, "gpu", 64), 64)
    with pytest.raises(KVExhausted):
        cache.copy_shared(pages, "cpu")
    assert free(cache, "cpu") == 3


def test_what_crosses_the_link_or_the_disk_for_a_copy_is_counted_on_its_lane(bench):
    moved = {}
    for source, target in (
        ("gpu", "cpu"),
        ("cpu", "gpu"),
        ("cpu", "disk"),
        ("disk", "cpu"),
        ("disk", "gpu"),
        ("gpu", "disk"),
    ):
        b = bench((20, 20, 20))
        row = b.open(source)
        b.sweep([row], [64])
        lanes = ("h2d", "d2h", "disk_read", "disk_write")
        before = [b.moved(lane) for lane in lanes]
        b.copy(row, b.cache.share(row.kv, 64), target)
        moved[source, target] = [b.moved(lane) - had for lane, had in zip(lanes, before)]
    tokens, pages = LAYERS * 64 * TOKEN_BYTES, LAYERS * 4 * b.cache.disk_page_bytes
    assert moved == {
        ("gpu", "cpu"): [0, tokens, 0, 0],
        ("cpu", "gpu"): [tokens, 0, 0, 0],
        ("cpu", "disk"): [0, 0, 0, pages],
        ("disk", "cpu"): [0, 0, pages, 0],
        ("disk", "gpu"): [tokens, 0, pages, 0],
        ("gpu", "disk"): [0, tokens, 0, pages],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_row_continues_from_its_new_end(bench, kind):
    b = bench((60, 60, 60))
    row = b.open(kind)
    for length in (30, 9, 5):  # 44: two full pages and a tail of 12
        b.sweep([row], [length])
    for length in (38, 32, 16):
        b.cache.truncate(row.kv, length)
        row.truncate(length)
        b.sweep([row], [7])
        b.cache.truncate(row.kv, length)
        row.truncate(length)
    b.sweep([row], [1])


# What is moved.


def test_only_used_tokens_are_fetched_and_stored(bench):
    b = bench((0, 60, 0))
    rows = [b.open("fetch") for _ in range(4)]
    b.sweep(rows, [1, 17, 33, 5])
    assert b.moved("h2d") == 0 and b.moved("d2h") == LAYERS * (1 + 17 + 33 + 5) * TOKEN_BYTES
    b.sweep(rows, [1, 1, 2, 1])
    assert b.moved("h2d") == LAYERS * (1 + 17 + 33 + 5) * TOKEN_BYTES
    assert b.moved("d2h") == LAYERS * (56 + 5) * TOKEN_BYTES
    assert b.moved("disk_read") == b.moved("disk_write") == b.moved("cpu") == 0


@pytest.mark.parametrize("kind", ["fetch", "disk"])
@pytest.mark.parametrize("batch_rows, fetched", [(8, 2), (3, 2), (2, 4)])
def test_rows_of_a_gpu_batch_fetch_what_they_share_once(bench, kind, batch_rows, fetched):
    """Six rows of two prefixes come in turns; a batch has rows of one prefix as far as that goes."""
    b = bench((0, 60, 60), batch_rows=batch_rows)
    first = [b.open(kind) for _ in range(2)]
    b.sweep(first, [64, 64])
    shared = [b.cache.share(row.kv, 64) for row in first]
    rows = [History(kind, b.cache.fork(shared[at % 2])) for at in range(6)]
    for at, row in enumerate(rows):
        row.k, row.v = list(first[at % 2].k), list(first[at % 2].v)
    for own in range(2):
        lanes = {lane: b.moved(lane) for lane in ("h2d", "disk_read")}
        b.sweep(rows, [1] * 6)
        assert b.moved("h2d") - lanes["h2d"] == LAYERS * TOKEN_BYTES * (64 * fetched + 6 * own)
        pages = LAYERS * 4 * fetched if kind == "disk" else 0
        assert b.moved("disk_read") - lanes["disk_read"] == pages * b.cache.disk_page_bytes


def test_compressed_kv_moves_as_it_is_stored(bench):
    b = bench((0, 60, 60), compressed=True)
    token, page = b.cache.shape.token_bytes, b.cache.disk_page_bytes
    assert token == 2 * 2 * (8 + 2) and page == SYSTEM_PAGE_BYTES
    rows = [b.open("fetch"), b.open("disk")]
    b.sweep(rows, [17, B + 5])
    assert b.moved("d2h") == LAYERS * (17 + B + 5) * token and b.moved("disk_write") == LAYERS * page
    b.sweep(rows, [1, 1])
    assert b.moved("h2d") == LAYERS * (17 + B + 5) * token and b.moved("disk_read") == LAYERS * page


def test_disk_rows_read_their_full_pages_and_write_only_what_became_full(bench):
    b = bench((0, 0, 60))
    rows = [b.open("disk") for _ in range(3)]
    b.sweep(rows, [B - 1, 2 * B, 3 * B + 5])
    assert b.moved("disk_read") == 0 and b.moved("disk_write") == LAYERS * 5 * b.cache.disk_page_bytes
    b.sweep(rows, [1, 1, 1])
    assert b.moved("disk_read") == LAYERS * 5 * b.cache.disk_page_bytes
    assert b.moved("h2d") == LAYERS * (B - 1 + 2 * B + 3 * B + 5) * TOKEN_BYTES
    assert b.moved("disk_write") == LAYERS * 6 * b.cache.disk_page_bytes


def test_gpu_rows_move_nothing_and_cpu_rows_are_attended_where_they_are(bench):
    b = bench((20, 20, 0))
    rows = [b.open("gpu"), b.open("cpu")]
    for lengths in ([20, 30], [1, 1]):
        b.sweep(rows, lengths)
    assert b.moved("h2d") == 0
    assert b.moved("d2h") == LAYERS * 31 * TOKEN_BYTES
    assert b.moved("cpu") == LAYERS * (30 + 31) * TOKEN_BYTES


def test_disk_write_error_surfaces_in_the_sweep(bench, monkeypatch):
    def full(fd, buffers, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    b = bench((0, 0, 20))
    row = b.open("disk")
    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(StorageError, match="No space left"):
        b.sweep([row], [3 * B])


# The order of transfers on CUDA.


class Copies:
    """Streams of a pretended GPU whose copies of KV arrive when `let_go` says so."""

    def __init__(self, monkeypatch, device):
        self.held, self.waited = threading.Event(), []
        record = device.record

        def slow_record(stream=None):
            event = record(stream)
            if threading.current_thread().name.startswith("h2d"):
                event.synchronize = lambda: (self.waited.append(event), self.held.wait(10))
            return event

        monkeypatch.setattr(device, "record", slow_record)


def test_a_load_is_gathered_while_the_one_before_is_on_the_link(bench, monkeypatch):
    device = PretendCuda()
    b = bench((0, 60, 0), device=device, batch_rows=1)
    rows = [b.open("fetch") for _ in range(3)]
    b.sweep(rows, [20, 20, 20])
    copies = Copies(monkeypatch, device)
    runs = [Run(row.kv, [0], AttentionMode.FETCH, 1) for row in rows]
    for row in rows:
        b.cache.reserve(row.kv, 1)
    block = Block(runs, 1)
    b.lanes.begin(block, b.uploads)
    try:
        first, second, third = (b.lanes.load(0, batch) for batch in block.batches)
        first.result(5), second.result(5)
        with pytest.raises(TimeoutError):  # it would overwrite what the first copies from
            third.result(0.2)
        assert copies.waited == [first.result()]
    finally:
        copies.held.set()
    third.result(5)


@pytest.mark.parametrize("work", ["_load", "_store", "_cpu_attend"])
@pytest.mark.parametrize("of_device", [lambda: Device("cpu"), PretendCuda])
def test_who_computes_on_the_cpu_moves_kv_and_attends(bench, monkeypatch, work, of_device):
    device, threads, real = of_device(), [], getattr(KVLanes, work)
    monkeypatch.setattr(KVLanes, work, lambda *args: (threads.append(threading.current_thread()), real(*args))[1])
    b = bench((0, 60, 8), device=device, batch_rows=3)
    rows = [b.open(kind) for kind in ("fetch", "cpu", "disk")]
    for _ in range(2):
        b.sweep(rows, [20] * len(rows))
    assert len(threads) == 2 * LAYERS
    assert {thread is threading.current_thread() for thread in threads} == {not device.is_cuda}


def test_on_the_cpu_the_disk_reads_while_others_are_attended_and_new_kv_is_home_before_its_batch_is(bench):
    b = bench((0, 0, 30), batch_rows=1)
    rows = [b.open("disk") for _ in range(2)]
    b.sweep(rows, [40, 40])
    for row in rows:
        b.cache.reserve(row.kv, 1)
    block = Block([Run(row.kv, [0], AttentionMode.FETCH, 1) for row in rows], 1)
    b.lanes.begin(block, b.uploads)
    before = b.moved("disk_read"), b.moved("h2d")
    loaded = [b.lanes.load(0, batch) for batch in block.batches]
    deadline = time.monotonic() + 10
    while b.moved("disk_read") - before[0] < 2 * 2 * b.cache.disk_page_bytes and time.monotonic() < deadline:
        time.sleep(0.01)
    assert b.moved("disk_read") - before[0] == 2 * 2 * b.cache.disk_page_bytes and b.moved("h2d") == before[1]
    q, k, v = torch.zeros(1, HEADS, SIZE), *torch.zeros(2, 1, *SHAPE.stored_token)
    stored = [b.lanes.store(0, batch, q, k, v, [load]) for batch, load in zip(block.batches, loaded)]
    b.lanes.settle(block.batches[0])
    assert [future.done() for future in (*loaded, *stored)] == [True, False, True, False]
    b.lanes.drain()
    assert all(future.done() for future in stored)


@pytest.mark.parametrize("kind", ["fetch", "cpu", "disk"])
def test_what_goes_wrong_in_moving_kv_surfaces_where_it_is_waited_for(bench, monkeypatch, kind):
    def fail(*args):
        raise StorageError("gone")

    b = bench((0, 60, 8))
    row = b.open(kind)
    b.sweep([row], [20])
    monkeypatch.setattr(KVLanes, "_store", fail)
    with pytest.raises(StorageError, match="gone"):
        b.sweep([row], [1])


def test_a_load_waits_for_the_upload_of_its_index_tensors(bench, monkeypatch):
    device, waited = PretendCuda(), []
    b = bench((0, 60, 0), device=device)
    monkeypatch.setattr(Event, "wait", lambda self, stream=None: waited.append((self, stream)))
    row = b.open("fetch")
    for _ in range(2):
        waited.clear()
        b.sweep([row], [20])
        assert waited.count((b.uploads._copied, b.lanes._streams["h2d"])) == LAYERS


def test_only_the_queries_of_rows_that_are_attended_on_the_cpu_are_brought_down(bench):
    b = bench((0, 60, 0), device=PretendCuda(), batch_rows=4)
    for queries in b.lanes._queries:
        queries.fill_(7)
    fetched = [b.open("fetch") for _ in range(2)]
    b.sweep(fetched, [20, 3])
    assert all((queries == 7).all() for queries in b.lanes._queries)
    b.sweep([*fetched, b.open("cpu")], [1, 1, 5])
    first = b.lanes._queries[0][0]
    assert (first[:5] != 7).all() and (first[5:] == 7).all()


def test_outputs_of_cpu_attention_have_an_urgent_stream_of_their_own(bench, monkeypatch):
    device, urgent, used = PretendCuda(), [], []
    make, record = device.stream, device.record
    monkeypatch.setattr(device, "stream", lambda **kw: urgent.append((kw, make(**kw))) or urgent[-1][1])
    monkeypatch.setattr(device, "record", lambda s=None: used.append((threading.current_thread().name, s)) or record(s))
    b = bench((0, 60, 0), device=device)
    b.sweep([b.open("cpu"), b.open("fetch")], [20, 20])
    (own,) = (stream for options, stream in urgent if options.get("urgent"))
    assert {stream for name, stream in used if name.startswith("cpu")} == {own}
    assert own not in {stream for name, stream in used if not name.startswith("cpu")}


def test_lanes_of_kv_tell_the_time_of_the_copies(bench):
    """On CUDA a span of the link is between events around the copies, and the wait for what is copied is no part of it."""
    b = bench((0, 60, 0), device=PretendCuda())
    rows = [b.open("cpu"), b.open("fetch")]
    for _ in range(2):
        b.sweep(rows, [20, 20])
    b.recorder.resolve()
    by_worker = b.recorder.totals(by_worker=True)
    assert by_worker["h2d/kv"].nbytes == LAYERS * 20 * TOKEN_BYTES
    assert by_worker["d2h"].nbytes == 2 * LAYERS * 40 * TOKEN_BYTES
    assert by_worker["h2d/attended"].nbytes > 0
