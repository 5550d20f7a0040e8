"""What a model thinks comes apart from its answer, in whatever way it is written and wherever the completion ends."""

import json

import pytest

from flexmoe.openai.batch_line import parse_line
from flexmoe.openai.reasoning import ReasoningParser
from flexmoe.openai.response import ResponseEncoder
from flexmoe.outputs import CompletionOutput, RequestOutput, TokenLogprob
from flexmoe.text.tokenizer import Tokenizer
from tests.support.tokenizers import (
    HARMONY_TEMPLATE,
    HARMONY_TOKENS,
    THINK_TEMPLATE,
    THINK_TOKENS,
    build_reasoning_tokenizer,
    build_tokenizer,
)

USER = [{"role": "user", "content": "hello world"}]
#: How each way of writing it is tokenized, and with which template.
KINDS = {
    "think": (THINK_TOKENS, THINK_TEMPLATE),
    "think-special": (tuple((text, True) for text, _ in THINK_TOKENS), THINK_TEMPLATE),
    "think-text": (THINK_TOKENS[:2], THINK_TEMPLATE),
    "harmony": (HARMONY_TOKENS, HARMONY_TEMPLATE),
    "none": ((), "{% for m in messages %}{{ m.content }}{% endfor %}"),
}
FINAL = "<|start|>assistant<|channel|>final<|message|>"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    made = {}
    for kind, (tokens, template) in KINDS.items():
        directory = tmp_path_factory.mktemp(kind)
        build_reasoning_tokenizer(directory, tokens, template)
        made[kind] = Tokenizer.load(directory)
    return made


def encode(tokenizer, text):
    (ids,) = tokenizer.encode_all([text], add_special_tokens=False)
    return ids


def message(tokenizer, completion, *, prompt=None, keep=False, reason="length", text=None, n=1, scored=False, **fields):
    """The body of a chat's answer.

    Args:
        completion: as the model writes it, marks included.
        text: what the engine makes of it, where a stop string cut it.
    """
    row = {"messages": USER, "n": n} | fields
    request = parse_line(json.dumps(row).encode(), 1)
    ids = encode(tokenizer, completion)
    prompt = tokenizer.render(USER) if prompt is None else prompt
    logprobs = tuple(TokenLogprob(token_id=id, logprob=-0.5) for id in ids) if scored else None
    outputs = [
        CompletionOutput(
            index=i,
            text=text,
            token_ids=ids,
            finish_reason=reason,
            stop_reason="x" if text else None,
            logprobs=logprobs,
        )
        for i in range(n)
    ]
    result = RequestOutput(
        request_id="0/0", prompt=None, prompt_token_ids=encode(tokenizer, prompt), outputs=outputs, finished=True
    )
    encoder = ResponseEncoder(tokenizer, fingerprint="f", model_name="m", created_s=1, keep_reasoning=keep)
    return json.loads(encoder.success(request, [result]))["response"]["body"]


def split(tokenizer, completion, **more):
    (choice,) = message(tokenizer, completion, **more)["choices"]
    return choice["message"].get("reasoning_content"), choice["message"]["content"]


THINKING = [
    ("weights travel\n</think>\n\nhello world", ("weights travel", "hello world")),  # the template began it
    ("<think>\nweights\n</think>\n\nhello", ("weights", "hello")),  # the model began it
    ("weights travel from", ("weights travel from", None)),  # its length ended it
    ("<think>\nweights", ("weights", None)),
    ("</think>hello", (None, "hello")),
    ("weights</think>", ("weights", "")),
    ("fox</think>\n\n    hello <think> and </think> world", ("fox", "    hello <think> and </think> world")),
]


@pytest.mark.parametrize("kind", ["think", "think-text"])
@pytest.mark.parametrize("completion, parts", THINKING, ids=range(len(THINKING)))
def test_a_think_block_comes_apart_also_where_the_prompt_begins_it(tokenizers, kind, completion, parts):
    assert split(tokenizers[kind], completion) == parts


@pytest.mark.parametrize("completion, parts", THINKING[:-1], ids=range(len(THINKING) - 1))
def test_marks_that_texts_leave_out_are_found_among_the_ids(tokenizers, completion, parts):
    assert split(tokenizers["think-special"], completion) == parts


def test_a_prompt_that_ends_the_thinking_or_does_not_begin_it_has_no_reasoning(tokenizers):
    tokenizer = tokenizers["think"]
    closed = tokenizer.render(USER, {"enable_thinking": False})
    assert split(tokenizer, "hello </think> world", prompt=closed) == (None, "hello </think> world")
    opened = "<|im_start|>assistant\n"
    assert split(tokenizer, "hello <think>world", prompt=opened) == (None, "hello <think>world")
    assert split(tokenizer, "\n<think>fox</think>hello", prompt=opened) == ("fox", "hello")
    assert split(tokenizer, "fox</think>hello", prompt=opened) == ("fox", "hello"), "the message was continued"


