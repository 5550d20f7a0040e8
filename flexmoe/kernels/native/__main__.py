"""`python -m flexmoe.kernels.native`: compile the library ahead of its first use and print its path."""

import argparse
import sys

from flexmoe.kernels.native.build import BuildError, build
from flexmoe.kernels.native.portable import build_portable

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m flexmoe.kernels.native", description=__doc__)
    parser.add_argument(
        "--portable", action="store_true", help="into the package, for every x86-64 CPU, as a wheel has it"
    )
    try:
        print(build_portable() if parser.parse_args().portable else build())
    except (BuildError, OSError) as error:
        print(f"the native library was not built: {error}", file=sys.stderr)
        sys.exit(1)
