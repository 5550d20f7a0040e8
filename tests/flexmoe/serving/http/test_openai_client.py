"""The calls of the `openai` client, unchanged, against a server of a tiny model."""

import json
import threading

import pytest

pytest.importorskip("uvicorn", reason="the server needs pip install 'flexmoe[serve]'")
openai = pytest.importorskip("openai")

from tests.support.serving import (  # noqa: E402
    answer_of,
    chat_rows,
    jsonl,
    lines_of,
    options_of,
    running,
    start_batch,
    wait_for,
)

ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "hello world"}], "max_tokens": 9}


def test_models_are_listed_and_found(client):
    assert [(model.id, model.owned_by) for model in client.models.list()] == [("tiny", "flexmoe")]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt-4")
    assert refused.value.code == "model_not_found"


def test_files_are_uploaded_listed_read_and_deleted(client):
    data = b'{"prompt": "a"}\n' * 1000
    files = [client.files.create(file=(f"{n}.jsonl", data), purpose="batch") for n in range(3)]
    assert files[0].bytes == len(data) and files[0].filename == "0.jsonl" and files[0].status == "processed"
    assert client.files.content(files[0].id).content == data
    listed = [file.id for file in client.files.list(limit=2)]  # the client asks for page after page
    assert [each for each in listed if each in {file.id for file in files}] == [file.id for file in reversed(files)]
    ascending = client.files.list(limit=1, order="asc", after=files[0].id)
    assert ascending.data[0].id == files[1].id and ascending.has_more
    deleted = client.files.delete(files[0].id)
    assert deleted.deleted and deleted.id == files[0].id
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(files[0].id)


def test_a_file_may_expire(client):
    file = client.files.create(
        file=("a.jsonl", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert file.expires_at == file.created_at + 3600
    with pytest.raises(openai.BadRequestError):
        client.files.create(file=("a", b"{}"), purpose="batch", expires_after={"anchor": "created_at", "seconds": 5})


def test_a_chat_is_answered_whole_and_in_pieces_alike(client):
    whole = client.chat.completions.create(**ASKED)
    chunks = list(client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and len(chunks) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens <= 9
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].object == "chat.completion.chunk"


def test_prompts_are_completed_several_at_once_whole_and_in_pieces(client):
    asked = {
        "model": "tiny",
        "prompt": ["hello", "the quick brown"],
        "n": 2,
        "max_tokens": 7,
        "temperature": 0.9,
        "seed": 5,
    }
    whole = client.completions.create(**asked)
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [choice.text for choice in whole.choices] == list(texts.values())
    assert client.completions.create(**asked).choices == whole.choices, "a seed draws the same again"


def test_log_probabilities_stop_strings_and_token_ids_are_those_of_the_whole_answer(client):
    asked = ASKED | {"logprobs": True, "top_logprobs": 2, "stop": ["zzz", "q"]}
    whole = client.chat.completions.create(**asked).choices[0]
    last = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)][-1]
    assert last.logprobs.model_dump() == whole.logprobs.model_dump() and last.finish_reason == whole.finish_reason


def test_the_async_client_streams_too(server):
    import asyncio

    async def read():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
            stream = await found.chat.completions.create(**ASKED, stream=True)
            return [chunk async for chunk in stream]

    assert asyncio.run(read())[-1].choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    "change, param",
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "pilot", "content": "x"}]}, "messages[0].role"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"stop": ["x"] * 100}, "stop"),
        ({"extra_body": {"nonsense": 1}}, "nonsense"),
        ({"extra_body": {"stream_options": {"include_usage": True}}}, "stream_options"),
        ({"messages": [{"role": "user", "content": "word " * 900}]}, "messages"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_field_at_fault(client, change, param):
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**ASKED | change)
    assert refused.value.param == param and refused.value.type == "invalid_request_error"


def test_a_batch_is_run_and_its_objects_are_those_of_the_client(client):
    rows = chat_rows(20)
    rows[7]["body"]["max_tokens"] = 10**6
    batch = start_batch(client, rows, metadata={"name": "nightly"}, extra_body={"priority": 3})
    assert batch.status == "validating" and batch.metadata == {"name": "nightly"} and batch.object == "batch"
    done = wait_for(client, batch)
    counts = done.request_counts
    assert (done.status, counts.total, counts.completed, counts.failed) == ("completed", 20, 19, 1)
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at < done.expires_at
    assert (
        done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens and done.usage.output_tokens > 0
    )
    assert done.model == "tiny" and done.errors is None
    output = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    assert [line["custom_id"] for line in output] == [f"c{row}" for row in range(20) if row != 7]
    assert client.files.retrieve(done.output_file_id).purpose == "batch_output"
    [error] = client.files.content(done.error_file_id).text.splitlines()
    assert json.loads(error)["response"]["body"]["error"]["param"] == "max_tokens"
    assert client.batches.list(limit=1).data[0].id == batch.id


