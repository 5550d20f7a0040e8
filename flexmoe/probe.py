"""`python -m flexmoe.probe`: measures this machine with the runtime's own reads, copies and kernels."""

import sys

from flexmoe.cli.probe import main

if __name__ == "__main__":
    sys.exit(main())
