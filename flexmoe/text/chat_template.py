"""Renders a chat by the checkpoint's own template, which is a program: it may refuse, loop or write without end.

The environment is that of transformers (a test holds that texts are equal), with three differences. Loops and macros are
counted, so that a rendering ends when it has used its seconds of CPU time; texts that outgrow a bound end it too. And
`strftime_now` is the time at which the job was created, in UTC: a job that is resumed on another day must see the same
prompts.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from flexmoe.errors import DataError, UsageError
from policies.common.option_names import option
from policies.common.reading import without_bom

DEFAULT_TIMEOUT_S = 5.0
#: How the sentence about a rendering that was ended begins.
ENDLESS = "the chat template does not come to an end"
#: Characters of a rendered chat, and of any text or list that an operator of the template makes.
MAX_CHARACTERS = 64 * 2**20
_TICKS_PER_CLOCK = 64
#: Transformers' mark for the end of a message that is continued.
_OPEN_END = "CONTINUE_FINAL_MESSAGE_TAG "


class TemplateLimitError(Exception):
    """A rendering took too long or grew too large."""


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja, as transformers understands it.
        variables: what every rendering sees, such as `bos_token`.
        created_s: the time that the template may ask for, in seconds since 1970; None means the time of rendering.
        timeout_s: CPU seconds that a rendering may take.

    Attributes:
        source: as given.

    Raises:
        DataError: the source is no template.
    """

    def __init__(
        self,
        source: str,
        variables: Mapping[str, Any],
        *,
        created_s: int | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        self.source = source
        self._variables, self._budget = dict(variables), _Budget(timeout_s)
        environment = _Environment(self._budget, created_s)
        try:
            tree = _Counted(environment).visit(environment.parse(without_bom(source)))
            code = environment.compile(tree)
            self._template = jinja2.Template.from_code(environment, code, environment.make_globals(None))
        except (jinja2.TemplateError, RecursionError) as error:
            raise DataError(f"the chat template cannot be read: {first_line(error)}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        more: Mapping[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The text of a chat, up to where the assistant's answer begins or goes on.

        Args:
            messages: roles and contents.
            more: variables of this rendering, before those of every rendering.
            add_generation_prompt: what the template's variable of that name says: end with what begins the answer.
            continue_final_message: end with the content of the last message instead, as transformers does.

        Raises:
            DataError: the template refuses the messages, or exceeds its time or size; a sentence in each case.
        """
        chat = [dict(message) for message in messages]
        if continue_final_message:
            chat[-1]["content"] += _OPEN_END
        variables = self._variables | {"tools": None, "documents": None} | dict(more or {})
        variables |= {"messages": chat, "add_generation_prompt": add_generation_prompt}
        text = self._rendered(variables)
        return _up_to_open_end(text, messages[-1]["content"]) if continue_final_message else text

    def _rendered(self, variables: Mapping[str, Any]) -> str:
        pieces, characters = [], 0
        self._budget.begin()
        try:
            for piece in self._template.generate(variables):
                characters += len(piece)
                if characters > MAX_CHARACTERS:
                    raise _too_large()
                pieces.append(piece)
        except TemplateLimitError as error:
            raise DataError(f"{ENDLESS}: {error}") from None
        # Templates are programs of the checkpoint: they fail with jinja2's errors or with any of Python's.
        except Exception as error:
            raise DataError(f"the chat template does not accept these messages: {first_line(error)}") from error
        finally:
            self._budget.end()
        return "".join(pieces)


def read_template(argument: str) -> str:
    """What the option `chat_template` names: the text of a file, or itself where it is a template.

    Raises:
        UsageError: it is neither, or the file is not text.
    """
    path = Path(argument)
    try:
        if "\n" not in argument and len(argument) < 4096 and path.is_file():
            return _checked(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{option('chat_template')}: {argument} cannot be read as text: {first_line(error)}") from None
    if "{" not in argument:
        raise UsageError(f"{option('chat_template')}: {argument!r} is neither a file nor a template; check the path")
    return argument


def _checked(text: str) -> str:
    """The text of a file, unless it is UTF-16 or no text at all, which UTF-8 may read without complaint."""
    if "\0" in text:
        raise ValueError("it holds NUL; save it as UTF-8")
    return without_bom(text)


def _up_to_open_end(text: str, content: str) -> str:
    """A chat up to the end of its last message, where the mark stands.

    Raises:
        DataError: the template wrote that message otherwise, or not at all.
    """
    end = text.rfind(_OPEN_END.strip())
    if end < 0 or content.strip() not in text:
        raise DataError("the chat template does not write the final message as it is, so it cannot be continued")
    # A template that trims contents trims the mark too: then the spaces before it would have been trimmed.
    return text[:end] if text[end:].startswith(_OPEN_END) else text[:end].rstrip()


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class _Budget(threading.local):
    """CPU seconds of this thread that the current rendering may still use."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._ticks, self._until_s = 0, float("inf")

    def begin(self) -> None:
        self._ticks, self._until_s = 0, time.thread_time() + self.timeout_s

    def end(self) -> None:
        self._until_s = float("inf")

    def tick(self) -> None:
        """Called at the beginning of every round of a loop and every call of a macro."""
        self._ticks += 1
        if self._ticks % _TICKS_PER_CLOCK == 0 and time.thread_time() > self._until_s:
            raise TemplateLimitError(f"it has used {self.timeout_s:g} s of CPU time")


def _too_large() -> TemplateLimitError:
    return TemplateLimitError(f"it has made a text of more than {MAX_CHARACTERS} characters")


class _Counted(NodeTransformer):
    """Puts a tick into all that may repeat, and a check into what `~` joins."""

    def __init__(self, environment: _Environment) -> None:
        self._environment = environment

    def _repeats(self, node: Any) -> Any:
        self.generic_visit(node)
        call = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(call, lineno=node.lineno))
        return node.set_environment(self._environment)

    visit_For = visit_Macro = visit_CallBlock = _repeats

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        call = nodes.Call(nodes.EnvironmentAttribute("joined"), node.nodes, [], None, None)
        call.set_lineno(node.lineno).set_environment(self._environment)
        return call


class _Environment(ImmutableSandboxedEnvironment):
    """Transformers' environment, with bounds."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self, budget: _Budget, created_s: int | None) -> None:
        # optimized=False: otherwise constant expressions are computed while compiling, without any bound.
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], optimized=False)
        self.tick = budget.tick
        self.filters["tojson"] = _tojson
        del self.globals["lipsum"]  # it writes as much nonsense as it is asked for
        self.globals |= {"raise_exception": _refuse, "dict": _Dict(), "namespace": _Namespace}
        self.globals["strftime_now"] = lambda format: _now(created_s).strftime(format)

    def joined(self, *parts: Any) -> str:
        """What `~` makes."""
        texts = [str(part) for part in parts]
        if sum(map(len, texts)) > MAX_CHARACTERS:
            raise _too_large()
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _size(operator, left, right) > MAX_CHARACTERS:
            raise _too_large()
        return super().call_binop(context, operator, left, right)


def _size(operator: str, left: Any, right: Any) -> float:
    """About how large the result will be, in characters or items."""
    if operator == "**":
        bits = left.bit_length() * max(right, 0) if isinstance(left, int) and isinstance(right, int) else 0
        return bits / 3  # binary digits to decimal ones
    if operator == "+":
        return len(left) + len(right) if hasattr(left, "__len__") and hasattr(right, "__len__") else 0
    for many, times in ((left, right), (right, left)):
        if hasattr(many, "__len__") and isinstance(times, int):
            return len(many) * times
    return 0


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant says, for training; here its body is written as it is."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_body"), [], [], body)
        block.set_lineno(line)
        return block

    def _body(self, caller: Any) -> str:
        return str(caller())


class _Dict:
    """`dict`, without the attributes of a class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace`, without names that reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        given = dict(*rest, **kwargs)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}: names may not begin with _")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _now(created_s: int | None) -> datetime:
    return datetime.now() if created_s is None else datetime.fromtimestamp(created_s, tz=timezone.utc)
