"""What the lanes did: exact totals, and a trace that Chrome can read."""

import json
import random
import threading

import pytest

from flexmoe.system.trace import Covered, LaneTotals, Recorder


def test_totals_add_up_bytes_and_seconds_over_the_workers_of_a_lane():
    recorder = Recorder()
    recorder.add("disk_read/0", "a", 1.0, 1.5, 100)
    recorder.add("disk_read/1", "b", 1.0, 1.25, 60)
    recorder.add("gpu", "c", 2.0, 2.125)
    assert recorder.totals() == {"disk_read": LaneTotals(160, 0.5, 0.75), "gpu": LaneTotals(0, 0.125, 0.125)}
    assert set(recorder.totals(by_worker=True)) == {"disk_read/0", "disk_read/1", "gpu"}


def test_rate_is_bytes_over_busy_seconds_and_zero_for_an_idle_lane():
    assert LaneTotals(100, 0.5).bytes_per_s == 200
    assert LaneTotals().bytes_per_s == 0


def test_totals_given_out_do_not_change_later():
    recorder = Recorder()
    recorder.add("h2d", "a", 0.0, 1.0, 5)
    before = recorder.totals()
    before["h2d"].nbytes += 1
    assert recorder.totals()["h2d"].nbytes == 5


def test_span_is_recorded_even_when_its_body_fails():
    recorder = Recorder()
    with pytest.raises(KeyError), recorder.span("cpu", "x", 7):
        raise KeyError
    assert recorder.totals()["cpu"].nbytes == 7


def test_threads_lose_nothing():
    recorder = Recorder(keep_spans=True)
    threads = [
        threading.Thread(target=lambda: [recorder.add("h2d", "x", 0.0, 1.0, 3) for _ in range(500)]) for _ in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert recorder.totals()["h2d"] == LaneTotals(6000, 1.0, 2000.0)


def test_chrome_trace_has_one_track_per_lane_in_microseconds_and_no_overlap_within_one(tmp_path):
    recorder = Recorder(keep_spans=True)
    at = recorder.origin_s
    for i in reversed(range(5)):
        recorder.add("disk_read/0", f"read {i}", at + i, at + i + 0.5, 10)
        recorder.add("gpu", f"expert {i}", at + i + 0.25, at + i + 1.0)
    recorder.write_chrome_trace(tmp_path / "trace.json")
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]
    trace = json.loads((tmp_path / "trace.json").read_text("utf-8"))
    names = {e["tid"]: e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert sorted(names.values()) == ["disk_read/0", "gpu"]
    spans = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert len(spans) == 10
    for tid, lane in names.items():
        track = [e for e in spans if e["tid"] == tid]
        assert [round(e["ts"]) for e in track] == [round((i + (lane == "gpu") / 4) * 1e6) for i in range(5)]
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in zip(track, track[1:]))
        assert all(("args" in e) == (lane != "gpu") for e in track)
    assert {e["args"]["bytes"] for e in spans if "args" in e} == {10}


def test_names_with_quotes_and_newlines_stay_valid_json(tmp_path):
    recorder = Recorder(keep_spans=True)
    recorder.add("gpu", 'a "b"\n\\é', 0.0, 1.0)
    recorder.write_chrome_trace(tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text("utf-8"))["traceEvents"]
    assert events[-1]["name"] == 'a "b"\n\\é'


def test_spans_are_kept_only_when_asked_for(tmp_path):
    recorder = Recorder()
    recorder.add("gpu", "x", 0.0, 1.0)
    recorder.write_chrome_trace(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"] == []


class Event:
    def __init__(self, at_s, passed=True):
        self.at_s, self.passed = at_s, passed

    def query(self):
        return self.passed

    def elapsed_time(self, other):
        return (other.at_s - self.at_s) * 1e3


def test_device_spans_are_resolved_once_their_events_have_passed():
    recorder = Recorder()
    late = Event(13.0, passed=False)
    recorder.add_device("h2d", "a", Event(10.0), 100.0, Event(11.0), Event(12.0), 8)
    recorder.add_device("h2d", "b", Event(10.0), 100.0, Event(12.0), late, 8)
    recorder.resolve()
    assert recorder.totals()["h2d"] == LaneTotals(8, pytest.approx(1.0), pytest.approx(1.0))
    recorder.resolve()
    assert recorder.totals()["h2d"].nbytes == 8
    late.passed = True
    recorder.resolve()
    assert recorder.totals()["h2d"] == LaneTotals(16, pytest.approx(2.0), pytest.approx(2.0))


def test_a_lane_is_busy_while_any_of_its_workers_is():
    recorder = Recorder()
    for lane, start, end in [("disk/1", 2, 3), ("disk/0", 0, 10), ("disk/1", 9, 12), ("disk/0", 20, 21), ("gpu", 0, 1)]:
        recorder.add(lane, "x", start, end)
    assert recorder.totals()["disk"].busy_s == pytest.approx(13)
    assert recorder.totals()["disk"].worker_s == pytest.approx(15)
    assert recorder.totals()["gpu"].busy_s == pytest.approx(1)


@pytest.mark.parametrize("seed", range(20))
def test_busy_seconds_are_the_length_of_the_union_of_spans(seed):
    rng, recorder, cells = random.Random(seed), Recorder(), set()
    ends = sorted(rng.randrange(10, 400) for _ in range(60))
    for end in ends:
        start = max(0, end - rng.randrange(1, 8))
        recorder.add(f"disk/{rng.randrange(4)}", "x", start, end)
        cells.update(range(start, end))
    assert recorder.totals()["disk"].busy_s == pytest.approx(len(cells))


def test_seconds_of_spans_in_any_order_are_those_of_their_union():
    rng = random.Random(3)
    for _ in range(50):
        spans = [(at, at + rng.randrange(30)) for at in (rng.randrange(600) for _ in range(rng.randrange(1, 120)))]
        covered = Covered()
        assert sum(covered.add(*span) for span in spans) == len({s for a, b in spans for s in range(a, b)}), spans


def test_device_spans_that_come_at_the_end_of_a_sweep_do_not_count_twice_what_the_host_did_meanwhile():
    """Host spans of a lane are recorded one by one, and the copies beside them when the sweep is over."""
    recorder, base = Recorder(), Event(0.0)
    begin = recorder.origin_s
    for _ in range(3):
        for i in range(200):
            recorder.add("h2d/kv", "gather", begin + i, begin + i + 0.5)
            recorder.add_device("h2d", "unit", base, begin, Event(i + 0.25), Event(i + 0.75), 1)
        recorder.resolve()
        assert recorder.totals()["h2d"].busy_s == pytest.approx(150)
        begin += 200
        recorder.reset_totals()


def test_what_is_long_past_is_forgotten_and_adds_nothing():
    covered = Covered()
    assert covered.add(0, 2) == 2
    covered.forget(10)
    assert covered.add(1, 9) == 0
    assert covered.add(8, 12) == 2
    for at in range(100_000):
        covered.add(100 + at, 100.5 + at)
    assert len(covered._starts) <= 20_000
