"""Loads of the phases of a job: how many rows decode in a mean sweep, over how much context, and what is prefilled.

Letters, all means over the rows of the workload (`cost_model.timing.length_moments`):

    s, n   tokens of the prompt, tokens generated
    p      sweeps that a prompt takes: ceil(s / prefill_tokens)
    L      sweeps that a row lives: p + n - 1, as the sweep of its last chunk gives its first token
    B      rows in flight; F: sweeps in which so many enter

In the j-th sweep in which it decodes (j = 1 ... n - 1) a row attends over s + j tokens, its own included; with p = 1, j is its
age in sweeps. Where load changes evenly over a phase, the phase is met at two points (Gauss-Legendre), which gives the mean
of anything up to the third power of time exactly; context is of the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from math import ceil, floor

from cost_model.memory.allocation import PAGE_TOKENS, Allocation
from cost_model.timing.length_moments import RowMoments
from cost_model.timing.sweep_load import RowGroup, SweepLoad, copied_by_lane
from policies.admission.shared_prefix import shared_tokens
from policies.placement import TIERS
from policies.policy import Policy
from policies.workload import Workload

#: Gauss-Legendre nodes on [0, 1], of weight 1/2 each.
_NODES = (0.5 - 3**-0.5 / 2, 0.5 + 3**-0.5 / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """``sweeps`` of one load. ``name``: fill, steady or drain."""

    name: str
    sweeps: float
    load: SweepLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseLoads:
    """The loads of one job under one policy.

    Args:
        moments: lengths of its rows.
        shares: of the rows, by mode of attention (`cost_model.timing.sweep_load.MODES`).
        prefill_tokens: prompt tokens that may enter one sweep.
    """

    moments: RowMoments
    shares: Mapping[str, float]
    prefill_tokens: int

    @property
    def prompt_sweeps(self) -> float:
        """p."""
        return float(max(1, ceil(self.moments.s / self.prefill_tokens)))

    @property
    def life_sweeps(self) -> float:
        """L."""
        return self.prompt_sweeps + self.moments.n - 1

    def fill(self, rows: float, sweeps: float, rounds: float = 1.0) -> list[Phase]:
        """``rows`` enter evenly within so many sweeps, B / F in each.

        When a part x of the sweeps has passed, x B rows have entered. They are 0 to x F sweeps old, which is x F / 2 in the
        mean, so they attend over x B (s + x F / 2) tokens. Those that enter in the sweep itself do not decode; half of them
        are among the x B, as a point within a sweep is in its middle in the mean.
        """
        m, pace = self.moments, rows / sweeps if sweeps else 0.0
        loads = [
            self.load(decode=x * rows - pace / 2, context=x * rows * (m.s + x * sweeps / 2), enter=pace) for x in _NODES
        ]
        return [Phase(name="fill", sweeps=rounds * sweeps / 2, load=load) for load in loads if sweeps]

    def drain(self, rows: float, sweeps: float, rounds: float = 1.0) -> list[Phase]:
        """``rows`` that entered evenly within so many sweeps, and so leave within as many.

        While the last x B are in flight, the oldest of them has generated n tokens, and the youngest n - x F, as it has x F
        sweeps before it: n - x F / 2 in the mean, so they attend over x B (s + n - x F / 2) tokens.
        """
        m = self.moments
        loads = [self.load(decode=x * rows, context=x * rows * (m.s + m.n - x * sweeps / 2)) for x in _NODES]
        return [Phase(name="drain", sweeps=rounds * sweeps / 2, load=load) for load in loads if sweeps > 0]

    def steady(self, rows: float, enter: float, sweeps: float) -> list[Phase]:
        """Rows of all ages; ``enter`` of them come per sweep on average, and as many leave.

        A row that decodes attends over E[sum of s + j] = E[(n - 1) s] + E[(n - 1) n] / 2 tokens in its life, plus n here, a
        token more per sweep than it needs; B / L rows are of each age. Where the pace is faster than rows come, only a part
        of the sweeps prefills, as many tokens as it may: that part is enter s / min(prefill_tokens, B s). In these sweeps
        n - 1 of a row's L are sweeps in which it decodes; in the others, which have no row that enters, n are.
        """
        m, life = self.moments, self.life_sweeps
        context = rows / life * (m.ns + m.nn / 2 + m.n)
        prefilling = min(1.0, enter * m.s / min(self.prefill_tokens, rows * m.s))
        busy = self.load(decode=rows * (m.n - 1) / life, context=context, enter=enter / max(prefilling, 1e-12))
        only = self.load(decode=rows * m.n / life, context=context)
        both = [Phase(name="steady", sweeps=sweeps * prefilling, load=busy)]
        rest = sweeps * (1 - prefilling)
        return [*both, Phase(name="steady", sweeps=rest, load=only)] if rest > 1e-9 * sweeps else both

    def load(self, *, decode: float, context: float, enter: float = 0.0) -> SweepLoad:
        """A sweep in which ``decode`` rows decode over ``context`` tokens together and ``enter`` rows come in.

        Of a prompt that takes p sweeps, p rows of different progress are in each sweep, with s / p tokens each. Over its life
        a prompt has sum of i s / p, i = 0 ... p - 1, which is s (p - 1) / 2 tokens behind its chunks, and s² / 2 pairs of query
        and key.
        """
        m, decode = self.moments, max(0.0, decode)
        p = self.prompt_sweeps if enter else 1.0
        groups = {
            mode: RowGroup(
                decode_rows=share * decode,
                decode_context=share * max(context, decode),
                prompt_rows=share * enter * p,
                prompt_tokens=share * enter * m.s,
                prompt_past=share * enter * m.s * (p - 1) / 2,
                pairs=share * enter * m.ss / 2,
            )
            for mode, share in self.shares.items()
        }
        return SweepLoad(groups=groups, logits=decode + enter)


def mode_shares(policy: Policy, allocation: Allocation, rows: int, row_pages: int = 0) -> dict[str, float]:
    """Share of the rows by how they are attended; their home tiers follow the KV pages.

    Args:
        rows: in flight; of those of the host tier, whole ones are attended by the CPU, as in `policies.admission`.
        row_pages: of a row. A tier that has fewer is the home of none, however large its share is.
    """
    pages = pages_of_homes(allocation, row_pages)
    total = sum(pages.values())
    on_host = pages["cpu"] / total
    attended = _attended(policy, max(1, round(on_host * rows)))
    return _by_mode(pages["gpu"] / total, on_host, pages["disk"] / total, attended)


def shares_of_whole_rows(policy: Policy, allocation: Allocation, rows: float, row_pages: int) -> dict[str, float]:
    """The same of few rows, each of which is in one tier: where its share has most room for it, as `policies.admission` chooses.

    Rows that generate most enter first, so those left in the end are those that were there when no more had entered.
    """
    pages = pages_of_homes(allocation, row_pages)
    count, total = max(1, round(rows)), sum(pages.values())
    asked = {tier: own / total * count for tier, own in pages.items()}
    whole = {tier: floor(own) for tier, own in asked.items()}
    nearest = sorted(asked, key=lambda tier: whole[tier] - asked[tier])
    for tier in nearest[: count - sum(whole.values())]:
        whole[tier] += 1
    on_host = whole["cpu"]
    return _by_mode(whole["gpu"] / count, on_host / count, whole["disk"] / count, _attended(policy, max(1, on_host)))


def pages_of_homes(allocation: Allocation, row_pages: int) -> dict[str, int]:
    """KV pages of each tier that holds a row of so many; 0 of the others."""
    least = min(row_pages, max(allocation.kv_pages.values()))
    return {tier: pages if pages >= least else 0 for tier, pages in allocation.kv_pages.items()}


def copied_per_row(workload: Workload, allocation: Allocation, rows: float, row_pages: int) -> dict[str, float]:
    """KV pages of prefixes that are copied from tier to tier for a row that enters, on average, by lane.

    The k rows of a prefix follow each other into the tier where it is, until that is full. Of the rows in flight each of t
    tiers has m; so k of them in a row lie on both sides of an end of such m with the probability (k - 1) / m, and a prefix is copied
    min(t - 1, (k - 1) / m) times.

    Args:
        rows: in flight.
        row_pages: as in `mode_shares`.
    """
    homes, layout = pages_of_homes(allocation, row_pages), allocation.kv_layout
    whole = shared_tokens(workload.prompt_len, PAGE_TOKENS)
    prefix = min(whole, workload.prefix_len) if workload.rows_per_prefix > 1 else 0
    each, all_of_them = workload.rows_per_prompt, workload.rows_per_prompt * workload.rows_per_prefix
    ways = {(a, b): homes[a] * homes[b] for a, b in permutations(TIERS, 2) if homes[a] and homes[b]}
    tiers, pages = sum(map(bool, homes.values())), 0.0
    for count, own in ((all_of_them, layout.before(prefix)), (each, layout.before(whole) - layout.shared(prefix))):
        pages += own / count * min(tiers - 1, (count - 1) * tiers / max(1.0, rows))
    return copied_by_lane((*way, pages * part / sum(ways.values())) for way, part in ways.items() if pages)


def _attended(policy: Policy, rows: int) -> float:
    """Part of so many rows of the host tier that the CPU attends, in whole rows."""
    return floor(policy.cpu_attention_percent / 100 * rows + 0.5) / rows


def _by_mode(gpu: float, cpu: float, disk: float, attended: float) -> dict[str, float]:
    shares = {"gpu": gpu, "fetch": cpu * (1 - attended), "disk": disk, "cpu": cpu * attended}
    return {mode: share for mode, share in shares.items() if share}
