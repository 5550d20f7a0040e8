"""Tasks for lm-evaluation-harness that need no network: one of each kind of request, on text that is in the repository."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scripts.support.corpus import corpus_words

#: By name, in the order of the kinds of request: ``loglikelihood`` (with answers of several tokens, and of one),
#: ``loglikelihood_rolling`` and ``generate_until``.
TASKS = ("local_choice", "local_letter", "local_text", "local_answer")
_CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "num_fewshot": 2,
    "fewshot_split": "test",
    "fewshot_config": {"sampler": "first_n"},
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
_KINDS: dict[str, dict[str, Any]] = {
    "local_choice": _CHOICES,
    "local_letter": {**_CHOICES, "target_delimiter": ""},
    "local_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "local_answer": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", " the"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(directory: Path, rows: int, words: int, text_words: int | None = None) -> Path:
    """Writes tasks and their data; `directory` is what ``--include_path`` takes.

    Args:
        rows: documents of each task.
        words: of a question, about.
        text_words: of a text of `local_text`; None: four times as many.
    """
    directory.mkdir(parents=True, exist_ok=True)
    data = {
        "local_choice": [_question(row, words, 4) for row in range(rows)],
        "local_letter": [{**_question(row, words, 4), "choices": list("ABCD")} for row in range(rows)],
        "local_text": [{"text": _text(row, text_words or 4 * words)} for row in range(rows)],
        "local_answer": [{"question": _text(row, words), "answer": "x"} for row in range(rows)],
    }
    for name in TASKS:
        lines = directory / f"{name}.jsonl"
        lines.write_text("".join(json.dumps(row) + "\n" for row in data[name]), encoding="utf-8")
        # JSON is YAML.
        (directory / f"{name}.yaml").write_text(json.dumps(_task(name, lines)), encoding="utf-8")
    return directory


def _task(name: str, data: Path) -> Mapping[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "metadata": {"version": 1.0},
        **_KINDS[name],
    }


def _question(row: int, words: int, answers: int) -> dict[str, Any]:
    return {
        "question": f"Question: {_text(row, words)}\nAnswer:",
        "choices": [_text(1000 + 7 * row + 3 * number, 1 + number) for number in range(answers)],
        "label": row % answers,
    }


def _text(start: int, words: int) -> str:
    """So many words of the corpus, another piece for each start."""
    corpus: Sequence[str] = corpus_words()
    first = 37 * start % len(corpus)
    return " ".join((*corpus[first:], *corpus)[:words])
