"""What a server is not meant to be asked: each is refused with its own status, and the server goes on."""

import contextlib
import json
import socket
import time

import pytest

pytest.importorskip("uvicorn", reason="the server needs pip install 'flexmoe[serve]'")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

from flexmoe.serving.limits import Limits  # noqa: E402
from tests.support.serving import chat_rows, options_of, running, start_batch, wait_for  # noqa: E402

KEY = "a-long-secret-key"
LIMITS = Limits(
    upload_bytes=200_000,
    body_bytes=20_000,
    header_bytes=4000,
    open_batches=2,
    rows=50,
    concurrent_requests=3,
    uploads=2,
    idle_s=0.6,
)
FORM = {"purpose": "batch"}


@pytest.fixture(scope="module")
def strict(tiny_server_model, tmp_path_factory):
    with running(options_of([tiny_server_model], tmp_path_factory.mktemp("strict"), limits=LIMITS)) as found:
        yield found


@pytest.fixture(scope="module")
def locked(tiny_server_model, tmp_path_factory):
    with running(options_of([tiny_server_model], tmp_path_factory.mktemp("locked"), api_key=KEY)) as found:
        yield found


@pytest.fixture
def web(strict):
    with httpx.Client(base_url=strict.url) as found:
        yield found
        assert found.get("/health").json() == {"status": "ok"}, "the server goes on"


def code(answer):
    return answer.status_code, answer.json()["error"]["code"]


