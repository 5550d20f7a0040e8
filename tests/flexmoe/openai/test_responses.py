"""Output lines, as the real `openai` package's types understand them."""

import json
import math

import pytest

from flexmoe.errors import UsageError
from flexmoe.openai.batch_line import parse_line
from flexmoe.openai.fields import RowError
from flexmoe.openai.response import ResponseEncoder, count_tokens, creation_time_s
from flexmoe.outputs import CompletionOutput, RequestOutput, TokenLogprob
from flexmoe.text.tokenizer import Tokenizer
from tests.support.tokenizers import build_sentencepiece, build_tokenizer

types = pytest.importorskip("openai.types", reason="the types of the official client, which answers are checked with")

EOS = 2
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(directory)
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sentencepiece")
    build_sentencepiece(directory)
    return Tokenizer.load(directory)


@pytest.fixture
def encoder(tokenizer):
    def make(**changes):
        values = {"fingerprint": "f", "model_name": "the-model", "created_s": 1_700_000_000}
        return ResponseEncoder(changes.pop("tokenizer", tokenizer), **values | changes)

    return make


def request(**row):
    return parse_line(json.dumps(row).encode(), 1)


def output(ids, *, index=0, reason="length", tops=None, **more):
    """A completion; with `tops`, each token has logprob -0.5 and so many most probable ones."""
    logprobs = None
    if tops is not None:
        logprobs = tuple(
            TokenLogprob(token_id=i, logprob=-0.5, top=tuple((70 + k, -0.1 - k) for k in range(tops))) for i in ids
        )
    return CompletionOutput(
        index=index, text=None, token_ids=tuple(ids), finish_reason=reason, logprobs=logprobs, **more
    )


def result(prompt, *outputs, prompt_logprobs=None):
    return RequestOutput(
        request_id="0/0",
        prompt=None,
        prompt_token_ids=tuple(prompt),
        outputs=list(outputs),
        finished=True,
        prompt_logprobs=prompt_logprobs,
    )


def body(line):
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    row = json.loads(line)
    assert set(row) == {"id", "custom_id", "response", "error"} and row["error"] is None
    assert row["response"]["status_code"] == 200
    return row["response"]["body"]


def strict(type, value):
    """The body as the type, with nothing coerced and nothing of it lost."""
    parsed = type.model_validate(value, strict=True)
    assert parsed.to_dict(exclude_unset=True) == value
    return parsed


def test_chat_is_a_chat_completion(encoder, tokenizer):
    ids = tokenizer.encode("hello world")[1:]
    line = encoder().success(
        request(messages=MESSAGES, custom_id="x"), [result([1, 5], output([*ids, EOS], reason="stop"))]
    )
    chat = strict(types.chat.ChatCompletion, body(line))
    assert (chat.object, chat.model, chat.created) == ("chat.completion", "the-model", 1_700_000_000)
    assert chat.id.startswith("chatcmpl-") and json.loads(line)["custom_id"] == "x"
    [choice] = chat.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "hello world")
    assert (choice.finish_reason, choice.logprobs) == ("stop", None)
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens, chat.usage.total_tokens) == (
        2,
        len(ids) + 1,
        len(ids) + 3,
    )


def test_chat_with_echo_begins_with_the_message_that_it_continues(encoder, tokenizer):
    chat = [*MESSAGES, {"role": "assistant", "content": "Once "}]
    how = {"echo": True, "add_generation_prompt": False, "continue_final_message": True}
    row = request(messages=chat, **how).without_prompt()
    line = encoder().success(row, [result([1, 5], output(tokenizer.encode("hello")[1:]))])
    assert strict(types.chat.ChatCompletion, body(line)).choices[0].message.content == "Once hello"


def test_completion_is_a_text_completion(encoder, tokenizer):
    ids = tokenizer.encode("hello")[1:]
    completion = strict(
        types.Completion, body(encoder().success(request(prompt="p", model="m"), [result([1], output(ids))]))
    )
    assert (completion.object, completion.model) == ("text_completion", "m") and completion.id.startswith("cmpl-")
    [choice] = completion.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == ("hello", "length", None)


