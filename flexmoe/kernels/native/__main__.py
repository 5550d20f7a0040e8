"""`python -m flexmoe.kernels.native`: compile the library ahead of its first use and print its path."""

import sys

from flexmoe.kernels.native.build import BuildError, build

if __name__ == "__main__":
    try:
        print(build())
    except (BuildError, OSError) as error:
        print(f"native attention was not built: {error}", file=sys.stderr)
        sys.exit(1)
