"""`flexmoe.ray` on a local Ray cluster: kills, dead engines, and rows in flight."""

import asyncio
import os
import signal
import threading
import time

import pytest

import flexmoe.ray
from flexmoe import LLM, SamplingParams
from flexmoe.errors import UsageError

ray = pytest.importorskip("ray", reason="needs the extra: pip install 'flexmoe[ray]'")

pytestmark = pytest.mark.slow
ROWS = 2000
NEW = {"max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=200 << 20)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def rows():
    return [{"id": place, "prompt": f"Row {place} says {place * place % 97}"} for place in range(ROWS)]


@pytest.fixture(scope="module")
def expected(checkpoint, options, rows):
    """Texts by id of one run without Ray."""
    with LLM(str(checkpoint), **options) as llm:
        outputs = llm.generate([row["prompt"] for row in rows], SamplingParams(**NEW))
    return {row["id"]: output.outputs[0].text for row, output in zip(rows, outputs, strict=True)}


class Killer(threading.Thread):
    """Kills one actor twice: the first that has rows in flight, and the one that takes its place. An actor is known by its file
    in the journal."""

    def __init__(self, journal):
        super().__init__(daemon=True)
        self.journal, self.killed = journal, []

    def pids(self):
        return {int(path.name.split("-")[-2]) for path in self.journal.glob("*.tokens")}

    def run(self):
        deadline_s = time.monotonic() + 300
        before = set()
        while len(self.killed) < 2 and time.monotonic() < deadline_s:
            time.sleep(0.05)
            # After the first kill: a process that was not there then.
            fresh = sorted(self.pids() - before)
            if len(self.pids()) < 2 or not fresh:
                continue
            os.kill(fresh[0], signal.SIGKILL)
            self.killed.append(fresh[0])
            before = self.pids()


def test_every_row_once_although_an_actor_is_killed_twice(cluster, checkpoint, options, rows, expected, tmp_path):
    killer = Killer(tmp_path / "journal")
    arguments = {**options, "sampling_params": NEW, "id_column": "id", "journal": str(killer.journal)}
    done = flexmoe.ray.generate(
        ray.data.from_items(rows, override_num_blocks=8),
        str(checkpoint),
        actors=2,
        rows_in_flight=256,
        batch_size=32,
        arguments={**arguments, "checkpoint_interval_s": 0.1},
    )
    killer.start()
    found = done.take_all()
    assert len(killer.killed) == 2 and killer.killed[0] != killer.killed[1]
    assert sorted(row["id"] for row in found) == list(range(ROWS))
    assert {row["id"]: row["generated_text"] for row in found} == expected
    assert not any(row["__inference_error__"] for row in found)


class Crowded(flexmoe.ray.Generate):
    """Begins no row before it has had so many at once; tells how many it has had, by the name of a file."""

    def __init__(self, model, *, notes, wanted, **options):
        super().__init__(model, **options)
        self._notes, self._wanted = notes, wanted
        self._open = self._most = 0
        self._deadline_s = time.monotonic() + 60

    async def __call__(self, batch):
        self._open += batch.num_rows
        self._most = max(self._most, self._open)
        open(os.path.join(self._notes, str(self._open)), "w").close()
        while self._most < self._wanted and time.monotonic() < self._deadline_s:
            await asyncio.sleep(0.05)
        try:
            return await super().__call__(batch)
        finally:
            self._open -= batch.num_rows


@pytest.mark.parametrize("batch_size", [8, 64])
def test_so_many_rows_are_in_flight_whatever_the_batch_size(
    cluster, checkpoint, options, rows, tmp_path, monkeypatch, batch_size
):
    monkeypatch.setattr(flexmoe.ray.dataset, "Generate", Crowded)
    done = flexmoe.ray.generate(
        ray.data.from_items(rows, override_num_blocks=3),
        str(checkpoint),
        rows_in_flight=1024,
        batch_size=batch_size,
        arguments={**options, "sampling_params": NEW, "notes": str(tmp_path), "wanted": 1024},
    )
    assert done.count() == ROWS
    most = max(int(path.name) for path in tmp_path.iterdir())
    assert 1024 <= most < 1.2 * 1024, "blocks are not cut to the row"


class Counted:
    """Notes how many rows a call has."""

    def __init__(self, model, *, notes):
        self._notes = notes

    async def __call__(self, batch):
        with open(os.path.join(self._notes, f"{time.monotonic_ns()}-{id(batch)}"), "w") as note:
            note.write(str(batch.num_rows))
        return batch


@pytest.mark.parametrize("blocks", [1, 8, 200])
def test_calls_have_as_many_rows_as_a_batch_whatever_the_size_of_a_block(cluster, rows, tmp_path, monkeypatch, blocks):
    monkeypatch.setattr(flexmoe.ray.dataset, "Generate", Counted)
    data = ray.data.from_items(rows[:500], override_num_blocks=blocks)
    done = flexmoe.ray.generate(data, "none", batch_size=64, arguments={"notes": str(tmp_path)})
    assert sorted(row["id"] for row in done.take_all()) == list(range(500))
    assert sorted(int(path.read_text()) for path in tmp_path.iterdir()) == [52, *[64] * 7]


class DiesOnce(flexmoe.ray.Generate):
    """Its engine fails in the tenth sweep, in the first actor that is made."""

    def __init__(self, model, *, note, **options):
        super().__init__(model, **options)
        if os.path.exists(note):
            return
        open(note, "w").close()
        step, left = self.llm.engine.step, iter(range(10))

        def stepped():
            if next(left, None) is None:
                raise RuntimeError("the device is lost")
            return step()

        self.llm.engine.step = stepped


def test_ray_makes_another_actor_where_an_engine_has_failed(cluster, checkpoint, options, rows, expected, tmp_path):
    arguments = {**options, "sampling_params": NEW, "note": str(tmp_path / "died")}
    done = ray.data.from_items(rows[:300]).map_batches(
        DiesOnce,
        batch_size=100,
        fn_constructor_kwargs={"model": str(checkpoint), **arguments},
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    assert {row["id"]: row["generated_text"] for row in done.take_all()} == {i: expected[i] for i in range(300)}
    assert (tmp_path / "died").exists()


def test_what_follows_from_other_arguments_is_refused(cluster, rows):
    data = ray.data.from_items(rows[:1])
    with pytest.raises(UsageError, match="compute follows from the arguments of generate"):
        flexmoe.ray.generate(data, "model", compute=None)
    with pytest.raises(UsageError, match="rows_in_flight is 0"):
        flexmoe.ray.generate(data, "model", rows_in_flight=0)
