"""The choice of a token: the right distribution, the right support, and the same draw wherever it falls."""

import weakref

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cost_model.memory.memory_plan import SAMPLED_ROW_BYTES
from flexmoe.params import SamplingParams
from flexmoe.sampling.logprobs import PromptScores, top_tokens
from flexmoe.sampling.penalties import TokenCounts, add_bias, penalize, waiting
from flexmoe.sampling.random_draws import draw_keys, log_exponentials, philox, stream_of, token_words
from flexmoe.sampling.sampler import NOT_FINITE, NUCLEUS_TOKENS, RowSampler, Sampling, draw, filter_logits
from tests.support.references import sample

pytestmark = pytest.mark.usefixtures("one_thread")
ROOMY = 1 << 24


def row(params, *, index=0, key="row", seed=0, prompt=(), generated=(), eos_ids=()):
    return RowSampler.of(params, seed=seed, key=key, index=index, prompt=prompt, generated=generated, eos_ids=eos_ids)


def logits(rows, vocab, seed=0, spread=2.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


# Random numbers.


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, words):
    columns = [[np.array([word], dtype=np.uint64) for word in part] for part in (counter, key)]
    assert tuple(int(word[0]) for word in philox(*columns)) == words


def test_key_of_a_draw_depends_on_its_stream_and_place_alone():
    streams = np.array([stream_of(0, f"row-{i}", 0) for i in range(50)], dtype=np.uint64)
    places = np.arange(50, dtype=np.uint64) ** 3
    together, order = draw_keys(streams, places), np.random.default_rng(0).permutation(50)
    assert (draw_keys(streams[order], places[order]) == together[order]).all()
    assert [draw_keys(streams[i : i + 1], places[i : i + 1])[0].tolist() for i in range(50)] == together.tolist()


def test_keys_are_uniform_and_streams_are_not_alike():
    streams = [stream_of(seed, key, index) for seed in (0, 1) for key in ("a", "b", "\ud800") for index in (0, 1)]
    assert len(set(streams)) == len(streams)
    keys = [draw_keys(np.full(4000, s, np.uint64), np.arange(4000, dtype=np.uint64)) for s in streams]
    words = np.concatenate(keys, axis=1).T
    counts = np.array([np.histogram(w, 50, (0, 2**32))[0] for w in words])
    assert (((counts - 80) ** 2 / 80).sum(1) < 49 + 5 * 98**0.5).all()
    assert np.abs(np.corrcoef(words) - np.eye(len(words))).max() < 0.07


HERE = waiting(torch.device("cpu"))


def words_of(keys):
    return torch.from_numpy(keys.view(np.int32))


def keys_of(count, key="keys", seed=0):
    return draw_keys(np.full(count, stream_of(seed, key, 0), np.uint64), np.arange(count, dtype=np.uint64))


def test_bits_of_a_token_are_an_exact_hash_of_the_key_and_the_token():
    def mixed(x):
        for shift, times in ((16, 0x21F0AAAD), (15, 0xD35A2D97), (15, 1)):
            x = (x ^ x >> np.uint64(shift)) * np.uint64(times) & np.uint64(2**32 - 1)
        return x

    keys = keys_of(7)
    first, second = keys.astype(np.uint64).T[:, :, None]
    tokens = np.arange(1003, dtype=np.uint64) * np.uint64(0x9E3779B9)
    low = np.uint64(2**32 - 1)
    expected = mixed(mixed((tokens + first) & low) + second & low)
    words = token_words(words_of(keys), 1003).numpy().view(np.uint32)
    assert (words == expected).all()


def test_bits_of_tokens_are_uniform_and_alike_neither_within_a_draw_nor_from_one_to_the_next():
    words = token_words(words_of(keys_of(400)), 400).numpy().view(np.uint32).astype(float)
    for side in (words, words.T):
        counts = np.array([np.histogram(w, 20, (0, 2**32))[0] for w in side])
        statistics = ((counts - 20) ** 2 / 20).sum(1)
        assert abs(statistics.mean() - 19) < 5 * (38 / 400) ** 0.5 and statistics.max() < 19 + 8 * 38**0.5
        assert np.abs(np.corrcoef(side) - np.eye(400)).max() < 0.3


