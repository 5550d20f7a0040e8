"""An engine without a model: what a job sees of one, sweep by sweep, with answers that follow from the request alone."""

from __future__ import annotations

from flexmoe.outputs import CompletionOutput, RequestOutput, TokenLogprob
from flexmoe.params import InFlight, Resumed

EOS = 2


def answer(request, sample):
    """The ids of a completion: those of the prompt reversed (a sample later, each one higher), and EOS."""
    ids = [token + sample for token in reversed(request.prompt_token_ids) if token > EOS]
    ids = (*ids, EOS)
    limit = request.params.max_tokens
    if request.params.ignore_eos or len(ids) > limit:
        return ids[:limit], "length"
    return ids, "stop"


def logprob(token):
    return TokenLogprob(token_id=token, logprob=-token / 8, top=((token, -token / 8),))


class FakeEngine:
    """Advances each request in flight by one token a sweep.

    Args:
        window: requests in flight.
        longest: most tokens of a prompt.
        room: tokens that a row has room for.
        fail: requests whose prompt ends with one of these ids fail.
        crash_at: sweeps that raise `crash`, counted from 0.
        on_sweep_start: called with the number of the sweep, before it.
    """

    def __init__(
        self,
        window=3,
        longest=1000,
        room=10**6,
        fail=(),
        crash_at=(),
        crash=RuntimeError("engine crashed"),
        on_sweep_start=None,
    ):
        self.window, self.longest, self.largest_row_tokens = window, longest, room
        self.fail, self.crash_at, self.crash, self.on_sweep_start = set(fail), set(crash_at), crash, on_sweep_start
        self.pulled, self.most_in_flight, self.sweeps = [], 0, 0
        self.tokens = 0, 0
        self._running = []
        self._left = []

    def check(self, request):
        if len(request.prompt_token_ids) > self.longest:
            return f"the prompt has {len(request.prompt_token_ids)} tokens and there is room for {self.longest}; shorten it"
        return None

    def stream(self, requests, on_sweep=None):
        source = iter(requests)
        self._left = []
        try:
            while True:
                while len(self._running) < self.window and (request := next(source, None)) is not None:
                    self.pulled.append(request)
                    self._running.append(_Running(request))
                    self.tokens = self.tokens[0] + len(request.prompt_token_ids), self.tokens[1]
                self.most_in_flight = max(self.most_in_flight, len(self._running))
                if not self._running:
                    return
                yield from self._sweep()
                if on_sweep is not None:
                    on_sweep()
        except Exception:
            self._left = self._states()
            raise
        finally:
            self._running = []

    def in_flight(self):
        return self._states() if self._running else self._left

    def _sweep(self):
        if self.on_sweep_start is not None:
            self.on_sweep_start(self.sweeps)
        if self.sweeps in self.crash_at:
            self.crash_at.discard(self.sweeps)
            raise self.crash
        self.sweeps += 1
        for running in self._running:
            self.tokens = self.tokens[0], self.tokens[1] + running.advance()
        done = [running for running in self._running if running.done]
        self._running = [running for running in self._running if not running.done]
        return [running.result(self.fail) for running in reversed(done)]

    def _states(self):
        return [state for running in self._running for state in running.states()]


class _Running:
    def __init__(self, request):
        self.request = request
        self.answers = [answer(request, sample) for sample in range(request.params.n)]
        resumed = request.resumed or (Resumed(),) * request.params.n
        self.tokens = [list(state.token_ids) for state in resumed]
        for (ids, _), had, state in zip(self.answers, self.tokens, resumed, strict=True):
            assert had == list(ids[: len(had)]), "a row resumes with what it had generated"
            if request.params.logprobs is not None:
                assert list(state.logprobs or ()) == list(map(logprob, had)), "and with the log-probabilities of that"

    @property
    def done(self):
        return all(len(had) == len(ids) for (ids, _), had in zip(self.answers, self.tokens))

    def advance(self):
        before = sum(map(len, self.tokens))
        self.tokens = [list(ids[: len(had) + 1]) for (ids, _), had in zip(self.answers, self.tokens)]
        return sum(map(len, self.tokens)) - before

    def logprobs(self, ids):
        return None if self.request.params.logprobs is None else list(map(logprob, ids))

    def states(self):
        return [
            InFlight(request_id=self.request.request_id, index=index, token_ids=ids, logprobs=self.logprobs(ids))
            for index, ids in enumerate(self.tokens)
            if ids
        ]

    def result(self, fail):
        request = self.request
        error = "the device was lost" if request.prompt_token_ids[-1] in fail else None
        outputs = [
            CompletionOutput(
                index=index,
                text=None,
                token_ids=ids,
                finish_reason=reason,
                logprobs=None if request.params.logprobs is None else tuple(map(logprob, ids)),
            )
            for index, (ids, reason) in enumerate(self.answers)
        ]
        return RequestOutput(
            request_id=request.request_id,
            prompt=None,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[] if error else outputs,
            finished=True,
            error=error,
        )
