"""Deferred work: done once, by whoever asks first; its errors are met by all who ask."""

import pytest

from flexmoe.system.deferred import Deferred


def test_work_waits_until_it_is_asked_for_and_is_done_once():
    done = []
    deferred = Deferred(lambda *args: (done.append(args), sum(args))[1], 1, 2)
    assert not deferred.done() and not done
    assert [deferred.result(), deferred.do().result(), deferred.result(0.1)] == [3] * 3
    assert done == [(1, 2)] and deferred.done()


def test_an_error_is_met_by_all_who_ask_and_not_by_who_does_it():
    def fail():
        raise ValueError("gone")

    deferred = Deferred(fail).do()
    for _ in range(2):
        with pytest.raises(ValueError, match="gone"):
            deferred.result()


def test_an_interrupt_ends_who_does_it_and_nobody_waits_for_ever():
    def interrupted():
        raise KeyboardInterrupt

    deferred = Deferred(interrupted)
    for ask in (deferred.do, deferred.result):
        with pytest.raises(KeyboardInterrupt):
            ask()
