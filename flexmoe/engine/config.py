"""What an engine is asked to be: the options of a run, validated, before anything is known of model and machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from cost_model.model.families import dtype_name
from cost_model.routing.expert_usage import ExpertUsage
from flexmoe.errors import UsageError
from flexmoe.weights.eviction import EXPERT_CACHES
from policies.common.checks import check_count
from policies.common.directories import OFFLOAD_DIR, resolved
from policies.common.option_names import option
from policies.policy import Policy
from policies.workload import Workload

RESERVES = ("max", "p95")
#: Where debug mode writes to if no directory is named.
DEBUG_DIR = Path("flexmoe_debug")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How to run a model.

    Attributes:
        policy: placement, batch sizes and schedule.
        workload: mean prompt and completion lengths, from which the KV capacity follows.
        kv_tokens: KV capacity over all tiers, in tokens; None: from policy and workload.
        longest_row: tokens of the longest row; None: that of the workload.
        max_model_len: most tokens of a prompt and its completion; None: the model's context.
        past_context: one token more may be generated: it follows from a full context, and is never computed itself.
        device: ``auto``, ``cuda`` or ``cpu``.
        dtype: compute dtype, a name or a `torch.dtype`; ``auto`` is the checkpoint's.
        gpu_mem, cpu_mem, nvme_mem: budgets in GiB; None: what the machine has.
        memory_limit: GiB of host memory that the whole process may hold; None: what the machine, cgroups and resource limits
            allow.
        process_bytes: what the process takes of that beside what is planned; None: estimated from what it holds
            (`flexmoe.system.memory.process_bytes`).
        offload_dir: where the disk tier's files go.
        gen_len: ``max_tokens`` of requests without one; None: they are open, and end at the latest where the context or the
            room for their KV cache does.
        keep_spans: record spans for a trace.
        eos_ids: ids that end a row.
        seed: of the random draws of requests that have none of their own.
        expert_cache: which of the cached experts are evicted in on-demand mode (`flexmoe.weights.eviction`): ``lfu``, ``lru``,
            ``static``, or ``off``, which streams all experts in every sweep.
        expert_usage: how often each expert was chosen in another run, or the path of that file.
        reserve: KV that a row is expected to need: ``max``, up to its ``max_tokens``, or ``p95``, what the job's rows
            have needed so far (`flexmoe.engine.length_estimate`).
        router_stats: count which experts are chosen together too, not only how often each is
            (`flexmoe.engine.router_counter`).
        prefix_caching: rows that begin alike compute and keep what they have in common once.
        check_finite: end the run with `flexmoe.debugging.finite.NonFiniteError` where the model computes NaN or an infinity.
        debug: write what every sweep computed to files (``docs/debugging.md``).
        debug_dir: directory for them, which asks for ``debug`` too; None: `DEBUG_DIR`.

    Raises:
        UsageError: a value that cannot be used.
        FlexMoEError: the file of the expert usage cannot be read.
    """

    policy: Policy
    workload: Workload
    kv_tokens: int | None = None
    longest_row: int | None = None
    max_model_len: int | None = None
    past_context: bool = False
    device: str = "auto"
    dtype: str = "auto"
    gpu_mem: float | None = None
    cpu_mem: float | None = None
    nvme_mem: float | None = None
    memory_limit: float | None = None
    process_bytes: int | None = None
    offload_dir: Path = OFFLOAD_DIR
    gen_len: int | None = None
    keep_spans: bool = False
    eos_ids: tuple[int, ...] = ()
    seed: int = 0
    expert_cache: str = "lfu"
    expert_usage: ExpertUsage | str | Path | None = None
    reserve: str = "p95"
    router_stats: bool = False
    prefix_caching: bool = True
    check_finite: bool = False
    debug: bool = False
    debug_dir: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "offload_dir", resolved(self.offload_dir))
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        self._check_numbers()
        for name in ("prefix_caching", "check_finite", "debug"):
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{option(name)} is {getattr(self, name)!r}; give True or False")
        if self.debug_dir is not None:
            object.__setattr__(self, "debug_dir", resolved(self.debug_dir))
        if self.reserve not in RESERVES:
            raise UsageError(f"reserve is {self.reserve!r}; choose one of {', '.join(RESERVES)}")
        if isinstance(self.expert_usage, (str, Path)):
            object.__setattr__(self, "expert_usage", ExpertUsage.load(self.expert_usage))
        if self.expert_cache not in EXPERT_CACHES:
            raise UsageError(f"expert_cache is {self.expert_cache!r}; choose one of {', '.join(EXPERT_CACHES)}")
        if self.expert_cache == "static" and self.expert_usage is None:
            raise UsageError("a static expert cache keeps what another run used most; give its expert usage too")
        self._check_policy()

    @property
    def known_usage(self) -> ExpertUsage | None:
        """The expert usage, read from its file where a path was given."""
        return cast("ExpertUsage | None", self.expert_usage)

    @property
    def debug_records(self) -> Path | None:
        """The directory that debug mode writes to; None: there is no debug mode."""
        return self.debug_dir or (DEBUG_DIR if self.debug else None)

    def _check_numbers(self) -> None:
        for name in ("gpu_mem", "cpu_mem", "nvme_mem", "memory_limit"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"{option(name)} is {value}; give GiB of at least 0")
        for name in ("kv_tokens", "longest_row", "max_model_len", "gen_len"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not -(2**63) <= self.seed < 2**63:
            raise UsageError(f"seed is {self.seed!r}; give a whole number of 64 bits")

    def _check_policy(self) -> None:
        if not isinstance(self.policy, Policy):
            raise UsageError(f"the policy is {self.policy!r}; give a Policy or the path of a policy file")
