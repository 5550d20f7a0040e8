"""A server that ends, however it ends, resumes every batch by itself at its next start."""

import contextlib
import random
import signal
import threading
import time

import pytest

pytest.importorskip("uvicorn", reason="the server needs pip install 'flexmoe[serve]'")
openai = pytest.importorskip("openai")

from flexmoe.serving.work import lifecycle  # noqa: E402
from tests.support.serving import (  # noqa: E402
    ENDED,
    FLAGS,
    Killable,
    answer_of,
    chat_rows,
    free_port,
    jsonl,
    lines_of,
    options_of,
    running,
    start_batch,
    wait_for,
)

KINDS = ({}, {"temperature": 0.8}, {"n": 2, "temperature": 0.7}, {"max_tokens": 10**6}, {"temperature": 1.1, "seed": 4})


def rows_of(count, seed=0, tokens=40):
    rng = random.Random(seed)
    rows = chat_rows(count)
    for row in rows:
        row["body"] |= {"max_tokens": rng.randrange(1, tokens), "ignore_eos": True} | rng.choice(KINDS)
    return rows


def test_a_stopped_server_resumes_its_batches_with_the_tokens_that_they_had(tiny_server_model, tmp_path):
    options = options_of([tiny_server_model], tmp_path, checkpoint_interval_s=0.02)
    rows = rows_of(16, tokens=40)
    with running(options) as server, server.client() as client:
        whole = wait_for(client, start_batch(client, rows))
        expected = {line["custom_id"]: answer_of(line) for line in lines_of(client, whole)}
        cut = start_batch(client, rows)
        while not client.batches.retrieve(cut.id).request_counts.completed > 2:
            time.sleep(0.01)
    with running(options) as server, server.client() as client:
        end = time.monotonic() + 20
        while not server.context.lifecycle.is_ready:
            assert time.monotonic() < end
            time.sleep(0.01)
        run = server.context.work_queue.run(cut.id)
        assert run is None or run.job.row_stream is not None
        ended = wait_for(client, cut)
        assert ended.status == "completed" and ended.request_counts == whole.request_counts
        assert {line["custom_id"]: answer_of(line) for line in lines_of(client, ended)} == expected
        assert client.batches.retrieve(whole.id).status == "completed"


def test_the_server_is_ready_once_every_open_batch_is_at_work_again(tiny_server_model, tmp_path, monkeypatch):
    httpx = pytest.importorskip("httpx")
    options, let = options_of([tiny_server_model], tmp_path), threading.Event()
    with running(options) as server, server.client() as client:
        batch = start_batch(client, rows_of(60, tokens=200))
        wait_for(client, batch, "in_progress")
    opened = lifecycle.open_job

    def waiting(*args, **more):
        assert let.wait(20)
        return opened(*args, **more)

    monkeypatch.setattr(lifecycle, "open_job", waiting)
    with running(options) as server, server.client() as client:
        try:
            answer = httpx.get(f"{server.url}/ready")
            assert (answer.status_code, answer.json()["status"]) == (503, "recovering")
            assert int(answer.headers["retry-after"]) > 0 and httpx.get(f"{server.url}/health").status_code == 200
        finally:
            let.set()
        end = time.monotonic() + 20
        while httpx.get(f"{server.url}/ready").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.01)
        client.batches.cancel(batch.id)
        wait_for(client, batch)


def test_an_engine_that_fails_is_made_anew_and_the_batch_goes_on(tiny_server_model, tmp_path, monkeypatch):
    from flexmoe.engine.engine import Engine

    step, failures = Engine.step, iter([False] * 5 + [True] + [False] * 7 + [True])

    def failing(self):
        if next(failures, False):
            raise RuntimeError("the device was lost")
        return step(self)

    monkeypatch.setattr(Engine, "step", failing)
    with running(options_of([tiny_server_model], tmp_path)) as server, server.client() as client:
        ended = wait_for(client, start_batch(client, rows_of(20)))
        lines = lines_of(client, ended)
        assert ended.status == "completed" and len({line["custom_id"] for line in lines}) == len(lines) == 20
        assert server.context.stats.failures == 2 and "engine_error" not in map(str, map(answer_of, lines))