def test_choices_are_numbered_by_prompt_then_sample(encoder, tokenizer):
    a, b, c, d = (tokenizer.encode(letter)[1:] for letter in "abcd")
    results = [
        result([1, 5, 6], output(a), output(b, index=1)),
        result([1, 7], output(c), output(d, index=1)),
    ]
    completion = strict(types.Completion, body(encoder().success(request(prompt=["x", "y"], n=2), results)))
    assert [(choice.index, choice.text) for choice in completion.choices] == list(enumerate("abcd"))
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (5, 4)
    assert count_tokens(results) == (5, 4)


def test_logprobs_of_a_chat(encoder, tokenizer):
    ids = [*tokenizer.encode("日")[1:], EOS]
    row = request(messages=MESSAGES, logprobs=True, top_logprobs=2)
    chat = strict(
        types.chat.ChatCompletion, body(encoder().success(row, [result([1], output(ids, reason="stop", tops=2))]))
    )
    [choice] = chat.choices
    content = choice.logprobs.content
    assert choice.message.content == "日" and b"".join(bytes(t.bytes) for t in content[:-1]).decode() == "日"
    assert content[-1].token == "</s>" and content[0].logprob == -0.5
    assert all(len(t.top_logprobs) == 2 and t.top_logprobs[0].logprob == -0.1 for t in content)
    plain = body(encoder().success(row, [result([1], output(ids, reason="stop", tops=0))]))
    assert strict(types.chat.ChatCompletion, plain).choices[0].logprobs.content[0].top_logprobs == []


def test_logprobs_of_a_completion(encoder, tokenizer):
    ids = [*tokenizer.encode("hä 日!")[1:], EOS]
    line = encoder().success(request(prompt="p", logprobs=2), [result([1], output(ids, reason="stop", tops=2))])
    [choice] = strict(types.Completion, body(line)).choices
    told = choice.logprobs
    assert choice.text == "hä 日!" and len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(
        ids
    )
    assert told.tokens[0] == "h" and "bytes:\\xe6" in told.tokens and told.tokens[-1] == "</s>"
    assert told.text_offset == [0, 1, 1, 2, 3, 3, 3, 4, 5]
    assert [choice.text[at] for token, at in zip(told.tokens, told.text_offset) if len(token) == 1] == ["h", " ", "!"]
    for token, top in zip(told.tokens, told.top_logprobs):
        assert top[token] == -0.5 and len(top) == 3


def test_special_tokens_that_are_kept_have_their_place_in_the_text(encoder, tokenizer):
    ids = [*tokenizer.encode("hi")[1:], EOS, *tokenizer.encode("yo")[1:]]
    made = CompletionOutput(
        index=0,
        text="hi</s>yo",
        token_ids=tuple(ids),
        finish_reason="length",
        logprobs=tuple(TokenLogprob(token_id=i, logprob=-1.0) for i in ids),
    )
    row = request(prompt="p", logprobs=0, skip_special_tokens=False)
    [choice] = body(encoder().success(row, [result([1], made)]))["choices"]
    told = choice["logprobs"]
    assert all(choice["text"].startswith(token, at) for token, at in zip(told["tokens"], told["text_offset"]))


def test_a_token_after_a_broken_character_begins_behind_it(encoder, tokenizer):
    by_bytes = {told.bytes: i for i in range(3, 300) if (told := tokenizer.token_text(i)).visible}
    ids = [by_bytes[piece] for piece in (b"h", b"\xe6", b"i", b"\xe6", b"\x97", b"!", b"\xe6")]
    made = body(encoder().success(request(prompt="p", logprobs=1), [result([1], output(ids, tops=1))]))
    [choice] = made["choices"]
    told = choice["logprobs"]
    assert choice["text"] == "h\ufffdi\ufffd!\ufffd" and told["text_offset"] == [0, 1, 2, 3, 3, 4, 5]


