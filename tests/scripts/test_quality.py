"""What a format costs in quality: the text, what is scored of it, what is kept, and the same loss as transformers'."""

import math

import pytest

from scripts.packed import quality
from scripts.packed.quality import FORMS, Scores, figures_of, flexmoe_loss, transformers_loss, windows
from tests.support.tiny import Recipe, make


def test_prompts_are_spread_over_the_text_and_do_not_overlap():
    rows = windows(range(1000), 300, 101)
    assert [row[0] for row in rows] == [0, 333, 666] and all(len(row) == 101 for row in rows)
    with pytest.raises(SystemExit, match="1000 tokens, which are not enough for 10 prompts of 101"):
        windows(range(1000), 1000, 101)


def test_scores_are_kept_for_the_same_prompts_only(tmp_path):
    rows, measured = [[1, 2, 3]], iter((1.5, 2.5))
    assert Scores(tmp_path / "scores.json", rows).of("int4", lambda: next(measured)) == 1.5
    assert Scores(tmp_path / "scores.json", rows).of("int4", lambda: next(measured)) == 1.5
    assert Scores(tmp_path / "scores.json", [[1, 2, 4]]).of("int4", lambda: next(measured)) == 2.5


def test_the_loss_is_that_of_transformers(tmp_path):
    variant = make(Recipe({}, {}), tmp_path / "model", lengths=(40, 40))
    own, theirs = (loss(tmp_path / "model", variant.prompts) for loss in (flexmoe_loss, transformers_loss))
    assert own == pytest.approx(theirs, abs=0.02) and 4 < theirs < 12
    rounded = flexmoe_loss(tmp_path / "model", variant.prompts, **dict(FORMS["int8 KV cache"].options))
    assert rounded != own and rounded == pytest.approx(own, abs=0.05)


def test_a_format_that_loses_more_than_its_target_is_marked():
    losses = dict.fromkeys(["transformers", *FORMS], 2.0)
    assert all(figure.met is not False for figure in figures_of(losses))
    missed = figures_of(losses | {"int8, groups of 64": 2.0 + math.log(1.004)})
    assert [figure.what for figure in missed if figure.met is False] == ["perplexity of int8, groups of 64"]
    assert "+0.40 %" in next(figure.value for figure in missed if figure.met is False)


def test_the_text_has_enough_words():
    assert len(quality.python_manual().split()) > 40_000
