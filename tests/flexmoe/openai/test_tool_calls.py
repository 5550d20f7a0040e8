"""Tools in requests, and calls of them in answers, for every family that has a format."""

import json

import pytest

from flexmoe.openai.batch_line import parse_line
from flexmoe.openai.json_line import InvalidLine
from flexmoe.openai.response import ResponseEncoder
from flexmoe.openai.tool_calls import ToolParser
from flexmoe.outputs import CompletionOutput, RequestOutput
from flexmoe.text.tokenizer import Tokenizer
from tests.support.tokenizers import HARMONY_TOKENS, THINK_TOKENS, build_reasoning_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "code": {"type": "string"}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
USER = [{"role": "user", "content": "hello"}]
ASKED = {"city": "Lima", "days": 3}
BODY = '{"name": "weather", "arguments": {"city": "Lima", "days": 3}}'
LLAMA = BODY.replace("arguments", "parameters")
SEEN = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools | tojson }}"
TAG = (("<tool_call>", False), ("</tool_call>", False))
#: Tokens of a family, what its template mentions, what it writes, and the content before the calls.
FAMILIES = {
    "hermes": (TAG, "<tool_call>", f"Yes.\n<tool_call>\n{BODY}\n</tool_call>", "Yes."),
    "hermes-text": ((), "<tool_call>", f"<tool_call>{BODY}</tool_call>", None),
    "qwen3-coder": (
        TAG,
        "<tool_call>",
        "<tool_call>\n<function=weather>\n<parameter=city>\nLima\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
        "</function>\n</tool_call>",
        None,
    ),
    "glm": (
        TAG,
        "<tool_call>",
        "On it <tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Lima</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>3</arg_value>\n</tool_call>",
        "On it",
    ),
    "hunyuan": ((), "<tool_call>", '<tool_call>weather\n```json\n{"city": "Lima", "days": 3}\n```</tool_call>', None),
    "minimax": (
        (("<minimax:tool_call>", False),),
        "<minimax:tool_call>",
        '<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Lima</parameter>\n'
        '<parameter name="days">3</parameter>\n</invoke>\n</minimax:tool_call>',
        None,
    ),
    "mistral": ((("[TOOL_CALLS]", True),), "[TOOL_CALLS]", f"Well[TOOL_CALLS] [{BODY}]", "Well"),
    "mistral-named": (
        (("[TOOL_CALLS]", True), ("[ARGS]", True)),
        "[TOOL_CALLS]",
        '[TOOL_CALLS]weather[ARGS]{"city": "Lima", "days": 3}',
        None,
    ),
    "granite": ((("<|tool_call|>", True),), "<|tool_call|>", f"<|tool_call|>[{BODY}]", None),
    "llama": ((("<|python_tag|>", True),), "ipython", f"<|python_tag|>{LLAMA}", None),
    "llama-bare": ((), "ipython", LLAMA, None),
    "harmony": (
        HARMONY_TOKENS,
        "to=functions.",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
        '<|constrain|>json<|message|>{"city": "Lima", "days": 3}<|call|>',
        None,
    ),
    "harmony-role": (
        HARMONY_TOKENS,
        "to=functions.",
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Lima", "days": 3}<|call|>',
        None,
    ),
}


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    made = {}

    def call(tokens, mention):
        if (tokens, mention) not in made:
            directory = tmp_path_factory.mktemp("tokenizer")
            build_reasoning_tokenizer(directory, tokens, SEEN + "{# " + mention + " #}")
            made[tokens, mention] = Tokenizer.load(directory)
        return made[tokens, mention]

    return call