def test_every_bit_pattern_gives_a_finite_time_and_the_smallest_ones_are_exact():
    edges = torch.tensor([[0, 1, -1, 2**31 - 1, -(2**31)]], dtype=torch.int32)
    times = log_exponentials(edges)[0]
    assert times.isfinite().all()
    assert times[[0, 1, 4]].tolist() == pytest.approx(np.log([2**-32, 1.5 * 2**-31, 2**-32]).tolist())


# Distributions.


def chi_square_is_usual(counts, probabilities):
    """Whether counts are as likely as they should be under the probabilities; none falls where there is none."""
    assert counts[probabilities == 0].sum() == 0
    kept = probabilities > 0
    expected = probabilities[kept] * counts.sum()
    rare = expected < 5
    pairs = [*zip(counts[kept][~rare], expected[~rare]), (counts[kept][rare].sum(), expected[rare].sum())]
    statistic = sum((c - e) ** 2 / e for c, e in pairs if e)
    degrees = len(pairs) - 1
    return statistic < degrees + 4 * (2 * degrees) ** 0.5 + 4


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"temperature": 2.5},
        {"temperature": 1.0, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 1.4, "min_p": 0.02, "top_k": 20, "top_p": 0.9},
    ],
    ids=str,
)
def test_draws_follow_the_softmax_of_what_is_kept(asked):
    params, count, vocab = SamplingParams(**asked), 20_000, 60
    x = logits(1, vocab, seed=3)
    kept = x.clone()
    filter_logits(kept, [params], HERE)
    probabilities = kept.double().softmax(-1)[0].numpy()
    tokens = draw(x.expand(count, vocab).clone(), [params] * count, keys_of(count, "chi", 5), HERE)
    assert chi_square_is_usual(np.bincount(tokens.numpy(), minlength=vocab), probabilities)
    wrong = np.roll(probabilities, 1)
    assert not chi_square_is_usual(np.bincount(tokens.numpy(), minlength=vocab) * (wrong > 0), wrong), "a blind test"


def warped(x, params):
    """Transformers' warpers in vLLM's order."""
    warpers = [TemperatureLogitsWarper(params.temperature)]
    warpers += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k > 0 else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    for warper in warpers:
        x = warper(None, x)
    return x


@pytest.mark.parametrize("vocab", [50, 300, 3 * NUCLEUS_TOKENS[-1]])
@pytest.mark.parametrize("seed", range(3))
def test_kept_logits_are_those_of_transformers_warpers(vocab, seed):
    generator = np.random.default_rng(seed)
    params = [
        SamplingParams(
            temperature=float(generator.choice([0.3, 1.0, 7.0])),
            top_k=int(generator.choice([0, 1, 5, 40, vocab, 2 * vocab])),
            top_p=float(generator.choice([1.0, 1e-9, 0.3, 0.9, 0.999])),
            min_p=float(generator.choice([0.0, 0.05, 1.0])),
        )
        for _ in range(24)
    ]
    x = logits(len(params), vocab, seed=seed)
    expected = torch.cat([warped(x[i : i + 1].clone(), p) for i, p in enumerate(params)])
    filter_logits(x, params, HERE)
    torch.testing.assert_close(x, expected)


def test_set_of_top_p_may_be_larger_than_what_is_sorted_at_first():
    x, params = logits(3, 4 * NUCLEUS_TOKENS[-1], spread=0.1), SamplingParams(temperature=1.0, top_p=0.9)
    expected = TopPLogitsWarper(0.9)(None, x.clone())
    filter_logits(x, [params] * 3, HERE)
    assert ((x > -torch.inf).sum(-1) > NUCLEUS_TOKENS[-1]).all()
    torch.testing.assert_close(x, expected)


