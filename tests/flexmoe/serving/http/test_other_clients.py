"""Other public clients than OpenAI's for Python, unchanged: LiteLLM, and OpenAI's for Node.

They are not among the packages of the tests: `pip install litellm`, and `npm install openai` in a directory whose
``node_modules`` is given as ``NODE_PATH``.
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

pytest.importorskip("uvicorn", reason="the server needs pip install 'flexmoe[serve]'")

from tests.support.serving import ENDED, chat_rows, jsonl  # noqa: E402

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[3] / "support" / "openai_client.cjs"


def test_openais_client_for_node_runs_a_batch_and_streams(server):
    node = shutil.which("node")
    if node is None or subprocess.run([node, "-e", "require('openai')"], capture_output=True).returncode:
        pytest.skip("there is no node, or NODE_PATH has no `openai`")
    environment = os.environ | {"OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": "none"}
    done = subprocess.run([node, SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["models"] == ["tiny"] and told["status"] == "completed" and told["deleted"]
    assert told["counts"] == {"total": 3, "completed": 3, "failed": 0}
    assert [told["streamed"], *told["answers"]] == [told["chat"]] * 4 and 0 < told["tokens"] <= 8
    assert told["listed"].count(True) == 1 and told["refused"] == ["NotFoundError", 404, "model_not_found"]


def test_litellm_runs_a_batch_and_streams(server, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the internet for prices
    litellm = pytest.importorskip("litellm")
    about = {"api_base": f"{server.url}/v1", "api_key": "none"}
    asked = {"model": "openai/tiny", "messages": [{"role": "user", "content": "hello world"}], "max_tokens": 8, **about}
    whole = litellm.completion(**asked).choices[0].message.content
    pieces = litellm.completion(**asked, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole
    about["custom_llm_provider"] = "openai"
    file = litellm.create_file(file=("rows.jsonl", jsonl(chat_rows(5))), purpose="batch", **about)
    batch = litellm.create_batch(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", **about
    )
    end = time.monotonic() + 60
    while (batch := litellm.retrieve_batch(batch_id=batch.id, **about)).status not in ENDED:
        assert time.monotonic() < end
        time.sleep(0.05)
    lines = litellm.file_content(file_id=batch.output_file_id, **about).text.splitlines()
    assert batch.status == "completed" and [json.loads(line)["custom_id"] for line in lines] == [
        f"c{row}" for row in range(5)
    ]
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**asked | {"model": "openai/none"})
