"""`python -m flexmoe.run`: a file of requests to a JSONL of completions."""

import sys

from flexmoe.system.interrupts import exit_at_signals
from policies.common.command_line import open_standard_streams

if __name__ == "__main__":
    open_standard_streams()
    exit_at_signals()  # what follows takes a second to import, and from a cold disk many
    from flexmoe.cli.run import main

    sys.exit(main())
