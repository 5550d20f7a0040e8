"""The journal keeps every whole record, forgets a torn tail, and never takes damage for an end."""

import errno
import os
import random
import struct

import pytest

from flexmoe.errors import DataError, StorageError
from flexmoe.job.journal import Journal
from flexmoe.job.journal_records import HEAD_BYTES, SYNCED, TOKENS, Generated, Head, encode
from flexmoe.outputs import TokenLogprob
from flexmoe.params import InFlight
from policies.common import file_io

ROWS = 12


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal"


def opened(path, rows=ROWS, job="the job"):
    return Journal(path, rows, job)


def in_flight(*states):
    """(row, prompt, state) of (row, prompt, sample, ids) or (row, prompt, sample, ids, logprobs)."""
    return [
        (row, prompt, InFlight(request_id="", index=sample, token_ids=ids, logprobs=more[0] if more else None))
        for row, prompt, sample, ids, *more in states
    ]


def entry(token):
    return TokenLogprob(token_id=token, logprob=-token / 7, top=((token, -token / 7), (token + 1, float("-inf"))))


def state(journal):
    """Everything that a job asks of a journal that it finds."""
    partial = {
        row: {key: (list(g.token_ids), g.logprobs) for key, g in journal._partial[row].items()}
        for row in journal.partial_rows
    }
    counts = journal.rows_done, journal.rows_failed, journal.prompt_tokens, journal.generated_tokens
    return list(journal.lines(failed=False)), list(journal.lines(failed=True)), journal.failed_rows(), partial, counts


def written(path):
    """A journal of every kind of record; the places where its records end, and what is known from each place on."""
    journal = opened(path)
    ends, states = [path.stat().st_size], [state(journal)]

    def note():
        ends.append(path.stat().st_size)
        states.append(None)

    def check():
        journal.close()
        again = opened(path)
        states[-1] = state(again)
        return again

    steps = [
        lambda j: j.finish(5, b"five\n", prompt_tokens=3, generated_tokens=2),
        lambda j: j._append(TOKENS, 7, Generated(prompt=0, sample=0, token_ids=ids(1, 2)).encode()),
        lambda j: j._append(TOKENS, 7, Generated(prompt=1, sample=2, token_ids=ids(9), logprobs=[entry(9)]).encode()),
        lambda j: j._append(SYNCED, j._end, b""),
        lambda j: j.finish(0, "Zürich 日本\n".encode(), failed=True),
        lambda j: j._append(TOKENS, 7, Generated(prompt=0, sample=0, start=2, token_ids=ids(3)).encode()),
        lambda j: j._append(SYNCED, j._end, b""),
        lambda j: j.finish(7, b"", prompt_tokens=1, generated_tokens=1),
        lambda j: j.finish(11, b"x" * 300),
    ]
    for step in steps:
        step(journal)
        note()
        journal = check()
    journal.close()
    return ends, states


def ids(*values):
    return Generated(prompt=0, sample=0).token_ids.__class__("I", values)


def test_lines_come_back_in_the_order_of_the_rows(path):
    journal = opened(path)
    for row in (4, 1, 3):
        journal.finish(row, b"%d\n" % row, failed=row == 3)
    assert list(journal.lines(failed=False)) == [b"1\n", b"4\n"] and list(journal.lines(failed=True)) == [b"3\n"]
    assert journal.failed_rows() == [3] and 1 in journal and 2 not in journal


def test_a_journal_cut_at_every_byte_has_exactly_its_whole_records(path, tmp_path):
    ends, states = written(path)
    whole = path.read_bytes()
    assert len(whole) == ends[-1] > 600
    empty = state(opened(tmp_path / "none"))
    for cut in range(len(whole) + 1):
        piece = tmp_path / "piece"
        piece.write_bytes(whole[:cut])
        known = max((i for i, end in enumerate(ends) if end <= cut), default=None)
        journal = opened(piece)
        assert state(journal) == (empty if known is None else states[known]), cut
        # The job goes on: what is added after the cut is there the next time, behind the same records.
        journal.finish(2, b"after\n")
        expected = state(journal)
        journal.close()
        again = opened(piece)
        assert state(again) == expected
        again.close()
        piece.unlink()


def test_a_byte_that_was_durable_and_is_damaged_is_an_error_wherever_it_is(path):
    ends, _ = written(path)
    whole = bytearray(path.read_bytes())
    last_synced = ends[7] - HEAD_BYTES
    rng = random.Random(5)
    for at in range(last_synced):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"damaged at byte \d+|not the journal of this job"):
            opened(path)
        assert path.read_bytes() == damaged, "what cannot be used is left as it is"


def test_damage_behind_all_that_was_durable_is_cut_off(path):
    ends, states = written(path)
    damaged = bytearray(path.read_bytes())
    damaged[ends[8] + 3] ^= 4
    path.write_bytes(damaged)
    assert state(opened(path)) == states[8]


def test_zeros_at_the_end_are_cut_off(path):
    """Some file systems lengthen a file before its bytes are there."""
    _, states = written(path)
    with open(path, "ab") as file:
        file.write(bytes(5000))
    assert state(opened(path)) == states[-1]


