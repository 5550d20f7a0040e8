"""What to do: policies, placement and schedules. Standard library only."""

from policies.placement import TIERS, Placement
from policies.policy import Policy, PolicyFile
from policies.units import Unit
from policies.workload import Workload

__all__ = ["TIERS", "Placement", "Policy", "PolicyFile", "Unit", "Workload"]
