"""Writes the machines that ship with the planner.

python -m scripts.machines
"""

import sys

from cost_model.hardware.hardware import MACHINES
from scripts.machines.derived import all_machines

if __name__ == "__main__":
    MACHINES.mkdir(exist_ok=True)
    for hardware in all_machines():
        hardware.save(MACHINES / f"{hardware.name}.json")
        print(MACHINES / f"{hardware.name}.json")
    sys.exit(0)
