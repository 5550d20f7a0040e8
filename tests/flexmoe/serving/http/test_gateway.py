"""The process that clients talk to: what it answers itself, what it asks the engine's process, and how both end."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

pytest.importorskip("uvicorn", reason="the server needs pip install 'flexmoe[serve]'")
pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

from flexmoe.errors import FlexMoEError  # noqa: E402
from flexmoe.serving.http.server import serving  # noqa: E402
from tests.support.serving import FLAGS, Killable, free_port, options_of  # noqa: E402


def test_what_many_ask_at_once_is_asked_once_of_the_engine_and_anew_after_a_write(server, monkeypatch):
    batches, asked = server.context.batches, []
    page = batches.page
    monkeypatch.setattr(batches, "page", lambda *args: asked.append(args) or page(*args))
    with httpx.Client(base_url=server.url) as client:
        several = [client.get("/v1/batches", params={"limit": 7}).json() for _ in range(20)]
        assert all(each == several[0] for each in several) and len(asked) < 10
        before = client.get("/v1/files").json()["data"]
        made = client.post("/v1/files", files={"file": ("a", b"x")}, data={"purpose": "batch"}).json()
        assert [each["id"] for each in client.get("/v1/files").json()["data"]] == [
            made["id"],
            *(e["id"] for e in before),
        ]
        client.delete(f"/v1/files/{made['id']}")
        assert client.get("/v1/files").json()["data"] == before


@pytest.mark.parametrize(
    "path", ["/v1/x/../files", "/v1/./files", "/v1/files/..%2Ffiles", "http://x/v1/files", "*", "/v1/files#x"]
)
def test_addresses_that_two_processes_could_read_differently_lead_nowhere(server, path):
    body = b'{"name": "a", "filename": "b", "fields": {"purpose": "batch"}}'
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answer = client.recv(65536)
    assert int(answer.split(b" ", 2)[1]) in (400, 404, 405)


def test_the_gateway_ends_with_the_engines_process_and_leaves_its_port(tiny_server_model, tmp_path):
    flags = ["--models", str(tiny_server_model), *FLAGS, "--data-dir", str(tmp_path), "--offload-dir", str(tmp_path)]
    port = free_port()
    for _ in range(2):  # the second one listens where the first one did a moment ago
        server = Killable(flags, port)
        server.wait("/ready")
        server.stop(signal.SIGKILL)
    end = time.monotonic() + 5
    with pytest.raises(httpx.HTTPError):
        while time.monotonic() < end:
            httpx.get(f"http://127.0.0.1:{port}/health")
            time.sleep(0.02)


def test_the_server_ends_where_the_gateway_does(tiny_server_model, tmp_path):
    failed = []
    with serving(options_of([tiny_server_model], tmp_path)) as found:

        def run():
            try:
                found.run()
            except FlexMoEError as error:
                failed.append(str(error))

        thread = threading.Thread(target=run)
        thread.start()
        httpx.get(f"{found.url}health")
        os.kill(found.gateway.process_id, signal.SIGKILL)
        thread.join(20)
    assert not thread.is_alive() and failed and "-9" in failed[0]


def test_the_process_that_clients_talk_to_loads_no_model_library():
    code = "import sys, flexmoe.serving.http.gateway_process; print(*{'torch', 'numpy', 'transformers'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not done.stdout.split()
