"""`python -m cost_model`: finds the policy with the most tokens per second for a model, a machine and a job."""

import sys

from cost_model.cli.plan import main

if __name__ == "__main__":
    sys.exit(main())
