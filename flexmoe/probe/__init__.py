"""Measures this machine with the runtime's own reads, copies and kernels: `python -m flexmoe.probe -o machine.json`.

Every file measures one thing; `measure` puts them together into a `cost_model.hardware.Hardware`, `cache` keeps it.
"""

from flexmoe.probe.cache import cached_probe
from flexmoe.probe.effort import Effort
from flexmoe.probe.measure import probe

__all__ = ["Effort", "cached_probe", "probe"]
