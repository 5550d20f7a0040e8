"""Requests that schemathesis makes of the server's own description: none is answered by a fault of the server."""

import pytest

pytest.importorskip("uvicorn", reason="the server needs pip install 'flexmoe[serve]'")
pytest.importorskip("schemathesis", reason="random requests need pip install 'flexmoe[bench]'")

from scripts.serving.fuzz import fuzz  # noqa: E402


@pytest.mark.slow
def test_random_requests_meet_no_fault_of_the_server(server):
    record = fuzz(server.url, 15)
    assert not record["faults"], record["faults"][:5]
    assert record["statuses"].keys() >= {
        "POST /v1/files",
        "POST /v1/batches",
        "POST /v1/chat/completions",
        "GET /ready",
    }
    assert all(record["statuses"].values()), "every endpoint was asked"
