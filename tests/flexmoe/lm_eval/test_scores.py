"""The model ``flexmoe`` of lm-evaluation-harness: its scores and completions are those of the harness's own ``hf`` model."""

import json
import subprocess
import sys

import pytest
import torch

from flexmoe.errors import UsageError
from scripts.checkpoints.shapes import SIZES
from scripts.make_checkpoint import make_checkpoint
from scripts.scaling.tasks import TASKS, write_tasks
from tests.support.paths import ROOT

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra: pip install 'flexmoe[lm-eval]'")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
CONTEXT = 128
#: Sums of a few hundred log-probabilities in float32.
CLOSE = 2e-3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """With weights that make some tokens far more probable than others, so that an answer is not what rounding makes it."""
    shape = SIZES["tiny"] | {"max_position_embeddings": CONTEXT, "initializer_range": 0.15}
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model", shape, dtype=torch.float32)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Texts of several windows among them."""
    return write_tasks(tmp_path_factory.mktemp("tasks"), rows=12, words=8, text_words=150)


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory):
    from flexmoe.lm_eval import FlexMoELM

    made = FlexMoELM(str(checkpoint), policy="none", device="cpu", offload_dir=tmp_path_factory.mktemp("offload"))
    yield made
    made.llm.close()


@pytest.fixture(scope="module")
def reference(checkpoint):
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(checkpoint), device="cpu", dtype="float32", batch_size=4)


def evaluated(model, tasks, names=TASKS, **options):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(model, tasks=list(names), task_manager=manager, log_samples=True, **options)


def responses(results, name):
    """The model's answers to a task's documents, in order."""
    return [sample["filtered_resps"] for sample in sorted(results["samples"][name], key=lambda s: s["doc_id"])]


def numbers(results, name):
    return {key: value for key, value in results["results"][name].items() if isinstance(value, float)}


def same(ours, theirs, names=TASKS):
    for name in names:
        assert numbers(ours, name) == pytest.approx(numbers(theirs, name), rel=1e-4, nan_ok=True), name
        assert len(responses(ours, name)) == 12
        for our, their in zip(responses(ours, name), responses(theirs, name), strict=True):
            if name == "local_answer":
                assert our == their
                continue
            for mine, other in zip(our, their, strict=True):
                mine, other = (mine, other) if isinstance(mine, (list, tuple)) else ((mine,), (other,))
                assert float(mine[0]) == pytest.approx(float(other[0]), abs=CLOSE)
                assert mine[1:] == other[1:]


def test_scores_and_completions_are_those_of_the_reference(model, reference, tasks):
    ours, theirs = evaluated(model, tasks), evaluated(reference, tasks)
    same(ours, theirs)
    texts = [text for [text] in responses(ours, "local_answer")]
    assert len(set(texts)) > 6 and any(texts), "the completions say something"


def test_so_are_those_of_chats(model, reference, tasks):
    chats = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    names = ("local_choice", "local_answer")
    same(evaluated(model, tasks, names, **chats), evaluated(reference, tasks, names, **chats), names)


def test_a_chat_whose_answer_is_begun_stays_open(model, reference):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "well"}]
    assert model.apply_chat_template(chat, False) == reference.apply_chat_template(chat, False)


def test_a_template_that_refuses_a_system_gets_the_chat_without_it(model, reference, monkeypatch):
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "[{{ m['content'] }}]{% endfor %}"
    )
    monkeypatch.setattr(model.llm, "tokenizer", model.llm.tokenizer.with_chat_template(template))
    monkeypatch.setattr(reference.tokenizer, "chat_template", template)
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert model.apply_chat_template(chat) == reference.apply_chat_template(chat) == "[hi]"


def test_a_token_that_no_bias_reaches_is_scored_all_the_same(model, reference, monkeypatch):
    from flexmoe.lm_eval import scoring

    monkeypatch.setattr(scoring, "MAX_BIAS", 0.0)
    asked = [(None, list(range(5, 20)), [token]) for token in (40, 41, 42)]
    for mine, other in zip(
        model._loglikelihood_tokens(asked, disable_tqdm=True), reference._loglikelihood_tokens(asked), strict=True
    ):
        assert mine == (pytest.approx(other[0], abs=CLOSE), other[1])


def test_answers_of_one_token_compute_their_question_once(model):
    question = list(range(5, 105))
    before = model.llm.metrics()["computed_tokens"]
    model._loglikelihood_tokens([(None, question, [token]) for token in range(40, 48)], disable_tqdm=True)
    computed = model.llm.metrics()["computed_tokens"] - before
    assert computed < 2 * len(question), f"{computed} tokens for 8 answers to a question of {len(question)}"


def test_what_cannot_run_says_so(model):
    from lm_eval.api.instance import Instance

    request = Instance("generate_until", {}, ("hi", {"until": [], "max_gen_toks": CONTEXT}), 0)
    with pytest.raises(UsageError, match="asks for 128 new tokens, and max_length is 128"):
        model.generate_until([request], disable_tqdm=True)


def test_the_command_evaluates_and_says_what_is_wrong(checkpoint, tasks, tmp_path):
    command = [sys.executable, "-m", "flexmoe.lm_eval", "--model", "flexmoe", "--tasks", "local_letter"]
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path / "out"), "--device", "cpu", "--model_args"]
    arguments = f"pretrained={checkpoint},policy=none,offload_dir={tmp_path}"
    done = subprocess.run([*command, arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    [results] = (tmp_path / "out").rglob("results_*.json")
    assert "acc,none" in json.loads(results.read_text())["results"]["local_letter"]
    done = subprocess.run([*command, f"{arguments},gpu_memm=3"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == UsageError.exit_code and "gpu_memm" in done.stderr.splitlines()[-1]
