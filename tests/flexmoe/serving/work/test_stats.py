"""What the server tells of its engine: lanes and rows of each batch over time, and what the planner says would help."""

import time

import pytest

pytest.importorskip("uvicorn", reason="the server needs pip install 'flexmoe[serve]'")
pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

from tests.support.serving import chat_rows, options_of, planned, running, start_batch, wait_for  # noqa: E402


def told(server, until, seconds=30):
    """`/v1/stats/performance` once it holds."""
    end = time.monotonic() + seconds
    while not until(found := httpx.get(f"{server.url}/v1/stats/performance").json()):
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def long_batch(client):
    rows = chat_rows(200, max_tokens=400)
    for row in rows:
        row["body"]["ignore_eos"] = True
    return start_batch(client, rows)


def test_rows_and_lanes_of_a_batch_are_told_over_time_apart_from_those_of_others(server, client):
    first = long_batch(client)
    assert told(server, lambda found: any(first.id in each["batches"] for each in found["history"]))
    second = start_batch(client, chat_rows(3), extra_body={"priority": 5})
    wait_for(client, second)
    client.batches.cancel(first.id)
    wait_for(client, first)
    history = httpx.get(f"{server.url}/v1/stats/performance").json()["history"]
    with_first = [each for each in history if first.id in each["batches"]]
    assert all(0 <= rows <= each["rows_in_flight"] for each in with_first for rows in each["batches"].values())
    assert max(each["batches"][first.id] for each in with_first) > 0
    assert all(0 <= share <= 1 for each in with_first for share in each["lanes"].values()) and with_first[0]["lanes"]


def test_a_given_policy_comes_without_advice(server, client):
    client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=1)
    model = told(server, lambda found: found["model"] is not None)["model"]
    assert model["advice"] == [] and not model["planned"]


@pytest.mark.slow
def test_the_planners_advice_is_told_where_the_policy_is_its_own(tiny_server_model, tmp_path):
    options = planned(
        options_of([tiny_server_model], tmp_path), tmp_path / "machine.json", gpu_batch_size=8, num_gpu_batches=2
    )
    with running(options) as server:
        httpx.post(f"{server.url}/v1/models/switch", json={"model": "tiny"})
        found = told(server, lambda found: found["model"] is not None and found["model"]["advice"] is not None, 120)
        assert found["model"]["planned"] and found["model"]["predicted"]["lanes"]
        advice = found["model"]["advice"]
        assert advice and all(": " in each and ("%" in each or "x" in each) for each in advice)
        assert any("twice as fast" in each or "memory" in each or "weights" in each for each in advice)
