"""The console command `flexmoe`: one word for each program, which is the same as its `python -m` form."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from flexmoe import __version__
from flexmoe.system.interrupts import exit_at_signals
from policies.common.command_line import complain, do_without_torch, open_standard_streams, say
from policies.common.errors import EXIT_USAGE

#: Each command, its module (which is imported when it is asked for), and what it does.
_COMMANDS = {
    "run": ("flexmoe.cli.run", "a file of requests to a JSONL of completions"),
    "serve": ("flexmoe.cli.serve", "OpenAI's files, batches and completions over HTTP, with a page"),
    "plan": ("cost_model.__main__", "find the policy with the most tokens per second for a model, a machine and a job"),
    "inspect": ("flexmoe.cli.inspect", "what a checkpoint is, and whether a run would take it"),
    "probe": ("flexmoe.cli.probe", "measure this machine's rates for the planner"),
    "quantize": ("flexmoe.cli.quantize", "pack the weights of a checkpoint: int4, int8, fp8 or mxfp4"),
    "merge": ("flexmoe.cli.merge", "put the outputs of shards together"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `flexmoe COMMAND …`; the result is the exit code."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv), ""]
    if name in ("", "-h", "--help"):
        say(*_help())
        return 0 if name else EXIT_USAGE
    if name == "--version":
        say(f"flexmoe {__version__}")
        return 0
    if name not in _COMMANDS:
        complain(f"flexmoe: there is no command {name!r}; choose one of {', '.join(_COMMANDS)}")
        return EXIT_USAGE
    if argv is None and name == "run":  # a batch system may stop the process in the seconds of its imports
        open_standard_streams()
        exit_at_signals()
    if argv is None and name == "plan":
        do_without_torch()
    command: Callable[[Sequence[str]], int] = import_module(_COMMANDS[name][0]).main
    return command(rest[:-1])


def _help() -> list[str]:
    commands = [f"  {name:<8} {what}" for name, (_, what) in _COMMANDS.items()]
    return [
        "usage: flexmoe COMMAND [flags]",
        "",
        *commands,
        "",
        "flexmoe COMMAND --help tells the flags; flexmoe --version the version.",
    ]
