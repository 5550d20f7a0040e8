"""The command line: ``python -m flexmoe.serve``. Where it listens goes to stdout, logs to stderr."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from flexmoe.batch.options import RunOptions
from flexmoe.cli.running.arguments import add_machine_flags, add_policy_flags, given_fields
from flexmoe.errors import UsageError
from flexmoe.serving.limits import Limits
from flexmoe.serving.settings import ServerOptions
from flexmoe.system.interrupts import Interrupts, Terminated
from policies.common.command_line import Parser, count, guarded, program_name, say, seconds, size_gib
from policies.common.memory_units import GIB

#: Instead of a flag, which other users of the machine see in its list of processes.
KEY_VARIABLE = "FLEXMOE_API_KEY"
_DESCRIPTION = """\
Serve OpenAI's files, batches and completions over HTTP, with models that need not fit on the GPU, and a page that shows them.

  python -m flexmoe.serve --models DIR --gpu-mem 16

Clients of OpenAI's API work unchanged (base_url http://127.0.0.1:8000/v1). A batch is kept on the disk as a job of flexmoe.run
is: whatever ends the server, its next start with the same --data-dir resumes every batch by itself.
"""
_EPILOG = f"""\
A key is required to listen elsewhere than on this machine's loopback; ${KEY_VARIABLE} holds it, or --api-key. One model is
loaded at a time; several take turns. The plan is made for the batches that wait when a model is loaded.

exit codes: 0 stopped by a signal, 1 internal, 2 usage, 4 does not fit, 65 bad checkpoint, 66 input missing, 74 I/O error
"""
_SIZES = {"max_upload": "upload_bytes", "keep_free": "free_disk_bytes"}


def parser() -> argparse.ArgumentParser:
    """The argument parser of ``python -m flexmoe.serve``."""
    program = program_name("serve", "flexmoe.serve")
    p = Parser(
        prog=program,
        usage=f"{program} --models DIR [DIR …] [flags]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _server_flags(p)
    _limit_flags(p)
    add_policy_flags(p)
    add_machine_flags(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        int: the exit code, one of `policies.common.errors`.
    """
    return guarded("flexmoe", lambda: _run(parser().parse_args(argv)))


def server_options(args: argparse.Namespace) -> ServerOptions:
    """What the flags ask for.

    Raises:
        UsageError: a value that cannot be used.
    """
    given = given_fields(args, RunOptions)
    own = {each.name for each in fields(ServerOptions)} & vars(args).keys()
    named = {name: value for name in own if (value := getattr(args, name)) is not None}
    limits = given_fields(args, Limits)
    limits |= {field: int(vars(args)[flag] * GIB) for flag, field in _SIZES.items() if vars(args)[flag] is not None}
    named.setdefault("api_key", os.environ.get(KEY_VARIABLE) or None)
    models = tuple(named.pop("models"))
    given.pop("checkpoint_interval_s", None)
    run = RunOptions(model=str(models[0]), reserve="p95", **given)
    return ServerOptions(models=models, run=run, limits=Limits(**limits), **named)


def _run(args: argparse.Namespace) -> int:
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.INFO if args.verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
    )
    options = server_options(args)
    try:
        from flexmoe.serving.http.server import serve
    except ImportError as error:
        raise UsageError(
            f"the server needs {error.name}, which is not installed; pip install 'flexmoe[serve]' brings it"
        ) from None
    with Interrupts():
        try:
            serve(options, lambda url: say(f"listening on {url}", f"data: {options.data_dir}"))
        except (Terminated, KeyboardInterrupt):
            say("stopped; the next start resumes the batches")
    return 0


def _server_flags(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("server")
    g.add_argument(
        "--models",
        nargs="+",
        type=Path,
        required=True,
        metavar="DIR",
        help="checkpoint directories; clients name each by its last part",
    )
    g.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    g.add_argument("--port", type=int, help="port to listen on; 0 takes a free one (default 8000)")
    g.add_argument("--api-key", metavar="KEY", help=f"what clients have to give (default: ${KEY_VARIABLE}, else none)")
    g.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="files, batches and database (default ~/.local/share/flexmoe/server)",
    )
    g.add_argument(
        "--checkpoint-interval",
        type=seconds,
        dest="checkpoint_interval_s",
        metavar="S",
        help="seconds between two checkpoints of the tokens of rows in flight (default 60)",
    )
    g.add_argument(
        "--least-turn",
        type=seconds,
        dest="least_turn_s",
        metavar="S",
        help="seconds that a model stays loaded at least when others wait (default 60)",
    )
    g.add_argument(
        "--gen-len",
        type=count,
        help="tokens per completion for requests without max_tokens (default: 32 for prompts, the rest of the context for chats)",
    )
    g.add_argument("--seed", type=int, help="seed of batch rows without one (default 0)")
    g.add_argument("-v", "--verbose", action="store_true", help="log what is done, to stderr")


def _limit_flags(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("limits")
    g.add_argument("--max-upload", type=size_gib, metavar="GIB", help="of one file (default 0.195)")
    g.add_argument(
        "--keep-free", type=size_gib, metavar="GIB", help="what uploads leave free on the disk (default 0.5)"
    )
    g.add_argument(
        "--max-batches", type=count, dest="open_batches", metavar="N", help="batches that have not ended (default 100)"
    )
    g.add_argument("--max-rows", type=count, dest="rows", metavar="N", help="rows of a batch (default 50000)")
    g.add_argument(
        "--max-concurrent-requests",
        type=count,
        dest="concurrent_requests",
        metavar="N",
        help="completions that wait or run (default 256)",
    )
    g.add_argument(
        "--idle-timeout", type=seconds, dest="idle_s", metavar="S", help="seconds that a request may pause (default 30)"
    )
