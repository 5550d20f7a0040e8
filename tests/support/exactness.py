"""One way to run a tiny model, and whether its greedy ids are those of transformers."""

import random
from dataclasses import dataclass, fields
from itertools import combinations

import pytest
import torch

from flexmoe import LLM, SamplingParams
from flexmoe.engine.scheduler import Scheduler
from flexmoe.kernels.native import library as native
from flexmoe.weights import supply
from flexmoe.weights.stream import WeightStream
from policies import Policy, Workload
from tests.support.drawn import drawn
from tests.support.tiny import GEN_LEN, LONGEST_ROW, MARGIN, RECIPES, assert_greedy, offload

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]),
]
# Weights GPU/CPU, KV GPU/CPU, activations GPU/CPU; the rest is on disk.
PLACEMENTS = (
    (100, 0, 100, 0, 100, 0),
    (0, 100, 100, 0, 100, 0),
    (0, 0, 100, 0, 100, 0),
    (100, 0, 0, 100, 100, 0),
    (100, 0, 0, 0, 100, 0),
    (100, 0, 100, 0, 0, 100),
    (100, 0, 100, 0, 0, 0),
    (0, 0, 0, 0, 0, 0),
    (0, 100, 0, 100, 0, 100),
    (30, 30, 30, 30, 30, 30),
    (10, 20, 50, 0, 0, 50),
    (60, 0, 0, 60, 50, 0),
)


@dataclass(frozen=True)
class Case:
    """One way to run a model; `CHOICES` has the values of every field that the exactness tests vary."""

    variant: str = "gqa-8-to-2"
    placement: tuple = (30, 30, 30, 30, 30, 30)
    schedule: str = "rolling"
    overlap: bool = True
    batches: tuple = (3, 3)
    cpu_attention: int = 50
    prefill_tokens: int | None = 90
    kv_tokens: int | None = None
    eos: bool = True
    staged: bool = False
    native: bool = True
    disturbed: str = ""
    pin_weight: bool = True
    experts_per_unit: int | None = None
    compress_cache: bool = False
    half_blocks: int = 1

    def __str__(self):
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        text = {k: ".".join(map(str, v)) if isinstance(v, tuple) else v for k, v in own.items()}
        words = [text["variant"], text["placement"], text["schedule"], "x".join(map(str, self.batches))]
        words += [f"att{self.cpu_attention}", f"pre{self.prefill_tokens}", f"kv{self.kv_tokens}"]
        flags = {"serial": not self.overlap, "eos": self.eos, "staged": self.staged, "torch": not self.native}
        flags |= {"int8": self.compress_cache, "halves": self.half_blocks > 1}
        return "-".join(words + [name for name, on in flags.items() if on] + [self.disturbed] * bool(self.disturbed))


CHOICES = {
    "variant": tuple(RECIPES),
    "placement": PLACEMENTS,
    "schedule": ("rolling", "static"),
    "overlap": (True, True, False),
    "batches": ((1, 4), (3, 3), (16, 1), (3, 6)),
    "cpu_attention": (0, 50, 100),
    "prefill_tokens": (None, 37, 90, 1000),
    "kv_tokens": (None, 480, 1600),
    "eos": (True, False),
    "staged": (False, True),
    "native": (True, False),
    "disturbed": ("", "", "sent-back", "short-sighted"),
    "half_blocks": (1, 2),
}


def sample(count, seed):
    """Cases in which every value of every field occurs equally often, in random combinations."""
    rng = random.Random(seed)
    columns = {}
    for name, values in CHOICES.items():
        column = [values[i % len(values)] for i in range(count)]
        rng.shuffle(column)
        columns[name] = column
    return [Case(**{name: column[i] for name, column in columns.items()}) for i in range(count)]


#: Of a case's fields those whose pairs of values are all among the quick ones.
_PAIRED = ("schedule", "overlap", "half_blocks", "disturbed")


def quick_of(cases, paired=_PAIRED):
    """Parameters of a test whose last one is a `Case`; those that repeat what others have are slow."""
    names, others = list(CHOICES), len(cases[0]) - 1
    places = [others + names.index(name) for name in paired]

    def values(parameters):
        return (*parameters[:-1], *(getattr(parameters[-1], name) for name in names))

    return drawn(cases, pairs=combinations(sorted(places), 2), axes=values)


def make_llm(variant, case, device, tmp_path, monkeypatch, **options):
    if case.staged:
        monkeypatch.setattr(supply, "WeightStream", _staged_stream)
    if not case.native:
        monkeypatch.setattr(native, "available", lambda: False)
    workload = Workload(prompt_len=60, gen_len=GEN_LEN)
    policy = Policy.from_percent(
        case.placement,
        gpu_batch_size=case.batches[0],
        num_gpu_batches=case.batches[1],
        prompt_len=workload.prompt_len,
        gen_len=workload.gen_len,
        schedule=case.schedule,
        prefill_tokens=case.prefill_tokens,
        overlap=case.overlap,
        cpu_attention_percent=case.cpu_attention,
        pin_weight=case.pin_weight,
        experts_per_unit=case.experts_per_unit,
        compress_cache=case.compress_cache,
        half_blocks=case.half_blocks,
    )
    options = offload(tmp_path) | {"device": device, "kv_tokens": case.kv_tokens, "workload": workload} | options
    llm = LLM(variant.directory, policy=policy, **options)
    if case.disturbed == "sent-back":
        _send_rows_back(llm.engine)
    elif case.disturbed == "short-sighted":
        past = llm.engine.plan.allocation.recompute_past
        llm.engine.scheduler = Scheduler(policy, llm.engine.cache, lambda row: 0, past)
    return llm


def _staged_stream(store, order, slots, staging_slots, **options):
    return WeightStream(store, order, slots, max(1, staging_slots), **options, staged=True)


def _send_rows_back(engine, times=6):
    """Every third sweep a row loses its KV and has to come in again."""
    rng, step, left = random.Random(5), engine.step, [times]

    def disturbed_step():
        if left[0] and len(engine.sweeps) % 3 == 2 and engine.scheduler.running:
            left[0] -= 1
            engine.scheduler.preempt(rng.choice(engine.scheduler.running))
        return step()

    engine.step = disturbed_step


def check(variant, case, device, tmp_path, monkeypatch, *, longest=LONGEST_ROW, margin=MARGIN):
    """Run all prompts that fit and compare; returns the run's metrics."""
    llm = make_llm(variant, case, device, tmp_path, monkeypatch, longest_row=longest)
    try:
        rows = [row for row, prompt in enumerate(variant.prompts) if len(prompt) + GEN_LEN <= longest]
        params = SamplingParams(max_tokens=GEN_LEN, ignore_eos=not case.eos)
        for row, output in zip(rows, llm.generate([variant.prompts[row] for row in rows], params), strict=True):
            assert_greedy(variant, row, list(output.outputs[0].token_ids), variant.expected(row, eos=case.eos), margin)
        assert llm.engine.unfinished == 0
        assert all(llm.engine.cache.free(tier) == llm.engine.cache.total(tier) for tier in ("gpu", "cpu", "disk"))
        return llm.metrics()
    finally:
        llm.close()