def test_the_remedy_that_the_error_names_keeps_the_rows_before_the_damage(path):
    ends, states = written(path)
    damaged = bytearray(path.read_bytes())
    damaged[ends[1] + 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=f"truncate -s {ends[1]} {path}"):
        opened(path)
    os.truncate(path, ends[1])
    assert state(opened(path)) == states[1]


def test_tokens_of_rows_in_flight_come_back_for_each_prompt_and_sample(path):
    journal = opened(path)
    one, other = [5, 6], [7]
    journal.checkpoint(in_flight((3, 0, 0, one), (3, 0, 1, other), (4, 2, 0, [1], [entry(1)])))
    one.append(8)
    journal.checkpoint(in_flight((3, 0, 0, one), (3, 0, 1, other)))
    journal.close()
    journal = opened(path)
    assert journal.partial_rows == [3, 4] and journal.recovered_tokens == 5
    row = journal.take_partial(3)
    assert {key: g.resumed().token_ids for key, g in row.items()} == {(0, 0): (5, 6, 8), (0, 1): (7,)}
    [logprobs] = [g.resumed().logprobs for g in journal.take_partial(4).values()]
    assert logprobs == (entry(1),), "log-probabilities come back to the last bit"
    assert journal.partial_rows == [] and journal.take_partial(3) == {}


def test_only_new_tokens_are_written_also_after_a_resume(path):
    journal = opened(path)
    tokens = list(range(1000))
    journal.checkpoint(in_flight((3, 0, 0, tokens)))
    journal.close()
    journal = opened(path)
    journal.take_partial(3)
    before = path.stat().st_size
    journal.checkpoint(in_flight((3, 0, 0, [*tokens, 1, 2])))
    assert path.stat().st_size - before < 150
    journal.close()
    assert list(opened(path).take_partial(3)[0, 0].token_ids) == [*tokens, 1, 2]


def test_a_finished_row_keeps_no_tokens_in_memory(path):
    journal = opened(path)
    journal.checkpoint(in_flight((3, 0, 0, [1, 2])))
    journal.finish(3, b"x\n")
    assert not journal._written
    journal.close()
    assert opened(path).partial_rows == []


def test_a_row_is_finished_once(path):
    journal = opened(path)
    journal.finish(3, b"x\n")
    with pytest.raises(ValueError, match="already finished"):
        journal.finish(3, b"y\n")


def test_a_journal_of_another_job_is_refused(path):
    opened(path).close()
    with pytest.raises(DataError, match="not the journal of this job"):
        opened(path, job="another")


def test_a_row_beyond_the_job_is_refused(path):
    journal = opened(path)
    journal.finish(11, b"x\n")
    journal.close()
    with pytest.raises(DataError, match="no row 11 in a job of 11"):
        opened(path, rows=11)


def test_records_that_two_runs_wrote_at_once_are_refused(path):
    one, two = opened(path), opened(path)
    one.finish(3, b"x\n")
    two.finish(3, b"x\n")
    with pytest.raises(DataError, match="two runs wrote"):
        opened(path)


def test_a_gap_between_tokens_is_refused(path):
    journal = opened(path)
    journal._append(TOKENS, 1, Generated(prompt=0, sample=0, start=2, token_ids=ids(3)).encode())
    journal.close()
    with pytest.raises(DataError, match="begin at 2, but 0 came before"):
        opened(path)


@pytest.mark.parametrize(
    "payload", [b"", struct.pack("<IIII?", 0, 0, 0, 5, False), struct.pack("<IIIII", 0, 0, 0, 1, 1)]
)
def test_a_payload_that_lacks_what_it_announces_is_refused(path, payload):
    journal = opened(path)
    journal._append(TOKENS, 1, payload)
    journal.close()
    with pytest.raises(DataError, match="cannot be used"):
        opened(path)


def test_a_record_that_the_disk_took_in_part_is_taken_back(path, monkeypatch):
    journal = opened(path)
    journal.finish(1, b"one\n")
    before = path.read_bytes()
    real = os.write
    monkeypatch.setattr(file_io.os, "write", full_after(real, 10))
    with pytest.raises(StorageError, match="No space left"):
        journal.finish(2, b"two\n")
    monkeypatch.setattr(file_io.os, "write", real)
    assert path.read_bytes() == before and 2 not in journal
    journal.finish(2, b"two\n")
    assert list(journal.lines(failed=False)) == [b"one\n", b"two\n"]


def full_after(write, room):
    """`os.write` on a disk with room for so many bytes more."""
    left = [room]

    def limited(descriptor, data):
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = write(descriptor, bytes(data)[: left[0]])
        left[0] -= taken
        return taken

    return limited


def test_a_line_that_the_disk_returns_otherwise_is_noticed(path):
    journal = opened(path)
    journal.finish(1, b"one\n")
    with open(path, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"X")
    with pytest.raises(DataError, match="other bytes than were written"):
        list(journal.lines(failed=False))


def test_a_head_is_known_by_its_own_crc():
    record = encode(TOKENS, 3, b"abc")
    assert Head.decode(record).row == 3
    for bit in range(8 * HEAD_BYTES):
        damaged = bytearray(record)
        damaged[bit // 8] ^= 1 << bit % 8
        assert Head.decode(bytes(damaged)) is None
