"""The server on the demo's model: started, sent a batch with the `openai` client, and left running to be looked at.

``python -m scripts.serving.demo [DIR] [--synthetic] [--port N] [--once]``: everything it writes stays in DIR (default ``demo``),
as with `scripts.demo`. Ctrl-C stops the server; the same command starts it again, with what it knew.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import time

from openai import OpenAI

from flexmoe.errors import FlexMoEError
from scripts.demo import Setting, demo_parser

SHOWN = 4
ENDED = ("completed", "failed", "cancelled", "expired")


def main(argv: list[str] | None = None) -> int:
    """Run the demo; the exit code is the server's, or 1 where the batch did not complete."""
    parser = demo_parser("python -m scripts.serving.demo", "The server on a small model.")
    parser.add_argument("--port", type=int, default=8000, help="where the server listens (default 8000)")
    parser.add_argument("--once", action="store_true", help="stop when the batch has ended")
    args = parser.parse_args(argv)
    try:
        setting = Setting.chosen(args)
    except FlexMoEError as error:
        print(f"serve-demo: {error}", file=sys.stderr)
        return error.exit_code
    flags = command(setting, args.port)
    print(f"python -m flexmoe.serve {' '.join(flags)}\n", flush=True)
    server = subprocess.Popen([sys.executable, "-m", "flexmoe.serve", *flags], stdout=subprocess.PIPE, text=True)
    try:
        return with_server(server, setting, once=args.once)
    except KeyboardInterrupt:
        return 0
    finally:
        server.terminate()
        server.wait()


def command(setting: Setting, port: int) -> list[str]:
    """The arguments of ``python -m flexmoe.serve``."""
    args = ["--models", str(setting.checkpoint), "--port", str(port), "--data-dir", str(setting.home / "server")]
    return [*args, "--offload-dir", str(setting.home / "offload"), *setting.flags]


def with_server(server: subprocess.Popen[str], setting: Setting, *, once: bool) -> int:
    """Sends the batch once the server listens, and waits for its end; then for that of the server."""
    first = server.stdout.readline() if server.stdout is not None else ""
    if not first.startswith("listening on "):
        return server.wait()
    url = first.removeprefix("listening on ").strip()
    print(
        f"The page is at {url}; a machine that is not known yet is measured first, which takes one to seven minutes.\n"
    )
    completed = run_batch(url, setting.model.name, chats(setting))
    print(f"\nLook at {url} for the batch, the machine and the plan. Ctrl-C stops the server.", flush=True)
    if not once:
        server.wait()
    return 0 if completed else 1


def chats(setting: Setting) -> list[dict]:
    """The demo's requests that are chats, as lines of a batch: a batch is for one endpoint."""
    lines = []
    for request in setting.model.requests():
        body = {name: value for name, value in request.get("body", request).items() if name != "custom_id"}
        if "messages" in body:
            line = {"custom_id": request["custom_id"], "method": "POST", "url": "/v1/chat/completions"}
            lines.append({**line, "body": {"model": setting.checkpoint.name, **body}})
    return lines


def run_batch(url: str, name: str, lines: list[dict]) -> bool:
    """Runs a batch as any client of OpenAI's API does, and prints some of what comes of it."""
    with OpenAI(base_url=f"{url}v1", api_key="none") as client:
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        file = client.files.create(file=(f"{name}.jsonl", data), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"name": "demo"}
        )
        told = None
        while batch.status not in ENDED:
            if (batch.status, batch.request_counts) != told:
                told = batch.status, batch.request_counts
                counts = batch.request_counts
                print(f"{batch.id}: {batch.status}, {counts.completed if counts else 0} of {len(lines)}", flush=True)
            time.sleep(1)
            batch = client.batches.retrieve(batch.id)
        print(f"{batch.id}: {batch.status}\n")
        if batch.output_file_id:
            show(lines, client.files.content(batch.output_file_id).text.splitlines())
    return batch.status == "completed"


def show(asked: list[dict], answered: list[str]) -> None:
    """A few questions with their answers."""
    answers = {line["custom_id"]: line["response"]["body"]["choices"][0] for line in map(json.loads, answered)}
    for line in asked[:SHOWN]:
        if line["custom_id"] in answers:
            text = answers[line["custom_id"]]["message"]["content"] or ""
            print(textwrap.shorten(f"Q: {line['body']['messages'][-1]['content']}", 100))
            print(textwrap.fill(f"A: {text.strip()}", 100), end="\n\n")


if __name__ == "__main__":
    sys.exit(main())