def raw(port, data, *, seconds=5.0):
    """What a server answers to bytes, until it hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as client:
        client.sendall(data)
        answer = b""
        with contextlib.suppress(socket.timeout, ConnectionResetError):
            while piece := client.recv(65536):
                answer += piece
    return answer


def status(answer):
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files/..%2F..%2Fserver.sqlite",
        "/v1/files/..%2F..%2F..%2Fetc%2Fpasswd/content",
        "/v1/files/%2e%2e/%2e%2e/server.sqlite",
        "/v1/files/file-0000%00/content",
        "/v1/batches/..%2f..%2flock",
        "/page.js/../../serve.py",
        "/..%2fsetup.cfg",
        "/v1/models/..%2f..%2fetc",
    ],
)
def test_paths_out_of_the_data_lead_nowhere(web, path):
    answer = web.get(path)
    assert answer.status_code == 404 and "root:" not in answer.text and "SQLite" not in answer.text


def test_a_filename_is_a_name_and_no_path(web, strict):
    name = "../../../../tmp/evil\r\nset-cookie: a=b"
    made = web.post("/v1/files", files={"file": (name, b"{}\n")}, data=FORM)
    assert made.status_code == 200
    content = web.get(f"/v1/files/{made.json()['id']}/content")
    assert "set-cookie" not in content.headers and "evil" not in content.headers["content-disposition"]
    data = strict.context.options.data_dir
    assert made.json()["id"] in [path.name for path in (data / "files").iterdir()]


def test_keys_are_checked_everywhere_but_on_the_page_and_health(locked):
    with httpx.Client(base_url=locked.url) as client:
        for path in (
            "/v1/models",
            "/v1/files",
            "/v1/batches",
            "/metrics",
            "/v1/stats/memory",
            "/openapi.json",
            "/nowhere",
        ):
            assert code(client.get(path)) == (401, "invalid_api_key")
        for given in ("Bearer wrong", "Bearer", f"Basic {KEY}", KEY, f"Bearer {KEY}x"):
            assert client.get("/v1/models", headers={"authorization": given}).status_code == 401
        assert client.get("/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        assert [client.get(path).status_code for path in ("/", "/page.js", "/engine.js", "/health", "/ready")] == [
            200
        ] * 5
        assert client.get("/v1/models").headers["www-authenticate"] == "Bearer"
    with locked.client(api_key=KEY) as client:
        assert client.models.list().data[0].id == "tiny"
    with locked.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


@pytest.mark.parametrize(
    "headers", [{"origin": "https://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}]
)
@pytest.mark.parametrize("path", ["/v1/batches", "/v1/files", "/v1/models/switch", "/v1/chat/completions"])
def test_pages_of_other_sites_change_nothing(web, path, headers):
    assert code(web.post(path, json={}, headers=headers)) == (403, "cross_origin")


def test_the_own_page_may_post_and_no_site_may_read(web, strict):
    answer = web.post("/v1/models/switch", json={"model": "none"}, headers={"origin": strict.url})
    assert answer.status_code == 404
    answer = web.get("/v1/models", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    assert web.options("/v1/files", headers={"origin": "https://evil.example"}).status_code == 405


def test_a_name_that_another_site_has_pointed_here_is_refused(web):
    assert code(web.get("/v1/models", headers={"host": "evil.example"})) == (421, "wrong_host")
    assert web.get("/v1/models", headers={"host": "localhost:1234"}).status_code == 200


@pytest.mark.parametrize("host", ["[", "[::1", "[x]", "a b", "localhost, evil", "\x7f"])
def test_hosts_and_origins_that_are_none_are_refused(strict, host):
    ask = f"GET /v1/models HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"
    assert status(raw(strict.port, ask.encode())) in (400, 421)
    ask = f"POST /v1/batches HTTP/1.1\r\nhost: localhost\r\norigin: http://{host}\r\nconnection: close\r\n\r\n"
    assert status(raw(strict.port, ask.encode())) in (400, 403)


def test_a_body_of_ten_gigabytes_is_refused_before_it_comes(strict):
    for path, kind in (("/v1/files", "multipart/form-data; boundary=x"), ("/v1/batches", "application/json")):
        head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\ncontent-length: 10000000000\r\n\r\n"
        began = time.monotonic()
        answer = raw(strict.port, head.encode())
        assert status(answer) == 413 and b"too_large" in answer and b"connection: close" in answer.lower()
        assert time.monotonic() - began < 2


def test_uploads_and_bodies_that_are_too_long_are_refused_wherever_that_shows(web):
    assert code(web.post("/v1/files", files={"file": ("a", b"x" * 400_000)}, data=FORM)) == (413, "too_large")
    assert code(web.post("/v1/files", files={"file": ("a", b"x" * 220_000)}, data=FORM)) == (413, "too_large")

    def pieces():
        for _ in range(40):
            yield b" " * 1000

    chunked = web.post("/v1/batches", content=pieces(), headers={"content-type": "application/json"})
    assert code(chunked) == (413, "too_large")
    assert web.post("/v1/files", files={"file": ("a", b"x" * 150_000)}, data=FORM).status_code == 200


def test_headers_that_are_too_long_are_refused(web, strict):
    assert code(web.get("/v1/models", headers={"x-long": "a" * 5000})) == (431, "headers_too_large")
    assert status(raw(strict.port, b"GET / HTTP/1.1\r\nx: " + b"a" * 100_000)) == 431


def test_slow_clients_are_not_waited_for(strict):
    began = time.monotonic()
    assert status(raw(strict.port, b"GET /health HTTP/1.1\r\nhost: local")) == 408
    head = (
        b"POST /v1/batches HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{"
    )
    answer = raw(strict.port, head)
    assert status(answer) == 408 and b"request_timeout" in answer
    assert time.monotonic() - began < 6


def test_a_body_that_comes_byte_by_byte_is_not_waited_for(strict):
    head = "POST /v1/batches HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 5000\r\n\r\n{"
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", strict.port), timeout=0.1) as client:
        client.sendall(head.encode())
        answer = b""
        while not answer and time.monotonic() - began < 10:
            client.sendall(b" ")
            with contextlib.suppress(socket.timeout):
                answer = client.recv(65536)
    assert status(answer) == 408 and time.monotonic() - began < 5


def test_a_client_that_does_not_read_its_answer_is_hung_up_on(tiny_server_model, tmp_path):
    limits, size = Limits(idle_s=0.5), 50_000_000
    with running(options_of([tiny_server_model], tmp_path, limits=limits)) as server:
        with httpx.Client(base_url=server.url) as client:
            made = client.post("/v1/files", files={"file": ("a", bytes(size))}, data=FORM).json()
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as client:
            client.sendall(f"GET /v1/files/{made['id']}/content HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            time.sleep(2)
            received = 0
            with contextlib.suppress(ConnectionResetError):
                while piece := client.recv(1 << 20):
                    received += len(piece)
        assert 0 < received < size


def test_half_an_upload_leaves_nothing(web, strict):
    body = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"data" * 1000
    head = f"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=x\r\ncontent-length: {len(body) + 99}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", strict.port)) as client:
        client.sendall(head.encode() + body)
    answer = web.post("/v1/files", content=body, headers={"content-type": "multipart/form-data; boundary=x"})
    assert code(answer) == (400, "incomplete_body")
    uploads = strict.context.options.data_dir / "uploads"
    for _ in range(100):
        if not list(uploads.iterdir()):
            return
        time.sleep(0.02)
    pytest.fail("the half upload is still there")


@pytest.mark.parametrize(
    "content, kind, expected",
    [
        (b"[" * 5000, "application/json", (400, "invalid_json")),
        (b'{"a":' * 3000 + b"1" + b"}" * 3000, "application/json", (400, "invalid_json")),
        (b'{"model": "tiny", "model": "tiny"}', "application/json", (400, "invalid_json")),
        (b'{"a": NaN}', "application/json", (400, "invalid_json")),
        (b'{"a": ' + b"9" * 10000 + b"}", "application/json", (400, "invalid_json")),
        (b"\xff\xfe", "application/json", (400, "invalid_json")),
        (b"[]", "application/json", (400, "invalid_json")),
        (b"{}", "text/plain", (415, "unsupported_media_type")),
        (b"", "application/json", (400, "invalid_json")),
    ],
)
@pytest.mark.parametrize("path", ["/v1/batches", "/v1/chat/completions", "/v1/models/switch"])
def test_bodies_that_are_no_object_are_refused(web, path, content, kind, expected):
    assert code(web.post(path, content=content, headers={"content-type": kind})) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nx: a\rb: c\r\n\r\n",
        b"GET /v1/models\r\nset-cookie: a HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n",
        b"POST /v1/batches HTTP/1.1\r\nhost: localhost\r\ncontent-length: 3\r\ncontent-length: 9\r\n\r\nabc",
        b"POST /v1/batches HTTP/1.1\r\nhost: localhost\r\ncontent-length: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
    ],
)
def test_broken_requests_are_refused(strict, data):
    assert status(raw(strict.port, data)) in (400, 421)


@pytest.mark.parametrize("more", [{"prompt": ["a"] * 2049}, {"prompt": ["a"] * 20, "n": 128}])
def test_an_online_request_cannot_fill_the_engine_with_choices(web, more):
    answer = web.post("/v1/completions", json={"model": "tiny", "max_tokens": 1, **more})
    assert code(answer) == (400, "invalid_value") and "make a batch" in answer.json()["error"]["message"]


def test_carriage_returns_in_what_is_asked_reach_no_header(web):
    answer = web.get("/v1/files/a%0d%0aset-cookie:%20a=b")
    assert answer.status_code == 404 and "set-cookie" not in answer.headers
    answer = web.get("/v1/models", headers={"x-note": "a"}, params={"q": "\r\nset-cookie: a=b"})
    assert answer.status_code == 200 and "set-cookie" not in answer.headers


def test_html_comes_back_as_json_that_no_browser_runs(web):
    answer = web.get("/v1/files/%3Cscript%3Ealert(1)%3C%2Fscript%3E")
    assert answer.status_code == 404 and answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = web.get("/")
    assert "unsafe-inline" not in page.headers["content-security-policy"] and "http" not in page.text.replace(
        "<!doctype html>", ""
    )
    made = web.post("/v1/files", files={"file": ("a.html", b"<script>alert(1)</script>")}, data=FORM).json()
    content = web.get(f"/v1/files/{made['id']}/content")
    assert (
        content.headers["content-type"] == "application/octet-stream"
        and "sandbox" in content.headers["content-security-policy"]
    )


@pytest.mark.parametrize(
    "change, param",
    [
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"input_file_id": 3}, "input_file_id"),
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1 fortnight"}, "completion_window"),
        ({"completion_window": "365d"}, "completion_window"),
        ({"completion_window": "٣h"}, "completion_window"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"priority": 1e9}, "priority"),
        ({"priority": True}, "priority"),
        ({"output_expires_after": {"anchor": "now", "seconds": 9}}, "output_expires_after"),
        ({"callback": "http://evil"}, "callback"),
    ],
)
def test_a_batch_of_nonsense_is_refused_with_the_field(web, change, param):
    made = web.post("/v1/files", files={"file": ("a", b"{}\n")}, data=FORM).json()
    body = {"input_file_id": made["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
    answer = web.post("/v1/batches", json=body | change)
    assert answer.status_code in (400, 404) and answer.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "query", ["limit=0", "limit=-1", "limit=x", "limit=99999999999", "after=file-none", "order=up"]
)
def test_lists_refuse_cursors_and_limits_that_are_none(web, query):
    assert web.get(f"/v1/files?{query}").status_code in (400, 404)


def test_forms_without_a_file_with_two_or_of_another_purpose_are_refused(web):
    assert web.post("/v1/files", files={"other": ("a", b"x")}, data=FORM).status_code == 400
    assert web.post("/v1/files", files=[("file", ("a", b"x")), ("file", ("b", b"y"))], data=FORM).status_code == 400
    assert web.post("/v1/files", files={"file": ("a", b"x")}, data={"purpose": "crime"}).status_code == 400
    assert web.post("/v1/files", files={"file": ("a", b"x")}, data=FORM | {"more": "x"}).status_code == 400
    assert web.post("/v1/files", data=FORM).status_code == 415
    assert web.post("/v1/files", content=b"x", headers={"content-type": "multipart/form-data"}).status_code == 415


def test_too_many_batches_rows_and_requests_are_busy(strict):
    with strict.client() as client:
        many = wait_for(client, start_batch(client, chat_rows(51)))
        assert many.status == "failed" and many.errors.data[0].code == "too_many_requests"
        rows = chat_rows(50, max_tokens=400)
        for row in rows:
            row["body"]["ignore_eos"] = True
        running_ones = [start_batch(client, rows) for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as refused:
            start_batch(client, rows)
        assert refused.value.code == "busy" and int(refused.value.response.headers["retry-after"]) > 0
        asked = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 400}
        streams = [
            client.chat.completions.create(**asked, stream=True, extra_body={"ignore_eos": True}) for _ in range(3)
        ]
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(**asked)
        for stream in streams:
            stream.close()
        for batch in running_ones:
            client.batches.cancel(batch.id)
        assert all(wait_for(client, batch).status == "cancelled" for batch in running_ones)


@pytest.mark.parametrize("data", [b"\n" * 150_000, b"{}\n" * 60_000], ids=["blank lines", "short lines"])
def test_a_file_of_many_lines_is_not_read_line_by_line(strict, data):
    from flexmoe.inputs.request_file import RequestFile

    with pytest.MonkeyPatch.context() as patch, strict.client() as client:
        patch.setattr(RequestFile, "open", lambda *_, **__: pytest.fail("the file is read"))
        file = client.files.create(file=("in.jsonl", data), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        failed = wait_for(client, batch)
    assert [fault.code for fault in failed.errors.data] == ["too_many_requests"]


def test_too_many_uploads_at_one_time_are_busy(web, strict):
    head = "POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=x\r\ncontent-length: 5000\r\n\r\n--x"
    with contextlib.ExitStack() as stack:
        for _ in range(LIMITS.uploads):
            client = stack.enter_context(socket.create_connection(("127.0.0.1", strict.port)))
            client.sendall(head.encode())
        for _ in range(100):
            answer = web.post("/v1/files", files={"file": ("a", b"x")}, data=FORM)
            if answer.status_code != 200:
                break
    assert code(answer) == (429, "busy") and int(answer.headers["retry-after"]) > 0


def test_a_full_disk_is_said(tiny_server_model, tmp_path):
    options = options_of([tiny_server_model], tmp_path, limits=Limits(free_disk_bytes=1 << 60))
    with running(options) as server:
        answer = httpx.post(f"{server.url}/v1/files", files={"file": ("a", b"x")}, data=FORM)
    assert code(answer) == (507, "disk_full")


def test_a_second_server_of_the_same_data_is_refused(strict, tiny_server_model):
    from flexmoe.errors import UsageError
    from flexmoe.serving.http.server import parts

    with pytest.raises(UsageError, match="lock|holds|run"), parts(strict.context.options):
        pass


def test_errors_have_one_form(web):
    for answer in (web.get("/nowhere"), web.put("/v1/files"), web.get("/v1/batches?limit=x")):
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert json.loads(web.get("/openapi.json").text)["paths"].keys() >= {
        "/v1/files",
        "/v1/batches",
        "/v1/chat/completions",
    }