def test_an_engine_that_fails_again_and_again_gives_every_row_a_line(tiny_server_model, tmp_path, monkeypatch):
    from flexmoe.engine.engine import Engine

    def failing(self):
        raise RuntimeError("the device was lost")

    monkeypatch.setattr(Engine, "step", failing)
    with running(options_of([tiny_server_model], tmp_path)) as server, server.client() as client:
        ended = wait_for(client, start_batch(client, chat_rows(9)))
        answers = [answer_of(line) for line in lines_of(client, ended)]
        assert ended.status == "completed" and answers == ["engine_error"] * 9
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])


class Load:
    """Clients that go on sending batches, whatever becomes of the server.

    Args:
        port: of the server.
        count: batches.
    """

    def __init__(self, port, count, seed):
        self.url, self.rng = f"http://127.0.0.1:{port}/v1", random.Random(seed)
        self.rows = {}
        self.cancelled, self.count = set(), count
        self.left = threading.Event()
        self.thread = threading.Thread(target=self._send)
        self.thread.start()

    def client(self):
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=20)

    def _send(self):
        with self.client() as client:
            while len(self.rows) < self.count and not self.left.is_set():
                rows = rows_of(self.rng.randrange(1, 40), self.rng.random())
                try:
                    file = client.files.create(file=("in.jsonl", jsonl(rows)), purpose="batch")
                    batch = client.batches.create(
                        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
                    )
                except (openai.APIConnectionError, openai.APIStatusError):
                    time.sleep(0.01)
                    continue
                self.rows[batch.id] = rows
                if self.rng.random() < 0.25:
                    with contextlib.suppress(openai.APIConnectionError, openai.ConflictError):
                        time.sleep(self.rng.random() * 0.3)
                        client.batches.cancel(batch.id)
                        self.cancelled.add(batch.id)
                time.sleep(self.rng.random() * 0.2)


def check_killed(model, tmp_path, kills, seed, batches):
    port, rng = free_port(), random.Random(seed)
    flags = [
        "--models",
        str(model),
        *FLAGS,
        "--offload-dir",
        str(tmp_path / "offload"),
        "--checkpoint-interval",
        "0.02",
    ]
    arguments = [*flags, "--data-dir", str(tmp_path / "data"), "--least-turn", "0"]
    server, load, done = Killable(arguments, port), Load(port, batches, seed), 0
    try:
        while done < kills:
            if rng.random() < 0.7:
                server.wait("/health")
            time.sleep(rng.random() ** 2 * 1.2)
            server.stop(signal.SIGKILL)
            done += 1
            server = Killable(arguments, port)
        server.wait("/ready")
        load.thread.join(120)
        check_all_ended(load, tmp_path, model)
    finally:
        load.left.set()
        load.thread.join(30)
        server.stop(signal.SIGTERM)
    return load


def check_all_ended(load, tmp_path, model):
    assert len(load.rows) == load.count, "the clients sent all their batches"
    undisturbed = options_of([model], tmp_path / "undisturbed")
    with load.client() as client, running(undisturbed) as other, other.client() as whole:
        for batch_id, rows in load.rows.items():
            ended = wait_for(client, client.batches.retrieve(batch_id), seconds=120)
            assert ended.status in ENDED and ended.status == (
                "cancelled" if batch_id in load.cancelled else ended.status
            )
            lines = lines_of(client, ended)
            found = {line["custom_id"]: answer_of(line) for line in lines}
            assert len(found) == len(lines) == len(rows), f"{batch_id} is {ended.status}"
            expected = {
                line["custom_id"]: answer_of(line)
                for line in lines_of(whole, wait_for(whole, start_batch(whole, rows)))
            }
            different = {name for name in expected if found[name] not in (expected[name], "batch_cancelled")}
            assert not different, f"{batch_id}: {different}"
            assert ended.status == "cancelled" or "batch_cancelled" not in map(str, found.values())
        listed = [batch.id for batch in client.batches.list(limit=100)]
        assert set(load.rows) <= set(listed)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_nothing_is_lost_in_a_hundred_kills(tiny_server_model, tmp_path):
    load = check_killed(tiny_server_model, tmp_path, kills=100, seed=5, batches=60)
    print(
        f"{len(load.rows)} batches, {sum(map(len, load.rows.values()))} rows, {len(load.cancelled)} cancelled, 100 kills"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_nothing_is_lost_in_three_kills(tiny_server_model, tmp_path):
    check_killed(tiny_server_model, tmp_path, kills=3, seed=2, batches=6)