def choice(tokenizer, completion, reason="stop", **fields):
    row = {"messages": USER, "tools": TOOLS} | fields
    request = parse_line(json.dumps(row).encode(), 1)
    assert request.error is None
    (ids,) = tokenizer.encode_all([completion], add_special_tokens=False)
    output = CompletionOutput(index=0, text=tokenizer.decode(ids), token_ids=(*ids, 2), finish_reason=reason)
    result = RequestOutput(request_id="0/0", prompt=None, prompt_token_ids=(5,), outputs=[output], finished=True)
    encoder = ResponseEncoder(tokenizer, fingerprint="f", model_name="m", created_s=0)
    line = encoder.success(request.without_prompt(), [result])
    assert line == encoder.success(request.without_prompt(), [result])
    return json.loads(line)["response"]["body"]["choices"][0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_is_taken_apart_from_the_answer(load, family):
    tokens, mention, completion, content = FAMILIES[family]
    found = choice(load(tokens, mention), completion)
    [call] = found["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"]["name"] == "weather" and json.loads(call["function"]["arguments"]) == ASKED
    assert found["message"]["content"] == content and found["finish_reason"] == "tool_calls"
    if family == "harmony":
        assert found["message"]["reasoning_content"] == "hm"


def test_answers_are_what_the_official_client_expects(load):
    types = pytest.importorskip("openai.types.chat")
    tokens, mention, completion, _ = FAMILIES["hermes"]
    types.chat_completion.Choice.model_validate(choice(load(tokens, mention), completion))


def test_several_calls_have_ids_of_their_own(load):
    tokens, mention, completion, _ = FAMILIES["hermes"]
    found = choice(load(tokens, mention), completion + '\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    assert [call["function"]["name"] for call in found["message"]["tool_calls"]] == ["weather", "now"]
    assert len({call["id"] for call in found["message"]["tool_calls"]}) == 2


def test_arguments_in_tags_are_texts_where_the_schema_says_so(load):
    tokens, mention, *_ = FAMILIES["glm"]
    text = "<tool_call>weather\n<arg_key>code</arg_key><arg_value>007</arg_value><arg_key>days</arg_key><arg_value>[1]</arg_value></tool_call>"
    [call] = choice(load(tokens, mention), text)["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"code": "007", "days": [1]}


@pytest.mark.parametrize(
    "completion", ["<tool_call>\n{broken\n</tool_call>", "<tool_call>[1]</tool_call>", "no call at all", "<tool_call>"]
)
def test_what_is_no_call_stays_content(load, completion):
    found = choice(load(TAG, "<tool_call>"), completion)
    assert found["message"]["content"] == completion and "tool_calls" not in found["message"]
    assert found["finish_reason"] == "stop"


def test_a_call_that_is_cut_by_the_limit_keeps_its_finish_reason(load):
    tokens, mention, completion, _ = FAMILIES["hermes"]
    assert choice(load(tokens, mention), completion, reason="length")["finish_reason"] == "length"


@pytest.mark.parametrize("fields", [{"tools": []}, {"tool_choice": "none"}], ids=str)
def test_without_tools_nothing_is_looked_for(load, fields):
    tokens, mention, completion, _ = FAMILIES["hermes"]
    found = choice(load(tokens, mention), completion, **fields)
    assert found["message"]["content"] == completion and found["finish_reason"] == "stop"


def test_calls_after_thinking_are_found_and_those_in_it_are_not(load):
    tokenizer = load((*THINK_TOKENS, *TAG), "<tool_call>")
    found = choice(tokenizer, f"<think>\n<tool_call>{BODY}</tool_call>?</think>\n<tool_call>{BODY}</tool_call>")
    assert len(found["message"]["tool_calls"]) == 1 and "?" in found["message"]["reasoning_content"]


@pytest.mark.parametrize("family", ["hermes", "mistral", "llama-bare"])
def test_what_may_become_a_call_is_held_back_while_an_answer_is_streamed(load, family):
    tokens, mention, completion, content = FAMILIES[family]
    tokenizer = load(tokens, mention)
    parser, (ids,) = ToolParser(tokenizer), tokenizer.encode_all([completion], add_special_tokens=False)
    for end in range(len(ids) + 1):
        shown = parser.before(ids[:end], tokenizer.decode(ids[:end]))
        assert (content or "").startswith(shown)
    assert shown == (content or "")


def test_tools_reach_the_template_unless_none_shall_be_called(load):
    from flexmoe.preflight.prepare import Limits, Preparer

    tokenizer = load(TAG, "<tool_call>")
    preparer = Preparer(tokenizer=tokenizer, limits=Limits(vocab_size=400, context=2000), default_max_tokens=5)

    def prompt(**fields):
        [made] = preparer.prepare(parse_line(json.dumps({"messages": USER} | fields).encode(), 1), 0)
        return tokenizer.decode_prompt(made.prompt_token_ids)

    assert json.dumps(TOOLS) in prompt(tools=TOOLS) and json.dumps(TOOLS) in prompt(tools=TOOLS, tool_choice="auto")
    assert prompt(tools=TOOLS, tool_choice="none") == prompt() == "hellonull"


def test_a_template_that_describes_no_tools_refuses_them(tmp_path):
    from flexmoe.preflight.prepare import Limits, Preparer

    build_reasoning_tokenizer(tmp_path, (), "{{ messages[0].content }}")
    preparer = Preparer(
        tokenizer=Tokenizer.load(tmp_path), limits=Limits(vocab_size=400, context=2000), default_max_tokens=5
    )
    error = preparer.prepare(parse_line(json.dumps({"messages": USER, "tools": TOOLS}).encode(), 1), 0)
    assert (error.code, error.param) == ("unsupported_field", "tools") and "describes no tools" in error.message


@pytest.mark.parametrize(
    "fields, param, said",
    [
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice", "give none or auto"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "now"}}}, "tool_choice", "auto"),
        ({"tools": {}}, "tools", "give a list of functions"),
        ({"tools": [{"type": "web_search"}]}, "tools", "tools[0] is"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": 1}}]}, "tools", "JSON Schema"),
    ],
    ids=str,
)
def test_what_is_no_tool_or_no_choice_is_refused(fields, param, said):
    error = parse_line(json.dumps({"messages": USER} | fields).encode(), 1).error
    assert error.param == param and said in error.message


def test_earlier_calls_and_their_results_reach_the_template_with_arguments_as_objects():
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": null}'}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    request = parse_line(json.dumps({"messages": messages}).encode(), 1)
    assert request.error is None
    _, called, result = request.messages
    assert called["content"] == "" and called["tool_calls"][0]["function"]["arguments"] == {"city": None}
    assert result == {"role": "tool", "content": "sunny", "tool_call_id": "1"}


@pytest.mark.parametrize("calls", [5, [5], [{"function": {"name": "x", "arguments": "["}}]], ids=str)
def test_earlier_calls_that_are_none_are_structural_faults(calls):
    messages = [{"role": "assistant", "content": "", "tool_calls": calls}]
    with pytest.raises(InvalidLine, match=r"messages\[0\]\.tool_calls"):
        parse_line(json.dumps({"messages": messages}).encode(), 1)
