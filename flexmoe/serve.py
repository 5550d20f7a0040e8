"""`python -m flexmoe.serve`: files, batches and completions over HTTP."""

import sys

from flexmoe.system.interrupts import exit_at_signals
from policies.common.command_line import open_standard_streams

if __name__ == "__main__":
    open_standard_streams()
    exit_at_signals()
    from flexmoe.cli.serve import main

    sys.exit(main())
