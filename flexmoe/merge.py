"""`python -m flexmoe.merge`: the outputs of shards to the file that one run would have written."""

import sys

from flexmoe.cli.merge import main

if __name__ == "__main__":
    sys.exit(main())
