"""Large copies give way to small ones, and are never far ahead."""

import threading

import pytest

from flexmoe.system import link
from flexmoe.system.link import Link, pieces_of


class Event:
    """Passes when it is told to; whoever waits for it is listed."""

    def __init__(self, waits=None, passed=False):
        self.waits, self._passed = [] if waits is None else waits, threading.Event()
        if passed:
            self._passed.set()

    def query(self):
        return self._passed.is_set()

    def synchronize(self):
        self.waits.append(self)
        assert self._passed.wait(10)

    def let_pass(self):
        self._passed.set()


@pytest.mark.parametrize("nbytes", [0, 1, link.PIECE_BYTES, link.PIECE_BYTES + 1, 235 << 20])
def test_pieces_are_alike_and_make_up_the_whole(nbytes):
    pieces = list(pieces_of(nbytes))
    assert [p.start for p in pieces] == [0, *(p.stop for p in pieces[:-1])] and pieces[-1].stop == nbytes
    sizes = {p.stop - p.start for p in pieces}
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= link.PIECE_BYTES
    assert len(pieces) == 1 or min(sizes) >= link.PIECE_BYTES // 2


def test_two_pieces_are_ahead_and_the_next_waits_for_the_first_of_them():
    here, waits = Link(), []
    first, second = Event(waits, passed=True), Event(waits, passed=True)
    for event in (first, second):
        here.give_way()
        here.piece(event)
    assert waits == []
    here.give_way()
    assert waits == [first]


def test_a_piece_is_issued_when_the_small_transfers_are_there():
    here, small, issued = Link(), Event(), threading.Event()
    here.small(small)
    feeder = threading.Thread(target=lambda: (here.give_way(), issued.set()))
    feeder.start()
    assert not issued.wait(0.1)
    small.let_pass()
    assert issued.wait(10)
    feeder.join()
    here.give_way()  # nobody is waited for twice
    assert small.waits == [small]


def test_small_transfers_that_are_there_are_forgotten_where_nothing_large_is_copied():
    here = Link()
    for _ in range(100):
        here.small(Event(passed=True))
    assert len(here._small) == 1
