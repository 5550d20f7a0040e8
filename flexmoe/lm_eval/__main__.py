"""`python -m flexmoe.lm_eval`: the command line of lm-evaluation-harness, with the model ``flexmoe``."""

import sys

from policies.common.errors import FlexMoEError

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    import flexmoe.lm_eval

    try:
        cli_evaluate()
    except FlexMoEError as error:
        print(f"{flexmoe.lm_eval.__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
