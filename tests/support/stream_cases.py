"""What is run on simulated streams: every way in which weights, KV and hidden states are moved, one case each."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flexmoe import SamplingParams
from flexmoe.engine import engine_plan
from tests.support.exactness import Case, make_llm
from tests.support.stream_cuda import simulated
from tests.support.stream_mutants import Mutant
from tests.support.tiny import Variant, assert_greedy

_GEN_LEN = 6
#: Rows of 1 to 64 tokens: several GPU batches, and prompts of more than one sweep.
_ROWS = (0, 1, 2, 3, 5, 8, 9, 12)
_LONGEST = 80
_SAMPLED = [
    SamplingParams(temperature=0.8, top_p=0.9, seed=1, max_tokens=_GEN_LEN, ignore_eos=True),
    SamplingParams(temperature=1.1, top_k=20, min_p=0.02, seed=2, max_tokens=_GEN_LEN, ignore_eos=True),
    SamplingParams(temperature=0, repetition_penalty=1.3, presence_penalty=0.4, max_tokens=_GEN_LEN, ignore_eos=True),
    SamplingParams(temperature=0.7, logprobs=3, prompt_logprobs=2, seed=4, max_tokens=_GEN_LEN, ignore_eos=True),
    SamplingParams(temperature=0, logit_bias={7: 4.0}, min_tokens=3, max_tokens=_GEN_LEN),
]


@dataclass(frozen=True)
class StreamCase:
    """A case and how it is run.

    Attributes:
        case: placement and schedule.
        rows: numbers of the variant's prompts.
        options: of the `LLM`.
        cached: experts that the expert cache has room of its own for.
        sampled: choose tokens in all ways, and not only the most probable.
        restarts: rows lose their KV and are computed again.
        broken_off: a sweep fails while experts are being loaded, and then the engine is used again.
        second_gpu: compute on a GPU that is not the current one of the thread that asks for the sweeps.
        samples: of each prompt; with several, rows of one prompt lie in several tiers.
    """

    case: Case
    rows: tuple[int, ...] = _ROWS
    options: dict = field(default_factory=lambda: {"expert_cache": "off"})
    cached: int = 0
    sampled: bool = False
    restarts: bool = False
    broken_off: bool = False
    second_gpu: bool = False
    samples: int = 1


def _streamed(*placement, batches=(3, 3), **more) -> Case:
    return Case(placement=placement, batches=batches, eos=False, **more)


CASES = {
    "weights from pinned memory": StreamCase(_streamed(20, 80, 100, 0, 100, 0)),
    "weights from memory that is not pinned": StreamCase(_streamed(20, 80, 100, 0, 100, 0, pin_weight=False)),
    "weights from disk": StreamCase(_streamed(0, 30, 100, 0, 100, 0, variant="gqa-4-to-1")),
    "experts on demand": StreamCase(
        _streamed(0, 60, 100, 0, 100, 0, variant="qwen3", batches=(1, 1), experts_per_unit=4),
        rows=(1, 9),
        options={},
        cached=6,
    ),
    "few rows after many": StreamCase(
        _streamed(0, 50, 100, 0, 100, 0, variant="qwen3", batches=(4, 1), experts_per_unit=4),
        rows=(0, 1, 3, 5, 9),
        options={},
        cached=8,
    ),
    "a sweep broken off": StreamCase(
        _streamed(0, 50, 100, 0, 100, 0, variant="qwen3", batches=(4, 1), experts_per_unit=4),
        rows=(0, 1, 3, 5, 9),
        options={},
        cached=8,
        broken_off=True,
    ),
    "fetched KV": StreamCase(_streamed(100, 0, 0, 100, 100, 0, cpu_attention=0)),
    "attention on the CPU": StreamCase(_streamed(100, 0, 0, 100, 100, 0, cpu_attention=100)),
    "KV on disk": StreamCase(_streamed(100, 0, 0, 0, 100, 0, cpu_attention=0)),
    "hidden states in host memory": StreamCase(_streamed(100, 0, 100, 0, 0, 100)),
    "hidden states on disk": StreamCase(_streamed(100, 0, 50, 50, 0, 0, cpu_attention=50)),
    "everything everywhere": StreamCase(_streamed(30, 30, 30, 30, 30, 30, variant="window", batches=(2, 5))),
    "one after another": StreamCase(_streamed(10, 50, 0, 50, 0, 50, overlap=False)),
    "sampled": StreamCase(_streamed(50, 30, 50, 50, 50, 50), rows=(0, 1, 2, 5, 9), sampled=True),
    "rows sent back": StreamCase(_streamed(50, 50, 40, 60, 50, 50, disturbed="sent-back"), restarts=True),
    "rows that outgrow their room": StreamCase(
        _streamed(30, 30, 0, 100, 100, 0, kv_tokens=160, disturbed="short-sighted"),
        rows=(1, 2, 3, 5, 8, 9, 10, 12, 13),
        restarts=True,
    ),
    "a second GPU": StreamCase(_streamed(20, 40, 30, 70, 0, 50), second_gpu=True),
    "prompts from tier to tier": StreamCase(
        _streamed(100, 0, 30, 30, 100, 0, variant="window", batches=(4, 3), cpu_attention=50),
        rows=(5, 8, 9, 12),
        samples=6,
    ),
    "a static block": StreamCase(_streamed(0, 50, 0, 100, 0, 100, schedule="static", batches=(4, 2))),
    "two half-blocks": StreamCase(_streamed(30, 30, 30, 30, 30, 30, variant="window", batches=(2, 5), half_blocks=2)),
    "two half-blocks of pinned weights": StreamCase(_streamed(20, 80, 0, 100, 100, 0, batches=(2, 4), half_blocks=2)),
}

#: Cases that fail, and why. This list only becomes shorter.
KNOWN_FAULTS: dict[str, str] = {}


@dataclass(frozen=True)
class Outcome:
    """What a run on simulated streams showed.

    Attributes:
        alarm: what went wrong, in a line; empty where all was right.
        syncs: where the thread of a sweep waited for the device, and how often.
        routed: sweeps times MoE layers.
        executed: kernels and copies that ran.
        metrics: of the engine; empty where it failed.
    """

    alarm: str
    syncs: Counter[str]
    routed: int
    executed: int
    metrics: dict


def run(name: str, variant: Callable[[str], Variant], seed: int, mutant: Mutant | None = None) -> Outcome:
    """Run a case in the order of a seed and compare what comes out.

    Args:
        variant: gives the checkpoint of a name.
        mutant: what to take from the engine.
    """
    stream_case = CASES[name]
    model = variant(stream_case.case.variant)
    expected = _expected(stream_case, model)
    alarm, metrics = "", {}
    with simulated(seed, devices=2) as simulator, mutant.applied(simulator) if mutant else contextlib.nullcontext():
        try:
            metrics = _compare(stream_case, model, expected)
        except (Exception, AssertionError) as error:
            alarm = f"{type(error).__name__}: {error}".split("\n")[0]
    if simulator.faults:
        alarm = simulator.faults[0].split("\n")[0]
    routed = metrics.get("sweeps", 0) * _moe_layers(model)
    return Outcome(alarm, simulator.syncs, routed, simulator.executed, metrics)


def _moe_layers(model: Variant) -> int:
    config = model.model.config
    return config.num_hidden_layers - len(getattr(config, "mlp_only_layers", None) or ())


_known: dict[Path, list] = {}


def _expected(stream_case: StreamCase, model: Variant) -> list:
    """What the same engine samples on the CPU, where nothing is deferred; None where transformers' ids are expected."""
    if not stream_case.sampled:
        return [None] * len(stream_case.rows)
    if model.directory not in _known:
        with _llm(stream_case, model, "cpu") as llm:
            _known[model.directory] = _generate(llm, stream_case, model)
    return _known[model.directory]


