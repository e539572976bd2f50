"""A checkpoint's chat template: a stranger's program, run in a sandbox and within a budget.

Jinja's sandbox keeps a template from what lies outside it, but lets it count to 10 ** 15 and write 'a' * 10 ** 10. Here
whatever repeats (loops, calls), makes a value or writes one is charged before it can cost much: the template's syntax tree is
changed so that all of these pass through filters of ours, and what else can be called does not enlarge what it gets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, Sequence, ValuesView
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.meta
from jinja2 import nodes
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context
from jinja2.visitor import NodeTransformer

from mcv_runtime.errors import BundleCorruptError, McvError, OptionError, PromptError, printable

MAX_SOURCE = 1 << 20
"""Characters of the longest template; published ones have 8 thousand."""
_STEP, _ITEM = 4_000, 50
"""What a turn of a loop or a call, and an item of a list, cost; a character costs 1, and 1 is about a nanosecond."""
_BASE, _PER_MESSAGE, _PER_CHARACTER = 200_000_000, 500 * _STEP, 200
"""The budget. Published templates take 30 steps for a message, and touch each of its characters 20 times."""
_LARGEST, _LARGER = 1 << 20, 4
"""The largest value: so many characters, or so many times as many as the messages have."""
_BITS = 4096
"""Of the largest whole number."""
_INDENT = 16
_BUDGET = "the budget"  # a name that no template can write
_MADE, _WRITTEN = "value made", "value written"
# fmt: off
_FILTERS = frozenset([
    "abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "groupby", "indent",
    "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace",
    "reverse", "round", "safe", "select", "selectattr", "sort", "string", "title", "tojson", "trim", "unique", "upper",
])
# fmt: on
# fmt: off
_METHODS = frozenset([
    "capitalize", "count", "endswith", "find", "get", "index", "isalnum", "isalpha", "isdecimal", "isdigit", "islower",
    "isnumeric", "isspace", "istitle", "isupper", "items", "join", "keys", "lower", "lstrip", "partition", "removeprefix",
    "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith",
    "strip", "swapcase", "title", "upper", "values",
])
# fmt: on
_PLAIN = (str, bytes, int, float, list, tuple, dict, range, KeysView, ValuesView, ItemsView)
_DATE = re.compile(r"(?:[^%]|%-?[A-Za-z%])*")


class ChatTemplate:
    """A checkpoint's Jinja chat template, with the helpers that Hugging Face templates expect."""

    def __init__(self, source: str, variables: Mapping[str, str] | None = None) -> None:
        if len(source) > MAX_SOURCE:
            raise BundleCorruptError(f"the bundle's chat template has {len(source):,} characters; {MAX_SOURCE:,} are read")
        environment = _Sandbox()
        environment.globals.update(variables or {})
        try:
            parsed = environment.parse(source)
            asked = jinja2.meta.find_undeclared_variables(parsed)
            self.can_think, self.can_call = "enable_thinking" in asked, "tools" in asked
            self._template = environment.from_string(_Metered().visit(parsed))
        except Exception as error:  # what is nested too deeply, or has a number too long, fails inside Python's own compiler
            raise BundleCorruptError(f"the bundle's chat template cannot be used: {_said(error)}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        thinking: bool = False,
        answering: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        check: Callable[[], None] = lambda: None,
    ) -> str:
        """The text of a conversation up to where the assistant answers, or thinks first; or without that.

        `check` is called again and again meanwhile, and may raise. Raises `PromptError` for what the template refuses, and
        where it does more than the messages are worth.
        """
        if thinking and not self.can_think:
            raise OptionError("this model does not know thinking; leave the option out")
        if not self.can_call and (tools or any(m["role"] == "tool" or m.get("tool_calls") for m in messages)):
            raise OptionError("this model's chat template knows no tools; describe them in the system prompt")
        budget = _Budget(len(messages) + len(tools), sum(len(str(given)) for given in [*messages, *tools]), check)
        asked = {"messages": messages, "add_generation_prompt": answering, "enable_thinking": thinking, _BUDGET: budget}
        if tools:
            asked["tools"] = list(tools)
        try:
            return self._template.render(asked)
        except McvError:
            raise
        except jinja2.TemplateError as error:
            raise PromptError(f"the model's chat template refuses these messages: {_said(error)}") from error
        except Exception as error:  # a stranger's program raises anything
            if budget.interrupted:
                raise
            raise PromptError(f"the model's chat template fails with these messages: {_said(error)}") from error


class _Budget:
    """What a rendering may still cost, and how large a value may become."""

    def __init__(self, messages: int, characters: int, check: Callable[[], None]) -> None:
        self.interrupted = False
        self._left = _BASE + _PER_MESSAGE * messages + _PER_CHARACTER * characters
        self._largest = max(_LARGEST, _LARGER * characters)
        self._check = check

    @classmethod
    def of(cls, context: Context) -> _Budget:
        budget = context.resolve(_BUDGET)
        assert isinstance(budget, _Budget)
        return budget

    def step(self) -> None:
        try:
            self._check()
        except BaseException:
            self.interrupted = True
            raise
        self.charge(_STEP)

    def charge(self, cost: int) -> None:
        self._left -= cost
        if self._left < 0:
            raise PromptError("the model's chat template takes far longer than its messages are worth")

    def require(self, size: int) -> None:
        """Raise `PromptError` for a value that would become too large."""
        if size > self._largest:
            raise PromptError(f"the model's chat template makes a value of more than {self._largest:,} characters")

    def size(self, value: Any) -> int:
        """About how long a value is when it is written; raises `PromptError` for what is none, or too large."""
        total, waiting = 0, [value]
        while waiting:
            one = waiting.pop()
            if isinstance(one, str):
                total += len(one) + _ITEM
            elif isinstance(one, dict):
                waiting += [*one.keys(), *one.values()]
                total += _ITEM
            elif isinstance(one, list | tuple | KeysView | ValuesView | ItemsView):
                waiting += one
                total += _ITEM
            elif isinstance(one, int):
                total += one.bit_length() // 3 + _ITEM
            elif one is None or isinstance(one, float | Undefined | range):
                total += _ITEM
            else:
                raise PromptError(f"the model's chat template writes what is no text ({type(one).__name__})")
            self.require(total)
        return total

    def made(self, value: Any) -> Any:
        """A value that has just been made, paid for; what gives its items one by one becomes a list."""
        if isinstance(value, Iterator) and not isinstance(value, LoopContext):
            items: list[Any] = []
            total = 0
            for item in value:
                total += self.size(item)
                self.require(total)
                self.step()
                items.append(item)
            return items
        if isinstance(value, Namespace | LoopContext | Macro) or callable(value):  # a thing of the template's, not a value
            return value
        self.charge(self.size(value))
        return value