def test_equal_logits_at_the_edge_stay_together():
    x = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]] * 2)
    filter_logits(x, [SamplingParams(temperature=1.0, top_k=2), SamplingParams(temperature=1.0, top_p=0.6)], HERE)
    assert (x > -torch.inf).tolist() == [[True] * 4 + [False]] * 2


def test_extreme_temperatures_take_the_best_token_and_any_token():
    x = logits(1, 40)
    count, cold, hot = 4000, SamplingParams(temperature=1e-5), SamplingParams(temperature=1e308)
    keys = keys_of(count)
    best = draw(x.expand(count, 40).clone(), [cold] * count, keys, HERE)
    assert (best == x.argmax()).all()
    any_ = draw(x.expand(count, 40).clone(), [hot] * count, keys, HERE)
    assert chi_square_is_usual(np.bincount(any_.numpy(), minlength=40), np.full(40, 1 / 40))


def test_only_tokens_that_have_weight_win():
    count = 20_000
    x = torch.tensor([-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]).expand(count, 5).clone()
    tokens = draw(x, [SamplingParams(temperature=1.0)] * count, keys_of(count), HERE)
    assert set(tokens.tolist()) == {1, 3}


def test_rounding_of_the_logits_parts_draws_as_seldom_as_it_can():
    """Two distributions of nearly equal tokens, as far apart as two policies' are: at best as many draws part as their
    total variation says, and a race at most about twice as many; inversion of the sums would part 40 times as many."""
    vocab, rows, rounds, noise = 2000, 50, 40, 0.02  # as much noise as makes a short test see it
    x = logits(rows, vocab, seed=1)
    y = x + logits(rows, vocab, seed=2, spread=noise)
    variation = (x.double().softmax(-1) - y.double().softmax(-1)).abs().sum(-1).mean().item() / 2
    params, parted = [SamplingParams(temperature=1.0)] * rows, 0
    for at in range(rounds):
        keys = keys_of(rows, f"round {at}")
        parted += (draw(x.clone(), params, keys, HERE) != draw(y.clone(), params, keys, HERE)).sum().item()
    assert parted <= 2 * variation * rows * rounds + 6


# Bias and penalties.


