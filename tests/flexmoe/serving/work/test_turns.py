"""Whose turn it is."""

import random

from flexmoe.serving.work.turns import Item, Turn, turn_of


def batch(model, arrival, priority=0, *, begun=False):
    return Item(model=model, arrival=arrival, name=f"{model}{arrival}", priority=priority, has_begun=begun)


def online(model, arrival=0):
    return Item(model=model, arrival=arrival)


def test_nothing_waits():
    assert turn_of([]) is None


def test_neighbours_of_one_model_run_together_and_none_overtakes_another_model():
    items = [batch("a", 1), batch("a", 2), batch("b", 3), batch("a", 4)]
    assert turn_of(items) == Turn(model="a", batches=("a1", "a2"))


def test_priority_comes_before_age():
    items = [batch("a", 1), batch("b", 2, 5), batch("a", 3, 5)]
    assert turn_of(items) == Turn(model="b", batches=("b2",))


def test_a_call_comes_before_batches_of_other_models():
    assert turn_of([batch("a", 1, 9), online("b")], "a").model == "b"
    assert turn_of([batch("a", 1), batch("b", 2), online("b")]) == Turn(model="b", batches=())


def test_a_model_keeps_its_turn_until_it_may_leave():
    items = [online("b"), batch("a", 4, begun=True), batch("b", 2), batch("a", 7)]
    assert turn_of(items, "a", may_leave=False) == Turn(model="a", batches=("a4",))
    assert turn_of(items, "a") == Turn(model="b", batches=("b2",))
    assert turn_of([batch("b", 2)], "a", may_leave=False).model == "b", "nothing waits for the one that is loaded"


def test_all_batches_run_in_order_with_the_fewest_switches():
    rng = random.Random(3)
    items = [batch(rng.choice("abc"), arrival, rng.choice((0, 0, 1))) for arrival in range(60)]
    ordered = sorted(items, key=lambda each: (-each.priority, each.arrival))
    done, switches, model = [], 0, None
    while items:
        turn = turn_of(items, model)
        switches += turn.model != model
        model = turn.model
        done += turn.batches
        items = [each for each in items if each.name not in turn.batches]
    assert done == [each.name for each in ordered]
    assert switches == sum(one.model != other.model for one, other in zip([online("")] + ordered, ordered))