HARMONY = [
    (f"<|channel|>analysis<|message|>the fox<|end|>{FINAL}hello world<|return|>", ("the fox", "hello world")),
    ("<|channel|>final<|message|>hello<|return|>", (None, "hello")),
    ("<|channel|>analysis<|message|>the quick", ("the quick", None)),
    ("<|channel|>analysis<|message|>the fox<|end|><|start|>assistant<|channel|>fi", ("the fox", None)),
    ("<|channel|>analysis", (None, None)),
    ("<|channel|>", (None, None)),
    (f"<|channel|>analysis<|message|>the fox<|end|>{FINAL}", ("the fox", "")),
    (
        "<|channel|>analysis<|message|>fox<|end|><|start|>assistant<|channel|>commentary to=functions.run "
        "<|constrain|>json<|message|>{}<|call|>",
        ("fox\n{}", None),
    ),
    ("<|message|>hello<|return|>", (None, "hello")),
    ("hello", (None, "hello")),
]


@pytest.mark.parametrize("completion, parts", HARMONY, ids=range(len(HARMONY)))
def test_the_final_channel_of_harmony_is_the_answer_and_others_are_reasoning(tokenizers, completion, parts):
    ended = completion.endswith(("<|return|>", "<|call|>"))
    assert split(tokenizers["harmony"], completion, reason="stop" if ended else "length") == parts
    spelled = completion.removesuffix("<|return|>").removesuffix("<|call|>")  # what the engine makes of it
    assert split(tokenizers["harmony"], completion, skip_special_tokens=False, text=spelled) == parts


@pytest.mark.parametrize(
    "kind, completion, text, parts",
    [
        ("think", "weights</think>\n\nhello world over", "weights</think>\n\nhello ", ("weights", "hello ")),
        ("think", "weights travel", "weights tr", ("weights tr", None)),
        ("think-special", "weights</think>hello world over", "weightshello ", ("weights", "hello ")),
        (
            "harmony",
            f"<|channel|>analysis<|message|>fox<|end|>{FINAL}hello world",
            "analysisfoxassistantfinalhel",
            ("fox", "hel"),
        ),
        ("harmony", "<|channel|>analysis<|message|>the quick", "analysisthe q", ("the q", None)),
        ("harmony", f"<|channel|>analysis<|message|>the fox<|end|>{FINAL}h", "analysisthe f", ("the f", None)),
    ],
)
def test_what_a_stop_string_cut_stays_cut(tokenizers, kind, completion, text, parts):
    assert split(tokenizers[kind], completion, reason="stop", text=text) == parts


@pytest.mark.parametrize("kind", ["think", "harmony"])
def test_kept_reasoning_is_the_text_as_it_is_decoded(tokenizers, kind):
    tokenizer, completion = tokenizers[kind], {"think": THINKING, "harmony": HARMONY}[kind][0][0]
    body = message(tokenizer, completion, keep=True)
    (choice,) = body["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": tokenizer.decode(encode(tokenizer, completion)),
        "refusal": None,
    }
    assert "completion_tokens_details" not in body["usage"]


def test_every_sample_comes_apart_and_reasoning_tokens_are_those_of_all(tokenizers):
    tokenizer = tokenizers["harmony"]
    body = message(tokenizer, HARMONY[0][0], reason="stop", n=3, scored=True, logprobs=True)
    assert [choice["message"]["content"] for choice in body["choices"]] == ["hello world"] * 3
    thought, whole = len(encode(tokenizer, "the fox")), encode(tokenizer, HARMONY[0][0])
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3 * thought}
    assert all(len(choice["logprobs"]["content"]) == len(whole) for choice in body["choices"])


def test_marks_that_are_no_tokens_leave_the_reasoning_uncounted(tokenizers):
    assert "completion_tokens_details" not in message(tokenizers["think-text"], THINKING[0][0])["usage"]


def test_an_echoed_message_comes_before_the_answer_also_where_there_is_none(tokenizers):
    prefilled = [*USER, {"role": "assistant", "content": "So"}]
    asked = {"messages": prefilled, "echo": True, "add_generation_prompt": False, "continue_final_message": True}
    assert split(tokenizers["think"], "fox</think>hello", **asked) == ("fox", "Sohello")
    assert split(tokenizers["think"], "fox", **asked) == ("fox", "So")


def test_a_model_that_is_not_known_to_think_answers_as_before(tokenizers, tmp_path):
    assert ReasoningParser(tokenizers["none"]).style is None
    (choice,) = message(tokenizers["none"], "<think>fox</think>hello")["choices"]
    assert choice["message"] == {"role": "assistant", "content": "<think>fox</think>hello", "refusal": None}
    build_tokenizer(tmp_path)
    assert ReasoningParser(Tokenizer.load(tmp_path)).style is None
    assert ReasoningParser(Tokenizer(None, "nowhere")).style is None


def test_completions_of_prompts_are_not_divided(tokenizers):
    tokenizer = tokenizers["think"]
    request = parse_line(b'{"prompt": "hello"}', 1)
    ids = encode(tokenizer, "<think>fox</think>hello")
    output = CompletionOutput(index=0, text=None, token_ids=ids, finish_reason="length", logprobs=None)
    result = RequestOutput(request_id="0/0", prompt=None, prompt_token_ids=(1,), outputs=[output], finished=True)
    encoder = ResponseEncoder(tokenizer, fingerprint="f", model_name="m", created_s=1)
    (choice,) = json.loads(encoder.success(request, [result]))["response"]["body"]["choices"]
    assert choice["text"] == "<think>fox</think>hello"
