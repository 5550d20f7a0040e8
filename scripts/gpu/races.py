"""The stage `races` of the GPU benchmark: the tests of exactness with streams of random pace and poisoned free memory."""

from __future__ import annotations

from scripts.benchmark.record import Figure
from scripts.gpu.context import Context
from scripts.gpu.tests import run_tests

TESTS = "tests/system/test_exactness.py"
#: A further round is begun only if so much more time than the longest one took is left.
SPARE = 1.2


def races(run: Context) -> tuple[list[Figure], dict]:
    """As many seeds as the time takes, one at least."""
    chosen = ["-m", "not gpu and not slow", "-k", "greedy and window"] if run.rehearse else ["-m", "gpu and not slow"]
    rounds: list[dict] = []
    longest_s = 0.0
    while not rounds or (run.left_s() > SPARE * longest_s and not run.rehearse):
        before = run.left_s()
        counts = run_tests(
            run, f"races-{len(rounds)}", ["-p", "tests.support.races", TESTS, *chosen], FLEXMOE_RACES=str(len(rounds))
        )
        rounds.append({"seed": len(rounds), **counts})
        longest_s = max(longest_s, before - run.left_s())
        run.say(f"seed {len(rounds) - 1}: {counts}")
    passed = sum(one["passed"] for one in rounds)
    asked = sum(one["tests"] - one["skipped"] for one in rounds)
    return [
        Figure(
            what=f"tests of exactness with streams of random pace, {len(rounds)} seeds",
            value=f"{passed} of {asked} pass",
            beside="all of them",
            ratio=passed / max(1, asked),
            target=1.0,
        )
    ], {"rounds": rounds}
