"""A server of a tiny model, in this process or in one that can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace

from flexmoe.batch.options import RunOptions
from flexmoe.serving.limits import Limits
from flexmoe.serving.settings import ServerOptions

ENDED = ("completed", "failed", "cancelled", "expired")
FLAGS = [
    "--device",
    "cpu",
    "--dtype",
    "float32",
    "--percent",
    "100",
    "0",
    "100",
    "0",
    "100",
    "0",
    "--gpu-batch-size",
    "8",
]


def make_model(directory, seed=1):
    """A random Mixtral of two layers with a tokenizer and a chat template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.support.tiny import BASE
    from tests.support.tokenizers import build_tokenizer

    torch.manual_seed(seed)
    config = AutoConfig.for_model("mixtral", **BASE | {"vocab_size": 320, "num_hidden_layers": 2})
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").float().eval()
    model.generation_config.eos_token_id = 2
    model.save_pretrained(directory)
    build_tokenizer(directory)
    return directory


def options_of(models, data_dir, *, limits=None, **values):
    run = RunOptions(
        model=str(models[0]),
        device="cpu",
        dtype="float32",
        percent=(100, 0, 100, 0, 100, 0),
        gpu_batch_size=8,
        offload_dir=data_dir / "offload",
    )
    given = {"port": 0, "least_turn_s": 0.0, "checkpoint_interval_s": 0.05} | values
    return ServerOptions(models=tuple(models), run=run, data_dir=data_dir / "data", limits=limits or Limits(), **given)


def planned(options, machine, **fixed):
    """The options of a server that plans its policy, for a machine of the presets.

    Args:
        machine: a file that is written.
    """
    from cost_model import Hardware

    Hardware.preset("cpu").save(machine)
    budgets = {"gpu_mem": 0.004, "cpu_mem": 0.004, "nvme_mem": 0.1}
    run = replace(options.run, percent=None, gpu_batch_size=None, hardware=machine, **budgets)
    return replace(options, run=replace(run, **fixed))


class Running:
    """A server that answers.

    Args:
        url: without a slash at its end.
        context: its parts.
    """

    def __init__(self, url, context):
        self.url, self.context = url, context
        self.port = int(url.rsplit(":", 1)[1])

    def client(self, **options):
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", max_retries=0, **{"api_key": "none", **options})


@contextlib.contextmanager
def running(options):
    """The server of some options: its engine in this process, and the process that clients talk to."""
    from flexmoe.serving.http.server import serving

    with serving(options) as found:
        thread = threading.Thread(target=found.run, daemon=True)
        thread.start()
        try:
            yield Running(found.url.rstrip("/"), found.context)
        finally:
            found.server.should_exit = True
            thread.join(20)


def chat_rows(count, *, model="tiny", max_tokens=6, **more):
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    return [
        {
            "custom_id": f"c{row}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": model,
                "messages": [{"role": "user", "content": " ".join(words[: 1 + row % 9])}],
                "max_tokens": max_tokens,
                **more,
            },
        }
        for row in range(count)
    ]


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def start_batch(client, rows, **options):
    file = client.files.create(file=("rows.jsonl", jsonl(rows)), purpose="batch")
    given = {"endpoint": "/v1/chat/completions", "completion_window": "24h"} | options
    return client.batches.create(input_file_id=file.id, **given)


def wait_for(client, batch, *states, seconds=60.0):
    """The batch once it is in one of the states; those that are final by default."""
    end = time.monotonic() + seconds
    while (now := client.batches.retrieve(batch.id)).status not in (states or ENDED):
        assert time.monotonic() < end, f"the batch is still {now.status}: {now.request_counts}"
        time.sleep(0.02)
    return now


def lines_of(client, batch):
    """All lines of output and errors of a batch that has ended, in no order."""
    ids = [file_id for file_id in (batch.output_file_id, batch.error_file_id) if file_id]
    return [json.loads(line) for file_id in ids for line in client.files.content(file_id).text.splitlines()]


def answer_of(line):
    """What a line says, without what differs from one batch to another."""
    if line["response"] is None:
        return line["error"]["code"]
    body = line["response"]["body"]
    return body.get("choices") or body["error"]["code"]


class Killable:
    """A server in a process of its own, forked from this one, which has loaded torch already.

    Args:
        arguments: of the command line, beside the port.
        port: where it listens.
    """

    def __init__(self, arguments, port):
        self.url = f"http://127.0.0.1:{port}"
        self.process = os.fork()
        if self.process == 0:
            self._serve([*arguments, "--port", str(port)])

    def _serve(self, arguments):
        from flexmoe.cli import serve as command

        code = 99
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            if "FLEXMOE_TEST_LOG" not in os.environ:
                os.dup2(quiet, 2)
            code = command.main(arguments)
        finally:
            os._exit(code)

    def wait(self, path="/ready", seconds=60.0):
        """Returns once the server answers 200."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if _status(self.url + path) == 200:
                return
            ended, status = os.waitpid(self.process, os.WNOHANG)
            assert not ended, f"the server ended with {os.waitstatus_to_exitcode(status)}"
            time.sleep(0.02)
        raise AssertionError(f"{path} is not answered")

    def stop(self, signal):
        """Sends a signal and waits for the end; returns the exit code."""
        os.kill(self.process, signal)
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def _status(url):
    """Of an answer; None where there is none."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as refused:
        return refused.code
    except OSError:
        return None


def free_port():
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