def test_impossible_token_has_a_number_that_json_can_say(encoder, tokenizer):
    [token] = tokenizer.encode("a")[1:]
    entry = TokenLogprob(token_id=token, logprob=-math.inf, top=((token, -math.inf), (69, -1e9)))
    made = CompletionOutput(index=0, text=None, token_ids=(token,), finish_reason="length", logprobs=(entry,))
    told = body(encoder().success(request(prompt="p", logprobs=2), [result([1], made)]))["choices"][0]["logprobs"]
    assert told["token_logprobs"] == [-9999.0] and set(told["top_logprobs"][0].values()) == {-9999.0}
    chat = body(encoder().success(request(messages=MESSAGES, logprobs=True), [result([1], made)]))
    assert strict(types.chat.ChatCompletion, chat).choices[0].logprobs.content[0].logprob == -9999.0


def test_tokens_of_equal_text_count_as_the_best_of_them(encoder, sentencepiece):
    letter, byte = (i for i in range(3, 300) if sentencepiece.token_text(i).text == "h")
    entry = TokenLogprob(token_id=letter, logprob=-2.0, top=((byte, -1.0), (letter, -2.0)))
    made = CompletionOutput(index=0, text=None, token_ids=(letter,), finish_reason="length", logprobs=(entry,))
    line = encoder(tokenizer=sentencepiece).success(request(prompt="p", logprobs=2), [result([1], made)])
    assert body(line)["choices"][0]["logprobs"]["top_logprobs"] == [{"h": -1.0}]


def scored(ids, tops=1):
    return tuple(TokenLogprob(token_id=i, logprob=-0.25, top=((i, -0.25),) * tops) for i in ids[1:])


@pytest.mark.parametrize("name", ["tokenizer", "sentencepiece"])
def test_echo_puts_the_prompt_before_the_completion(encoder, name, request):
    tokenizer = request.getfixturevalue(name)
    prompt, ids = tokenizer.encode("hello wor"), tokenizer.encode("old")[1:]
    row = globals()["request"](prompt="hello wor", echo=True, logprobs=1)
    made = body(
        encoder(tokenizer=tokenizer).success(row, [result(prompt, output(ids, tops=1), prompt_logprobs=scored(prompt))])
    )
    [choice] = made["choices"]
    told = choice["logprobs"]
    assert choice["text"] == "hello wor" + tokenizer.decode(ids)
    assert told["token_logprobs"] == [None, *[-0.25] * (len(prompt) - 1), *[-0.5] * len(ids)]
    assert told["top_logprobs"][0] is None and told["tokens"][0] == "<s>"
    assert told["text_offset"][:2] == [0, 0] and told["text_offset"][len(prompt)] == len("hello wor")
    places = list(zip(told["tokens"], told["text_offset"], strict=True))[2:]
    assert places and all(choice["text"].startswith(token, at) for token, at in places)
    # The client's own parsing takes the null of the first token, as OpenAI sends it; the declared type does not.
    parsed = types.Completion.construct(**made)
    assert parsed.choices[0].logprobs.token_logprobs[0] is None
    with pytest.raises(ValueError, match="token_logprobs.0"):
        types.Completion.model_validate(made)
    told["token_logprobs"][0], told["top_logprobs"][0] = 0.0, {}
    strict(types.Completion, made)


def test_scoring_returns_the_prompt_and_its_logprobs(encoder, tokenizer):
    prompt = tokenizer.encode("hello")
    row = request(prompt=list(prompt), echo=True, logprobs=0, max_tokens=0).without_prompt()
    made = result(prompt, output((), tops=0), prompt_logprobs=scored(prompt, tops=0))
    [choice] = body(encoder().success(row, [made]))["choices"]
    assert choice["text"] == "hello" and len(choice["logprobs"]["tokens"]) == len(prompt)
    assert choice["logprobs"]["top_logprobs"][1] == {choice["logprobs"]["tokens"][1]: -0.25}


def test_echo_of_text_is_the_text_that_was_given(encoder, tokenizer):
    text = "a</s>b  日\0"
    row = request(prompt=text, echo=True).without_prompt()
    [choice] = body(encoder().success(row, [result(tokenizer.encode(text), output(tokenizer.encode("!")[1:]))]))[
        "choices"
    ]
    assert choice["text"] == text + "!"


