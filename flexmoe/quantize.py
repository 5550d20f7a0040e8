"""`python -m flexmoe.quantize`: a checkpoint of 16-bit weights to one of packed weights."""

import sys

from flexmoe.cli.quantize import main

if __name__ == "__main__":
    sys.exit(main())
