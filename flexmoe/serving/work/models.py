"""The models of a server: what is known of each without its weights, and its engine where its turn has come."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from flexmoe.batch.job_parts import open_model
from flexmoe.batch.options import RunOptions
from flexmoe.batch.plan import RunPlan, plan_run
from flexmoe.errors import InfeasibleError
from flexmoe.llm import LLM
from flexmoe.models.loader import Model
from flexmoe.preflight.lengths import Measured
from flexmoe.serving.settings import ServerOptions
from policies.common.directories import resolved

log = logging.getLogger(__name__)
#: Completions of which nothing is known when a model is loaded: their mean lengths and the longest one, in tokens. There are
#: more of them than fit a block, so that no plan is made for a single short one.
_PROMPT, _COMPLETION, _LONGEST, _ROWS = 512, 128, 4096, 1024
_LEAST_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model by the id that clients give.

    Args:
        options: how it runs.
        model: its shape and files; no weight is loaded.
        created_s: when its files were last changed, in seconds since 1970.
    """

    id: str
    options: RunOptions
    model: Model
    created_s: int

    @property
    def context(self) -> int:
        """Most tokens of a prompt and its completion."""
        return self.model.arch.max_position


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """An engine, and what it was planned for."""

    served: Served
    llm: LLM
    plan: RunPlan
    planned_for: frozenset[str]

    def advice(self) -> tuple[str, ...]:
        """What would help most, as the planner's report has it, a phrase each; none where the policy was given.

        It takes seconds.
        """
        options, forecaster, predicted = self.served.options, self.plan.forecaster, self.plan.predicted
        if forecaster is None or predicted is None or not options.plans_itself:
            return ()
        return forecaster.advice(predicted.tokens_per_s, options.kv_tokens, options.fixed)


class ServedModels:
    """The models of a server, in the order in which they were given.

    Raises:
        FlexMoEError: one cannot be run.
    """

    def __init__(self, options: ServerOptions) -> None:
        self._models: dict[str, Served] = {}
        for path in options.models:
            run = options.run_options(path)
            name = resolved(path).name
            created_s = int(Path(run.model).stat().st_mtime) if Path(run.model).exists() else 0
            self._models[name] = Served(id=name, options=run, model=open_model(run), created_s=created_s)

    def __iter__(self) -> Iterator[Served]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    def get(self, name: str) -> Served | None:
        """The model of an id, which may have an owner before it (``owner/id``); None where there is none."""
        return self._models.get(name) or self._models.get(PurePath(name).name)

    @property
    def only(self) -> Served | None:
        """The model, where there is one: then nobody has to name it."""
        return next(iter(self)) if len(self) == 1 else None


def load(served: Served, waiting: Sequence[tuple[str, Measured]]) -> Loaded:
    """Plans and loads an engine for what is known to come.

    Args:
        waiting: ids and lengths of the batches that wait for this model. Rows that no memory has room for are left out.

    Raises:
        FlexMoEError: no policy fits even short rows, or the machine cannot be measured.
    """
    measured = _together([_usual(served.context, _LONGEST), *(each for _, each in waiting)], served.context)
    longest = measured.longest_row
    while True:
        try:
            plan = plan_run(served.options, served.model, measured)
            break
        except InfeasibleError:
            if longest <= _LEAST_TOKENS:
                raise
            longest //= 2
            measured = _usual(served.context, longest)
            log.warning("%s: no plan has room for the longest row; planning for %d tokens", served.id, longest)
    llm = LLM(served.model, policy=plan.policy, workload=plan.measured.workload, **plan.options)
    return Loaded(served=served, llm=llm, plan=plan, planned_for=frozenset(name for name, _ in waiting))


def _usual(context: int, longest: int) -> Measured:
    """Completions of which nothing is known."""
    most = min(context, longest)
    prompt, completion = max(1, min(_PROMPT, most // 2)), max(1, min(_COMPLETION, most // 4))
    return _with_longest(Measured.of([(prompt, completion, _ROWS)], context), most)


def _together(several: Sequence[Measured], context: int) -> Measured:
    """The lengths of several jobs as those of one."""
    lengths = [(each.workload.prompt_len, each.workload.gen_len, each.rows) for each in several if each.rows]
    measured = Measured.of(lengths, context)
    return _with_longest(measured, max(measured.longest_row, *(each.longest_row for each in several)))


def _with_longest(measured: Measured, tokens: int) -> Measured:
    return replace(measured, longest_row=tokens, workload=replace(measured.workload, longest_row=tokens))