def test_text_ends_before_what_stopped_it(encoder, tokenizer):
    ids = tokenizer.encode("hello. more")[1:]
    by_string = CompletionOutput(
        index=0,
        text="hello",
        token_ids=ids,
        finish_reason="stop",
        stop_reason=".",
        logprobs=tuple(TokenLogprob(token_id=i, logprob=-1.0) for i in ids),
    )
    line = encoder().success(request(prompt="p", stop=".", logprobs=0), [result([1], by_string)])
    [choice] = strict(types.Completion, body(line)).choices
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("hello", "stop", ".")
    assert max(choice.logprobs.text_offset) == len("hello")
    by_id = output([*tokenizer.encode("ab")[1:]], reason="stop", stop_reason=5)
    [choice] = body(encoder().success(request(prompt="p"), [result([1], by_id)]))["choices"]
    assert (choice["text"], choice["stop_reason"]) == ("a", 5)


def test_completion_after_words_keeps_its_space(encoder, sentencepiece):
    ids = sentencepiece.encode("world")[1:]
    [choice] = body(encoder(tokenizer=sentencepiece).success(request(prompt="p"), [result([1], output(ids))]))[
        "choices"
    ]
    assert choice["text"] == " world"


def test_token_ids_are_returned_where_they_are_asked_for_and_where_there_is_no_text(encoder, tokenizer, tmp_path):
    made = result([1, 9], output([70, EOS], reason="stop"))
    assert "token_ids" not in body(encoder().success(request(prompt="p"), [made]))["choices"][0]
    [choice] = body(encoder().success(request(prompt="p", return_token_ids=True), [made]))["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([1, 9], [70, EOS])
    bare = encoder(tokenizer=Tokenizer.load(tmp_path))
    row = request(prompt=[1, 9], logprobs=1)
    made = result([1, 9], output([70, EOS], reason="stop", tops=1))
    [choice] = strict(types.Completion, body(bare.success(row, [made]))).choices
    assert (choice.text, choice.token_ids, choice.logprobs.tokens) == ("", [70, EOS], ["token_id:70", "token_id:2"])


def test_ids_follow_job_and_row(encoder):
    made = [result([1], output([70]))]
    one = encoder().success(request(prompt="p", custom_id="a"), made)
    assert one == encoder().success(request(prompt="p", custom_id="a"), made)
    others = [
        encoder().success(request(prompt="p", custom_id="b"), made),
        encoder(fingerprint="g").success(request(prompt="p", custom_id="a"), made),
    ]
    assert len({json.loads(line)["id"] for line in (one, *others)}) == 3


def test_refused_row_is_the_error_that_a_server_would_have_sent(encoder):
    error = RowError(code="invalid_value", message="n is 0", param="n")
    row = json.loads(encoder().failure(request(prompt="p", custom_id="ä"), error, status=400))
    assert (row["custom_id"], row["error"], row["response"]["status_code"]) == ("ä", None, 400)
    told = types.ErrorObject.model_validate(row["response"]["body"]["error"], strict=True)
    assert (told.code, told.message, told.param, told.type) == ("invalid_value", "n is 0", "n", "invalid_request_error")


def test_row_that_got_no_response_says_why(encoder):
    row = json.loads(encoder().failure(request(prompt="p"), RowError(code="engine_error", message="lost"), status=None))
    assert row["response"] is None and row["error"] == {"code": "engine_error", "message": "lost"}
    assert types.BatchError.model_validate(row["error"], strict=True).code == "engine_error"


def test_text_that_is_not_ascii_is_written_readably(encoder, tokenizer):
    line = encoder().success(
        request(prompt="p", custom_id="größe"), [result([1], output(tokenizer.encode("日本")[1:]))]
    )
    assert "日本" in line.decode() and "größe" in line.decode()


def test_bad_source_date_epoch_is_a_usage_error(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert creation_time_s() == 1_700_000_000
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UsageError, match="SOURCE_DATE_EPOCH"):
        creation_time_s()