def test_the_usage_of_a_batch_is_that_of_its_lines_what_was_cached_included(client):
    rows = chat_rows(12)
    for row in rows:
        row["body"]["messages"].insert(0, {"role": "system", "content": "the quick brown fox " * 20})
    ended = wait_for(client, start_batch(client, rows))
    usages = [line["response"]["body"]["usage"] for line in lines_of(client, ended)]
    cached = sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages)
    assert ended.usage.input_tokens_details.cached_tokens == cached > 0
    assert ended.usage.input_tokens == sum(usage["prompt_tokens"] for usage in usages)
    assert ended.usage.output_tokens == sum(usage["completion_tokens"] for usage in usages)


def test_objects_hold_to_the_types_of_the_client(client, server):
    """The client itself takes whatever comes; its types are checked here as strictly as they can be."""
    import httpx
    from openai.types import Batch, FileObject, Model
    from openai.types.chat import ChatCompletion, ChatCompletionChunk

    rows = chat_rows(3)
    rows[1]["body"]["max_tokens"] = 10**6
    batch = start_batch(client, rows)
    web = httpx.Client(base_url=f"{server.url}/v1")
    Batch.model_validate(web.get(f"/batches/{batch.id}").json())
    ended = wait_for(client, batch)
    Batch.model_validate(web.get(f"/batches/{batch.id}").json())
    for file_id in (ended.input_file_id, ended.output_file_id, ended.error_file_id):
        FileObject.model_validate(web.get(f"/files/{file_id}").json())
    Model.model_validate(web.get("/models/tiny").json())
    ChatCompletion.model_validate(web.post("/chat/completions", json=ASKED).json())
    streamed = web.post("/chat/completions", json=ASKED | {"stream": True}).text.split("\n\n")
    assert streamed[-2:] == ["data: [DONE]", ""]
    for event in streamed[:-2]:
        ChatCompletionChunk.model_validate_json(event.removeprefix("data: "))
    failed = client.files.create(file=("in", b"no json"), purpose="batch")
    failed = client.batches.create(input_file_id=failed.id, endpoint="/v1/completions", completion_window="24h")
    assert wait_for(client, failed).errors.data[0].line == 1
    Batch.model_validate(web.get(f"/batches/{failed.id}").json())
    web.close()


def test_a_row_of_a_batch_is_answered_as_the_same_call_is(client):
    [line] = lines_of(client, wait_for(client, start_batch(client, chat_rows(1))))
    call = client.chat.completions.create(**chat_rows(1)[0]["body"])
    assert answer_of(line)[0]["message"]["content"] == call.choices[0].message.content