def _compare(stream_case: StreamCase, model: Variant, expected: list) -> dict:
    with _llm(stream_case, model, "cuda:1" if stream_case.second_gpu else "cuda") as llm:
        if stream_case.broken_off:
            _break_off(llm, stream_case, model)
        for row, output, same in zip(stream_case.rows, _generate(llm, stream_case, model), expected, strict=True):
            ids = list(output.outputs[0].token_ids)
            if same is None:
                for each in output.outputs:
                    assert_greedy(model, row, list(each.token_ids), model.expected(row, _GEN_LEN))
            else:
                assert ids == list(same.outputs[0].token_ids), f"row {row}: sampled {ids}"
                _same_logprobs(output, same)
        metrics = llm.metrics()
        if stream_case.samples > 1:
            copied = {lane for lane in llm.engine.recorder.totals(by_worker=True) if lane.endswith("/prefix")}
            assert copied == {"h2d/prefix", "d2h/prefix"}, (
                "nothing was copied from tier to tier: the case shows nothing"
            )
        assert not stream_case.restarts or metrics["restarts"] > 0, "no row was computed again: the case shows nothing"
        return metrics


def _generate(llm, stream_case: StreamCase, model: Variant) -> list:
    prompts = [model.prompts[row] for row in stream_case.rows]
    greedy = SamplingParams(n=stream_case.samples, max_tokens=_GEN_LEN, ignore_eos=True)
    params = _SAMPLED if stream_case.sampled else greedy
    if not stream_case.second_gpu:
        return llm.generate(prompts, params)
    with ThreadPoolExecutor(1) as other:  # the thread that made the engine has set its device
        return other.submit(llm.generate, prompts, params).result()


def _break_off(llm, stream_case: StreamCase, model: Variant) -> None:
    """Fail within sweeps: when experts have just been asked for, and when kernels still read slots and cached experts."""
    feed = llm.engine.feed
    for method, most in (("request", 5), ("release", 8), ("release", 30), ("get", 70)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(feed, method, _failing(getattr(feed, method), most))
            with pytest.raises(ConnectionAbortedError):
                _generate(llm, stream_case, model)


def _failing(method, calls: int):
    """The method, which fails at the end of its last call of so many."""
    left = [calls]

    def failing(*args):
        result = method(*args)
        left[0] -= 1
        if not left[0]:
            raise ConnectionAbortedError
        return result

    return failing


def _same_logprobs(output, same) -> None:
    for ours, theirs in zip(_logprobs(output), _logprobs(same), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)


def _logprobs(output) -> list[float]:
    places = [*(output.prompt_logprobs or ()), *(output.outputs[0].logprobs or ())]
    return [value.logprob for place in places if place for value in place.values()]


@contextlib.contextmanager
def _llm(stream_case: StreamCase, model: Variant, device: str):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_plan, "_cache_experts", lambda *_: stream_case.cached)
        options = {"longest_row": _LONGEST} | stream_case.options
        llm = make_llm(model, stream_case.case, device, Path(folder), patch, **options)
        try:
            yield llm
        finally:
            llm.close()
