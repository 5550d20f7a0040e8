"""`python -m flexmoe.inspect`: what a checkpoint is, and whether a run would take it."""

import sys

from flexmoe.cli.inspect import main

if __name__ == "__main__":
    sys.exit(main())