def some_rows(seed=0, vocab=80, count=6):
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(0, vocab, 12).tolist() for _ in range(count)]
    outputs = [generator.integers(0, vocab // 4, 5 * at).tolist() for at in range(count)]
    return logits(count, vocab, seed), prompts, outputs


@pytest.mark.parametrize("penalty", [1.3, 0.6])
def test_repetition_penalty_is_that_of_transformers(penalty):
    x, prompts, outputs = some_rows()
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = [
        processor(torch.tensor([p + o]), x[i : i + 1].clone()) for i, (p, o) in enumerate(zip(prompts, outputs))
    ]
    params = SamplingParams(repetition_penalty=penalty)
    penalize(x, [params] * len(x), [TokenCounts(p, o) for p, o in zip(prompts, outputs)], HERE)
    torch.testing.assert_close(x, torch.cat(expected))


def test_presence_and_frequency_penalties_count_generated_tokens_alone():
    x, prompts, outputs = some_rows()
    expected = x.clone()
    params = [SamplingParams(presence_penalty=-0.5 + i / 4, frequency_penalty=1 - i / 3) for i in range(len(x))]
    for i, (p, output) in enumerate(zip(params, outputs)):
        for token in set(output):
            expected[i, token] -= p.frequency_penalty * output.count(token) + p.presence_penalty
    rows = [row(p, prompt=prompt, generated=output) for p, prompt, output in zip(params, prompts, outputs)]
    penalize(x, params, [r.counts for r in rows], HERE)
    torch.testing.assert_close(x, expected)


def test_counts_grow_with_the_row_as_if_counted_anew():
    generator = np.random.default_rng(1)
    prompt, tokens = generator.integers(0, 500, 100).tolist(), generator.integers(0, 500, 400).tolist()
    grown = TokenCounts(prompt, ())
    for token in tokens:
        grown.add(token)
    anew = TokenCounts(prompt, tokens)
    assert dict(zip(grown.ids.tolist(), grown.counts.tolist())) == dict(zip(anew.ids.tolist(), anew.counts.tolist()))
    assert len(set(grown.ids.tolist())) == len(grown.ids) == len({*prompt, *tokens})


def test_bias_is_added_before_the_penalties():
    x = torch.tensor([[1.0, -1.0, 0.5]] * 3)
    biased = SamplingParams(logit_bias={0: -3.0, 1: 100.0}, repetition_penalty=2.0)
    params = [biased, SamplingParams(), SamplingParams(logit_bias={2: 0.5})]
    add_bias(x, params, HERE)
    penalize(x, params, [TokenCounts([0, 1], ()), None, None], HERE)
    assert x.tolist() == [[-4.0, 49.5, 0.5], [1.0, -1.0, 0.5], [1.0, -1.0, 1.0]]


def test_a_bias_of_a_hundred_bans_and_forces_tokens():
    x = logits(40, 50)
    best = x.argmax(-1).tolist()
    banned = [row(SamplingParams(temperature=1.0, logit_bias={b: -100})) for b in best]
    forced = [row(SamplingParams(temperature=1.0, logit_bias={7: 100})) for _ in best]
    assert all(t != b for t, b in zip(sample(x, banned, workspace_bytes=ROOMY).tokens, best))
    assert sample(x, forced, workspace_bytes=ROOMY).tokens == [7] * 40


# A sweep's rows together.


def mixed_rows(count=40, vocab=120):
    kinds = [
        {},
        {"temperature": 0.8},
        {"temperature": 1.5, "top_k": 9},
        {"temperature": 1.0, "top_p": 0.7},
        {"logprobs": 3},
        {"temperature": 1.0, "min_p": 0.2, "logprobs": 0},
        {"presence_penalty": 1.5, "frequency_penalty": 0.3},
        {"repetition_penalty": 1.4, "temperature": 0.9, "seed": 11, "logprobs": 5},
        {"logit_bias": {3: 5.0}},
    ]
    generator = np.random.default_rng(0)
    rows = [
        row(
            SamplingParams(**kinds[at % len(kinds)]),
            key=f"row-{at}",
            index=at % 3,
            prompt=generator.integers(0, vocab, 9).tolist(),
            generated=generator.integers(0, vocab, at % 7).tolist(),
        )
        for at in range(count)
    ]
    return logits(count, vocab, seed=9), rows


def test_tokens_are_on_their_way_when_a_choice_is_made_and_are_waited_for_when_they_are_asked_for():
    x, rows = mixed_rows()
    brought, waited = [], []

    def download(tensor):
        brought.append(tensor)
        return lambda: waited.append(tensor) or tensor

    sampling = Sampling(x, rows, workspace_bytes=ROOMY, download=download)
    assert len(brought) == 1 and not waited
    assert sampling.chosen() == sample(x, rows, workspace_bytes=ROOMY) and len(waited) == 1


@pytest.mark.parametrize("workspace", [0, 48 * 120 * 3, ROOMY])
def test_a_row_gets_the_same_token_alone_in_any_order_and_in_any_chunk(workspace):
    x, rows = mixed_rows()
    before = x.clone()
    together = sample(x, rows, workspace_bytes=workspace)
    assert torch.equal(x, before), "the logits are left as they are"
    order = np.random.default_rng(1).permutation(len(rows)).tolist()
    shuffled = sample(x[order], [rows[at] for at in order], workspace_bytes=ROOMY)
    for place, at in enumerate(order):
        alone = sample(x[at : at + 1], [rows[at]], workspace_bytes=ROOMY)
        assert shuffled.tokens[place] == alone.tokens[0] == together.tokens[at]
        assert (alone.logprobs[0] is None) == (shuffled.logprobs[place] is None) == (rows[at].params.logprobs is None)


def test_tokens_of_a_row_are_drawn_with_one_key_after_the_other():
    state = row(SamplingParams(temperature=1.0))
    x, tokens = logits(1, 1000, spread=0.1), []
    for _ in range(20):
        (token,) = sample(x, [state], workspace_bytes=ROOMY).tokens
        state.append_token(token)
        tokens.append(token)
    assert len(set(tokens)) > 15, "equal logits, new numbers"
    resumed = row(SamplingParams(temperature=1.0), generated=tokens[:8])
    assert sample(x, [resumed], workspace_bytes=ROOMY).tokens == tokens[8:9]


def test_seed_of_the_row_overrides_that_of_the_job():
    x = logits(1, 1000, spread=0.1)

    def token(seed=None, job=0, **rest):
        params = SamplingParams(temperature=1.0, seed=seed)
        return sample(x, [row(params, seed=job, **rest)], workspace_bytes=ROOMY).tokens[0]

    assert token(seed=5, job=1) == token(seed=5, job=2) == token(job=5)
    assert len({token(), token(job=1), token(key="other"), token(index=1), token(seed=-3)}) == 5


def test_greedy_rows_take_the_best_token_of_what_bias_and_penalties_leave():
    x, prompts, outputs = some_rows()
    params = SamplingParams(repetition_penalty=5.0, presence_penalty=2.0, logit_bias={1: 1.0})
    rows = [row(params, prompt=p, generated=o) for p, o in zip(prompts, outputs)]
    changed = x.clone()
    add_bias(changed, [params] * len(x), HERE)
    penalize(changed, [params] * len(x), [TokenCounts(p, o) for p, o in zip(prompts, outputs)], HERE)
    assert sample(x, rows, workspace_bytes=ROOMY).tokens == changed.argmax(-1).tolist() != x.argmax(-1).tolist()


def test_no_rows_give_no_tokens():
    assert sample(torch.empty(0, 30), [], workspace_bytes=ROOMY).tokens == []


ASKED = (
    {},
    {"logprobs": 2},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.5, "logprobs": 3},
    {"temperature": 0.7, "top_k": 3, "min_p": 0.1},
    {"logit_bias": {3: -100, 4: 100}},
    {"repetition_penalty": 1.2, "logprobs": 0},
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_with_any_logit_that_is_not_finite_get_no_token_and_the_others_theirs(dtype):
    """Drawn: NaN, infinity or minus infinity at one, several or all places of some rows, whatever the rows ask for."""
    rng = np.random.default_rng(4)
    for turn in range(20):
        x = logits(24, 50, seed=turn).to(dtype)
        rows = [row(SamplingParams(**ASKED[i % len(ASKED)]), key=str(i), prompt=[5, 9]) for i in range(len(x))]
        sound = sample(x, rows, workspace_bytes=ROOMY)
        broken = rng.random(len(x)) < 0.4
        for at in broken.nonzero()[0]:
            places = rng.choice(50, rng.choice([1, 3, 50]), replace=False)
            x[at, places] = torch.tensor(rng.choice([np.nan, np.inf, -np.inf], len(places))).to(dtype)
        chosen = sample(x, rows, workspace_bytes=int(rng.choice([1, ROOMY])))
        assert chosen.tokens == [NOT_FINITE if bad else token for token, bad in zip(sound.tokens, broken)]
        assert [p for p, bad in zip(chosen.logprobs, broken) if not bad] == [
            p for p, bad in zip(sound.logprobs, broken) if not bad
        ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_of_positions_with_a_logit_that_is_not_finite_are_nan_and_the_others_theirs(value):
    x, targets = logits(6, 40), torch.arange(6)
    for place in (0, 17, 39):
        broken, scores = x.clone(), PromptScores(targets, 3)
        broken[[1, 4], place] = value
        for first in range(0, 40, 13):
            scores.add(slice(0, 6), first, broken[:, first : first + 13].clone())
        found = [record.logprob for record in scores.records([3] * 6)]
        assert [np.isnan(p) for p in found] == [False, True, False, False, True, False]
        assert found[0] == pytest.approx(x[0].log_softmax(-1)[0].item(), abs=1e-5)


def test_minus_infinity_that_a_row_asks_for_is_no_fault():
    x = logits(2, 30)
    rows = [row(SamplingParams(temperature=1.0, top_k=1)), row(SamplingParams(logit_bias={1: -100}, logprobs=1))]
    assert NOT_FINITE not in sample(x, rows, workspace_bytes=ROOMY).tokens


# Log-probabilities.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_raw_logits_whatever_the_row_asks_for(dtype):
    x = logits(4, 200).to(dtype)
    asked = ({}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 3}, {"logit_bias": {8: 100}})
    chosen = sample(x, [row(SamplingParams(logprobs=6, **a)) for a in asked], workspace_bytes=ROOMY)
    expected = x.float().log_softmax(-1)
    for at, (token, record) in enumerate(zip(chosen.tokens, chosen.logprobs)):
        assert record.token_id == token and record.logprob == pytest.approx(expected[at, token].item(), abs=1e-5)
        # Equal ones by lower id.
        best = sorted(range(200), key=lambda t: (-expected[at, t].item(), t))[:6]
        assert [t for t, _ in record.top] == best
        assert [p for _, p in record.top] == pytest.approx([expected[at, t].item() for t in best], abs=1e-5)
    assert chosen.tokens[3] == 8 and 8 not in [t for t, _ in chosen.logprobs[3].top]


def test_rows_get_as_many_alternatives_as_they_ask_for():
    rows = [row(SamplingParams(logprobs=k)) for k in (0, 20, 3)]
    chosen = sample(logits(3, 12), rows, workspace_bytes=ROOMY)
    assert [len(record.top) for record in chosen.logprobs] == [0, 12, 3]


@pytest.mark.parametrize("k", [1, 4, 60, 100, 200])
def test_equal_logits_are_reported_by_lower_id(k):
    x = torch.randint(0, 9, (30, 100), generator=torch.Generator().manual_seed(0)).float()
    x[0], x[1, 50:] = 0, 20
    values, ids = top_tokens(x, k)
    for at in range(30):
        best = sorted(range(100), key=lambda t: (-x[at, t].item(), t))[:k]
        assert ids[at].tolist() == best and values[at].tolist() == x[at, best].tolist()


# Waits for the device.


class Waits(TorchDispatchMode):
    """Operations by which the host waits for a GPU: their results' shapes, or numbers that the host reads, depend on numbers there."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.made, real = [], torch.Tensor.tolist
        monkeypatch.setattr(torch.Tensor, "tolist", lambda x: self.made.append("tolist") or real(x))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = (
            [x for x in args[1] if x is not None and x.dtype == torch.bool]
            if "index" in str(function) and len(args) > 1 and isinstance(args[1], (list, tuple))
            else []
        )
        if function in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default) or masks:
            self.made.append(str(function))
        return function(*args, **(kwargs or {}))


def test_the_host_waits_once_for_all_chunks_and_once_more_for_rows_that_keep_many_tokens(monkeypatch):
    x, vocab = logits(60, 3000), 3000
    x[::7] *= 0.01  # of these a top_p set has most of the vocabulary
    asked = [
        {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
        {"temperature": 1.0, "repetition_penalty": 1.2, "logit_bias": {3: 1.0}},
        {"temperature": 1.0, "min_tokens": 400, "stop_token_ids": [5]},
        {},
    ]
    rows = [row(SamplingParams(max_tokens=500, **asked[at % 4]), generated=range(20)) for at in range(60)]
    expected = [sample(x[at : at + 1], rows[at : at + 1], workspace_bytes=ROOMY).tokens[0] for at in range(60)]
    upload = waiting(torch.device("cpu"))
    with Waits(monkeypatch) as waits:
        few = sample(x, rows, workspace_bytes=4 * SAMPLED_ROW_BYTES * vocab, upload=upload)
    assert waits.made == ["tolist"] and few.tokens == expected
    flat = [row(SamplingParams(temperature=1.0, top_p=0.95)) for _ in range(60)]
    waits.made.clear()
    with waits:
        sample(x, flat, workspace_bytes=4 * SAMPLED_ROW_BYTES * vocab, upload=upload)
    assert waits.made == ["tolist"] * (1 + len(NUCLEUS_TOKENS))


# Memory.


class MemoryPeak(TorchDispatchMode):
    """Bytes of the tensors made under it, at their most."""

    def __init__(self):
        super().__init__()
        self._held, self._now, self.bytes = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._held:
                self._held.add(storage._cdata)
                self._now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.bytes = max(self.bytes, self._now)
        return result

    def _freed(self, storage, nbytes):
        self._held.discard(storage)
        self._now -= nbytes


@pytest.mark.parametrize("rows_at_once", [1, 4])
@pytest.mark.parametrize(
    "asked",
    [{"temperature": 1.0}, {"temperature": 9.0, "top_p": 0.99, "min_p": 1e-9, "top_k": 15_000, "logprobs": 20}],
    ids=str,
)
def test_rows_take_no_more_memory_than_they_are_given(rows_at_once, asked):
    x, vocab = logits(16, 20_000), 20_000
    rows = [row(SamplingParams(**asked), generated=range(50)) for _ in range(16)]
    given = SAMPLED_ROW_BYTES * vocab * rows_at_once
    with MemoryPeak() as peak:
        sample(x, rows, workspace_bytes=given)
    assert 4 * vocab <= peak.bytes < given  # a row in float32 is the least


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
def test_the_gpu_chooses_what_the_cpu_chooses():
    x, rows = mixed_rows(400, 5000)
    here, there = (sample(x.to(device), rows, workspace_bytes=ROOMY) for device in ("cpu", "cuda"))
    assert here.tokens == there.tokens
    for a, b in zip(here.logprobs, there.logprobs):
        assert (a is None) == (b is None)
        if a is not None:
            assert [t for t, _ in a.top] == [t for t, _ in b.top] and a.logprob == pytest.approx(b.logprob, abs=1e-5)


# What may not end a row yet.


@pytest.mark.parametrize(
    "asked",
    [{}, {"logprobs": 3}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 1}, {"logit_bias": {4: 100.0}}],
    ids=str,
)
def test_ids_that_end_a_row_are_not_chosen_before_its_min_tokens(asked):
    x = logits(3, 20)
    x[:, 4], x[:, 9] = 12.0, 11.0
    params = SamplingParams(min_tokens=2, stop_token_ids=(9, 10**6), **asked)
    rows = [row(params, generated=ids, eos_ids={4}) for ids in ((), (5,), (5, 6))]
    chosen = sample(x, rows, workspace_bytes=ROOMY)
    assert not {4, 9} & set(chosen.tokens[:2]) and chosen.tokens[2] == 4
    if "logprobs" in asked:  # they are those of the model's own distribution
        expected = x.log_softmax(-1)
        for at, record in enumerate(chosen.logprobs):
            assert record.top[0] == (4, pytest.approx(expected[at, 4].item(), abs=1e-5))
            assert record.logprob == pytest.approx(expected[at, record.token_id].item(), abs=1e-5)


def test_rows_without_min_tokens_beside_one_with_it_keep_their_tokens():
    x = logits(4, 50, seed=3)
    eos = set(x.argmax(-1).tolist())
    rows = [row(SamplingParams(min_tokens=at % 2), eos_ids=eos) for at in range(4)]
    chosen = sample(x, rows, workspace_bytes=ROOMY).tokens
    barred = x.clone()
    barred[:, list(eos)] = -torch.inf
    assert chosen == [(barred if at % 2 else x)[at].argmax().item() for at in range(4)]