@pytest.mark.parametrize(
    "text, line, code",
    [
        (b'{"custom_id": "a", "prompt": "x"}\nno json\n', 2, "invalid_line"),
        (jsonl(chat_rows(2)) + jsonl(chat_rows(1)), 3, "invalid_line"),
        (jsonl(chat_rows(2)) + jsonl(chat_rows(1, model="other")).replace(b"c0", b"d"), 3, "model_not_found"),
        (jsonl(chat_rows(1)) + b'{"custom_id": "a", "prompt": "x"}\n', 2, "mismatched_endpoint"),
        (b"\n\n", None, "empty_file"),
    ],
)
def test_a_file_that_cannot_run_fails_its_batch_with_the_line(client, text, line, code):
    file = client.files.create(file=("in.jsonl", text), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    failed = wait_for(client, batch)
    assert failed.status == "failed" and failed.failed_at and failed.output_file_id is None
    assert (line, code) in [(fault.line, fault.code) for fault in failed.errors.data]


def test_the_output_can_be_read_while_the_batch_runs_and_a_cancel_keeps_it(client):
    batch = start_batch(client, _long(40, 90))
    while not (now := client.batches.retrieve(batch.id)).request_counts.completed:
        assert now.status in ("validating", "in_progress")
    assert now.output_file_id, "the file is there from the first line on"
    soon = client.files.content(now.output_file_id).text.splitlines()
    assert soon and all(json.loads(line)["response"]["status_code"] == 200 for line in soon)
    assert client.files.retrieve(now.output_file_id).bytes > 0
    assert {client.batches.cancel(batch.id).status for _ in range(3)} <= {"cancelling", "cancelled"}
    ended = wait_for(client, batch)
    assert ended.status == "cancelled" and ended.cancelled_at and client.batches.cancel(batch.id).status == "cancelled"
    lines = lines_of(client, ended)
    assert sorted(line["custom_id"] for line in lines) == sorted(f"c{row}" for row in range(40))
    answers = [answer_of(line) for line in lines]
    assert answers.count("batch_cancelled") == ended.request_counts.failed > 0
    kept = {json.loads(line)["custom_id"] for line in soon}
    assert kept <= {line["custom_id"] for line in lines if answer_of(line) != "batch_cancelled"}


def _long(count, tokens=150):
    rows = chat_rows(count, max_tokens=tokens)
    for row in rows:
        row["body"]["ignore_eos"] = True
    return rows


def test_a_batch_that_has_ended_cannot_be_cancelled(client):
    done = wait_for(client, start_batch(client, chat_rows(1)))
    with pytest.raises(openai.ConflictError):
        client.batches.cancel(done.id)


def test_a_batch_whose_time_is_over_has_an_error_line_for_every_row_that_did_not_run(client):
    batch = start_batch(client, _long(300), completion_window="1s")
    ended = wait_for(client, batch)
    assert ended.status == "expired" and ended.expired_at >= ended.expires_at
    lines = lines_of(client, ended)
    assert len({line["custom_id"] for line in lines}) == len(lines) == 300
    assert [answer_of(line) for line in lines].count("batch_expired") == ended.request_counts.failed > 0


def test_the_batch_outlives_its_input_file(client):
    file = client.files.create(file=("in.jsonl", jsonl(chat_rows(5))), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    client.files.delete(file.id)
    assert wait_for(client, batch).request_counts.completed == 5


def test_the_next_batch_fills_the_places_that_the_first_one_leaves(client):
    first, second = start_batch(client, _long(3, 250)), start_batch(client, chat_rows(6))
    assert wait_for(client, second).request_counts.completed == 6
    assert client.batches.retrieve(first.id).status == "in_progress", "both were in the engine"
    assert wait_for(client, first).request_counts.completed == 3


def test_a_batch_with_a_higher_priority_runs_before_older_ones(client):
    busy, old, urgent = (
        start_batch(client, _long(rows, 40), extra_body={"priority": priority})
        for rows, priority in ((48, 0), (24, 0), (8, 7))
    )
    assert wait_for(client, urgent).status == "completed"
    assert {client.batches.retrieve(batch.id).status for batch in (busy, old)} == {"in_progress"}
    for batch in (busy, old):
        client.batches.cancel(batch.id)
        wait_for(client, batch)


def test_a_chat_is_answered_while_a_batch_fills_the_engine(client, server):
    batch = start_batch(client, _long(80))
    wait_for(client, batch, "in_progress")
    answers = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(client.chat.completions.create(**ASKED).choices[0].message.content)
        )
        for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    now = client.batches.retrieve(batch.id)
    assert len(answers) == 12 and len(set(answers)) == 1
    assert now.status == "in_progress" and now.request_counts.completed < 80, "they did not wait for the batch"
    client.batches.cancel(batch.id)
    wait_for(client, batch)


def test_a_client_that_hangs_up_frees_its_place(client, server):
    stream = client.chat.completions.create(**ASKED | {"max_tokens": 400}, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    context = server.context
    for _ in range(200):
        if context.work_queue.requests == (0, 0):
            return
        threading.Event().wait(0.02)
    pytest.fail("the request still runs")


def test_stats_health_and_metrics_tell_of_what_ran(client, server):
    import httpx

    wait_for(client, start_batch(client, chat_rows(3)))
    found = {path: httpx.get(server.url + path) for path in ("/health", "/ready", "/metrics", "/v1/stats/memory")}
    assert all(answer.status_code == 200 for answer in found.values())
    metrics = found["/metrics"].text
    assert "flexmoe_generated_tokens_total" in metrics and 'route="/v1/files"' in metrics
    tiers = found["/v1/stats/memory"].json()["tiers"]
    assert tiers["gpu"]["planned_bytes"] > 0 and "weights" in tiers["gpu"]["items"]
    for _ in range(200):  # they are counted once a second
        performance = httpx.get(f"{server.url}/v1/stats/performance").json()
        if performance["totals"]["generated_tokens"]:
            break
        threading.Event().wait(0.05)
    assert performance["model"]["id"] == "tiny" and performance["totals"]["generated_tokens"] > 0
    experts = httpx.get(f"{server.url}/v1/stats/experts").json()
    assert performance["machine"]["cores"] >= 1 and experts["model"] == "tiny"


def test_two_models_take_turns_and_a_switch_loads_one(tiny_server_model, tmp_path):
    import shutil

    import httpx

    other = tmp_path / "other"
    shutil.copytree(tiny_server_model, other)
    with running(options_of([tiny_server_model, other], tmp_path)) as server, server.client() as client:
        batches = [start_batch(client, chat_rows(4, model=model)) for model in ("tiny", "other", "tiny", "other")]
        ended = [wait_for(client, batch) for batch in batches]
        assert [batch.request_counts.completed for batch in ended] == [4] * 4
        assert [batch.model for batch in ended] == ["tiny", "other", "tiny", "other"]
        assert client.chat.completions.create(**ASKED | {"model": "tiny"}).model == "tiny"
        answer = httpx.post(f"{server.url}/v1/models/switch", json={"model": "other"})
        assert answer.status_code == 202
        for _ in range(300):
            if server.context.engine.loaded == "other" and server.context.engine.state == "idle":
                break
            threading.Event().wait(0.02)
        assert client.models.retrieve("other").state == "loaded"


def test_rows_without_a_model_ask_for_the_only_one(client):
    file = client.files.create(file=("in.jsonl", b'{"custom_id": "a", "prompt": "hello"}\n'), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    [line] = lines_of(client, wait_for(client, batch))
    assert line["response"]["body"]["model"] == "tiny"
