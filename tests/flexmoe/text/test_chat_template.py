"""Chat templates: the texts of transformers, and an end to every rendering."""

import time

import pytest

from flexmoe.errors import DataError, UsageError
from flexmoe.text.chat_template import MAX_CHARACTERS, ChatTemplate, read_template

CHAT = [
    {"role": "system", "content": 'be <brief> & "kind"'},
    {"role": "user", "content": "  hello\nworld {{ 7 * 7 }} "},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "größe 日本"},
]
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>"}
MIXTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}"
    "{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}\n\n"
    "{{- bos_token }}\n{%- for message in loop_messages %}\n"
    "    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n"
    "        {{- raise_exception('After the optional system message, roles must alternate') }}\n    {%- endif %}\n"
    "    {%- if message['role'] == 'user' %}\n        {%- if loop.last and system_message is defined %}\n"
    "            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}\n        {%- else %}\n"
    "            {{- ' [INST] ' + message['content'] + ' [/INST]' }}\n        {%- endif %}\n"
    "    {%- else %}\n        {{- ' ' + message['content'] + eos_token}}\n    {%- endif %}\n{%- endfor %}\n"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\\n' ~ message.content | trim ~ '<|im_end|>' }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
)
FEATURES = """
{%- macro show(m, level=1) -%}
{{ '#' * level }} {{ m.role | upper }}: {{ m | tojson }}
{% endmacro %}
{%- set ns = namespace(count=0, last='') %}
{%- for m in messages if m.role != 'system' %}
    {%- if loop.index > 2 %}{% break %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {%- set ns.last = m.content.strip().split('\\n')[-1] %}
    {{ show(m, level=loop.index) }}
{%- else %}nobody{%- endfor %}
{{ ns.count }} {{ ns.last }} {{ dict(a=1)['a'] }} {{ [1] + [2] }} {{ 2 ** 3 }} {{ range(3) | list }} {{ 3 * 2 }}
{% call(x) show2() %}{{ x }}{% endcall %}
{% macro show2() %}{{ caller('called') }}{% endmacro %}
{% generation %}answer{% endgeneration %}
{{ tools is none }} {{ messages[0].content | e }} {{ bos_token ~ 1 ~ none }} {{ undefined_one }}
"""


def rendered(source, chat=CHAT, timeout_s=0.3, **more):
    return ChatTemplate(source, VARIABLES, timeout_s=timeout_s).render(chat, more)


@pytest.mark.parametrize(
    "source", [MIXTRAL, CHATML, FEATURES.replace("{% call(x) show2() %}{{ x }}{% endcall %}\n", "")]
)
@pytest.mark.parametrize("more", [{}, {"enable_thinking": False, "bos_token": "<other>"}])
def test_text_is_that_of_transformers(source, more):
    from transformers.utils.chat_template_utils import render_jinja_template

    theirs, _ = render_jinja_template([CHAT], chat_template=source, add_generation_prompt=True, **VARIABLES | more)
    assert rendered(source, **more) == theirs[0]


def test_content_of_a_message_is_never_a_template():
    assert "{{ 7 * 7 }}" in rendered(CHATML)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (MIXTRAL, "roles must alternate"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ nothing.at_all }}", "undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "__class__"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ namespace(__x=1) }}", "__x"),
        ("{% include 'other' %}", "loader"),
        ("{{ lipsum(9) }}", "lipsum"),
        ("{{ range(10 ** 9) }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('first\nsecond') }}", "first"),
    ],
)
def test_template_that_refuses_says_why_in_a_sentence(source, words):
    with pytest.raises(DataError, match="the chat template does not accept these messages") as caught:
        rendered(source, [{"role": "assistant", "content": "x"}])
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% continue %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% set x %}{% for b in range(99999) %}.{% endfor %}{% endset %}{% endfor %}",
    ],
)
def test_template_that_loops_is_stopped_when_its_cpu_time_is_used(source):
    with pytest.raises(DataError, match="does not come to an end: it has used 0.3 s of CPU time"):
        rendered(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ 10 ** 10 * 'x' }}",
        "{{ 10 ** (10 ** 10) }}",
        "{{ [0] * 10 ** 10 }}",
        "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    ],
)
def test_template_that_writes_without_end_is_stopped(source):
    with pytest.raises(DataError, match=f"more than {MAX_CHARACTERS} characters"):
        rendered(source, timeout_s=60)


def test_template_serves_the_next_chat_after_one_that_it_did_not_end():
    loops = "{% for a in range(messages[0].content | int) %}{% for b in range(999) %}{% endfor %}{% endfor %}done"
    template = ChatTemplate(loops, {}, timeout_s=0.2)
    with pytest.raises(DataError, match="CPU time"):
        template.render([{"role": "user", "content": "99999"}])
    assert template.render([{"role": "user", "content": "1"}]) == "done"


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% nonsense %}", "{{ 'x' | nofilter }}", "{{ " + "(" * 5000])
def test_source_that_is_no_template_is_bad_data(source):
    with pytest.raises(DataError, match="the chat template cannot be read"):
        ChatTemplate(source, {})


def test_template_sees_the_time_of_the_job_in_utc(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        told = ChatTemplate("{{ strftime_now('%d %b %Y %H:%M') }}", {}, created_s=86_399).render(CHAT)
        assert told == "01 Jan 1970 23:59"
        assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render(CHAT) >= "2024"
    finally:
        monkeypatch.undo()
        time.tzset()


def test_option_names_a_file_or_is_a_template(tmp_path):
    (tmp_path / "t.jinja").write_text("{{ 1 }}ä", encoding="utf-8")
    assert read_template(str(tmp_path / "t.jinja")) == "{{ 1 }}ä"
    assert read_template("{{ messages }}") == "{{ messages }}"
    (tmp_path / "t.jinja").write_text("{{ 1 }}ä", encoding="utf-8-sig")
    assert read_template(str(tmp_path / "t.jinja")) == "{{ 1 }}ä"
    with pytest.raises(UsageError, match="neither a file nor a template"):
        read_template(str(tmp_path / "none.jinja"))
    for content in (b"\xff{{", "{{ 1 }}".encode("utf-16"), "{{ 1 }}".encode("utf-16-le")):
        (tmp_path / "t.jinja").write_bytes(content)
        with pytest.raises(UsageError, match="cannot be read as text"):
            read_template(str(tmp_path / "t.jinja"))


@pytest.mark.parametrize("source", [CHATML, CHATML.replace(" | trim", ""), "{{ messages[-1].content | upper }}"])
@pytest.mark.parametrize("content", ["Once upon", "Once upon a  \n", "  Once", "", " "])
def test_message_that_goes_on_is_left_open_as_transformers_leaves_it(source, content):
    from transformers.utils.chat_template_utils import render_jinja_template

    chat = [*CHAT, {"role": "assistant", "content": content}]
    how = {"add_generation_prompt": False, "continue_final_message": True}
    try:
        theirs, _ = render_jinja_template([chat], chat_template=source, **how, **VARIABLES)
    except ValueError:
        with pytest.raises(DataError, match="cannot be continued"):
            ChatTemplate(source, VARIABLES).render(chat, **how)
    else:
        assert ChatTemplate(source, VARIABLES).render(chat, **how) == theirs[0]
    assert chat[-1]["content"] == content


def test_template_sees_the_name_of_a_message():
    template = ChatTemplate("{% for m in messages %}{{ m.name or m.role }}: {{ m.content }};{% endfor %}", {})
    chat = [{"role": "user", "content": "a", "name": "Bob"}, {"role": "user", "content": "b"}]
    assert template.render(chat) == "Bob: a;user: b;"