class _Metered(NodeTransformer):
    """Has whatever repeats, makes a value or writes one pass through a filter that charges for it."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - jinja2's names, here and below
        self.generic_visit(node)
        node.iter = _through("each turn", node.iter)
        return node

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [_through(_WRITTEN, one) for one in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [_through(_WRITTEN, one) for one in node.nodes]
        return _through(_MADE, node)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        if node.node is not None:  # None: a block of text, which was paid for as it was written
            node.node = _through("value used", node.node)
        return _through(_MADE, node) if node.node is not None else node

    def _made(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _through(_MADE, node)

    visit_List = visit_Dict = _made  # noqa: N815

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _through(_MADE, node) if node.ctx == "load" else node


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
        own = {"tojson": _to_json, "replace": _replace, "join": _join, "indent": _indent}
        marks = {"each turn": _turns, _MADE: _made, _WRITTEN: _written, "value used": _used}
        self.filters = {name: self.filters[name] for name in _FILTERS} | own | marks
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace")}
        self.globals.update(raise_exception=_refuse, strftime_now=_now)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, _PLAIN) and attr not in _METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """No str.format, which can pad: it is then a method like others, and not among those that may be called."""

    def call(self, context: Context, called: Any, /, *arguments: Any, **named: Any) -> Any:
        budget = _Budget.of(context)
        budget.step()
        text = getattr(called, "__self__", None)
        if isinstance(text, str) and arguments:
            if called.__name__ == "replace":
                return _replace(context, text, *arguments, **named)
            if called.__name__ == "join":
                return _join(context, arguments[0], text)
        return budget.made(super().call(context, called, *arguments, **named))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _Budget.of(context)
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if numbers and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 0) if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _BITS and operator in ("*", "**"):
                raise PromptError(f"the model's chat template makes a number of more than {_BITS:,} bits")
        elif not numbers and operator == "*":
            text, times = (right, left) if isinstance(left, int) else (left, right)
            budget.require(budget.size(text) * max(times, 0) if isinstance(times, int) else 0)
        elif not numbers and operator == "%":
            raise PromptError("the model's chat template formats a text with %, which is not supported")
        result = super().call_binop(context, operator, left, right)
        return result if numbers else budget.made(result)


@pass_context
def _turns(context: Context, value: Any) -> Iterator[Any]:
    budget = _Budget.of(context)
    for item in value:
        budget.step()
        yield item


@pass_context
def _made(context: Context, value: Any) -> Any:
    return _Budget.of(context).made(value)


@pass_context
def _written(context: Context, value: Any) -> Any:
    budget = _Budget.of(context)
    budget.charge(budget.size(value))
    return value


@pass_context
def _used(context: Context, value: Any) -> Any:
    if isinstance(value, Namespace):  # a text of one holds what is in it, and that may be itself
        raise PromptError("the model's chat template writes what is no text (namespace)")
    return value


@pass_context
def _replace(context: Context, text: Any, old: Any, new: Any, count: int = -1) -> str:
    budget = _Budget.of(context)
    budget.step()
    text, old, new = str(text), str(old), str(new)
    count = -1 if count is None else count
    found = text.count(old) if count < 0 else min(text.count(old), count)
    budget.require(len(text) + found * len(new))
    result: str = text.replace(old, new, count)
    budget.charge(len(text) + len(result))
    return result


@pass_context
def _join(context: Context, value: Any, d: Any = "", attribute: Any = None) -> str:
    budget = _Budget.of(context)
    items = budget.made(iter(value))
    budget.step()
    budget.require(budget.size(items) + len(items) * len(str(d)))
    result = str(jinja2.filters.do_join(context.eval_ctx, items, str(d), attribute))
    budget.charge(len(result))
    return result


@pass_context
def _indent(context: Context, text: Any, width: Any = 4, first: bool = False, blank: bool = False) -> str:
    if len(width) > _INDENT if isinstance(width, str) else width > _INDENT:
        raise PromptError(f"the model's chat template indents by more than {_INDENT} characters")
    return str(jinja2.filters.do_indent(str(text), width, first, blank))


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    # Jinja's own filter escapes HTML
    if indent is not None and indent > _INDENT:
        raise PromptError(f"the model's chat template indents by more than {_INDENT} characters")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _refuse(message: str) -> str:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    if len(form) > 100 or not _DATE.fullmatch(form):
        raise jinja2.TemplateError("strftime_now is given what is no form of a date")
    return datetime.now().strftime(form)


def _said(error: Exception) -> str:
    message = error.message if isinstance(error, jinja2.TemplateError) else str(error)  # of a syntax, without where it is
    return printable(" ".join(str(message or "").split())[:200]) or type(error).__name__
