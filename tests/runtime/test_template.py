# ruff: noqa: E501 - templates on one line, as published
"""Chat templates as strangers write them: within a budget, and otherwise as Jinja's own sandbox runs them."""

import threading
from datetime import datetime

import jinja2.ext
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mcv_runtime.errors import BundleCorruptError, McvError, PromptError
from mcv_runtime.request.patience import Interrupted
from mcv_runtime.text.template import MAX_SOURCE, ChatTemplate

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]

BOMBS = {
    "range": "{% for i in range(10**12) %}{% endfor %}x",
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}x",
    "text times number": "{{ 'a' * 10**10 }}",
    "number times text": "{{ 10**10 * 'a' }}",
    "list times number": "{{ ([0] * 10**9) | length }}",
    "power": "{{ 10 ** (10**8) }}",
    "power of a variable": "{% set x = messages | length %}{{ (x + 9) ** (10**8) }}",
    "powers of powers": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}x",
    "indent": "{{ 'a\n' * 1000 | indent(10**6) }}",
    "indent by a text": "{{ 'a' | indent('b' * 1000) }}",
    "tojson": "{{ [[[1]]] | tojson(indent=10**9) }}",
    "doubled text": "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s | length }}",
    "added text": "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s | length }}",
    "doubled list": "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}x",
    "lists of lists": "{% set ns = namespace(a=[]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}",
    "tuples": "{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ ns.a }}",
    "mappings": "{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = {1: ns.a, 2: ns.a} %}{% endfor %}x",
    "mappings by call": "{% set ns = namespace(a='a') %}{% for i in range(60) %}{% set ns.a = dict(x=ns.a, y=ns.a) %}{% endfor %}x",
    "namespaces": "{% set ns = namespace(a=1) %}{% set ns.b = ns %}{{ ns }}",
    "namespaces as text": "{% set ns = namespace(a=1) %}{{ ns | string }}",
    "namespaces joined": "{% set ns = namespace(a=1) %}{{ ns ~ '' }}",
    "written doubly": "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}"
    "{% set ns.s = t %}{% endfor %}x",
    "macros": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(50) }}",
    "macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "recursive loop": "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "replace": "{{ ('a' * 100000) | replace('a', 'a' * 100000) }}",
    "replace of nothing": "{{ ('a' * 100000).replace('', 'a' * 100000) }}",
    "replace, mapped": "{{ range(90000) | map('string') | map('replace', '1', 'a' * 100000) | list | length }}",
    "join": "{{ range(90000) | join('a' * 100000) }}",
    "join of a text": "{{ ('a' * 100000).join('b' * 100000) }}",
    "default, mapped": "{{ range(90000) | map('default', 'a' * 100000, true) | map('upper') | list | length }}",
    "text of the template": "{% for i in range(90000) %}" + "x" * 100_000 + "{% endfor %}",
    "dates": "{{ strftime_now('%Y' * 1000000) | length }}",
    "padded dates": "{{ strftime_now('%1000000000Y') }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "format_map": "{{ '{a:>10000000000}'.format_map({'a': 1}) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ 'a'['zfill'](10**10) }}",
    "center, by attr": "{{ ('a' | attr('center'))(10**10) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**10) }}",
    "bytes of a number": "{{ (1).to_bytes(10**10, 'little') }}",
    "sorts": "{% for i in range(90000) %}{% set x = range(90000) | sort %}{% endfor %}x",
}
FAILING = {
    "division": "{{ 1 // 0 }}",
    "type": "{{ 1 + 'a' }}",
    "undefined": "{{ nothing.a }}",
    "no call": "{{ none() }}",
    "no method": "{{ messages[0].content.foo() }}",
    "no place": "{{ messages[99].content }}",
    "refused": "{{ raise_exception('several\nlines \x1b[31mred') }}",
    "a date of a number": "{{ strftime_now(1) }}",
    "a date of half a character": "{{ strftime_now('\\ud800') }}",
    "no JSON": "{{ raise_exception | tojson }}",
    "no order": "{{ [1, 'a'] | sort }}",
    "overflow": "{{ 1e308 ** 10 }}",
    "globals": "{{ raise_exception.__globals__.x }}",
    "mro": "{{ ''.__class__.__mro__ }}",
    "changed": "{{ messages.append(1) }}",
}
UNUSABLE = {
    "unended": "{% for",
    "no tag": "{% foo %}",
    "no filter": "{{ 1 | foo }}",
    "center": "{{ 'a' | center(10**10) }}",
    "wordwrap": "{{ 'a' | wordwrap(1) }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "a long number": "{{ " + "9" * 5000 + " }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 2000 + "x" + "{% endif %}" * 2000,
    "deep loops": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    "long": " " * (MAX_SOURCE + 1),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused(bomb):
    with pytest.raises(PromptError, match="the model's chat template") as refused:
        ChatTemplate(BOMBS[bomb]).render(ASKED)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("source", FAILING)
def test_whatever_a_template_raises_is_one_line(source):
    with pytest.raises(PromptError, match="the model's chat template") as refused:
        ChatTemplate(FAILING[source]).render(ASKED)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("source", UNUSABLE)
def test_what_cannot_be_compiled_is_found_when_a_bundle_is_opened(source):
    with pytest.raises(BundleCorruptError, match="chat template") as refused:
        ChatTemplate(UNUSABLE[source])
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize(
    "source", ["{{ lipsum(n=100000) }}", "{{ cycler.__init__.__globals__ }}", "{% include '/etc/passwd' %}"]
)
def test_there_is_nothing_but_what_templates_need(source):
    with pytest.raises(McvError, match="chat template"):
        ChatTemplate(source).render(ASKED)


def plain(source, **asked):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source).render(enable_thinking=False, add_generation_prompt=True, **asked)


USUAL = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ loop.last }} {{ m.role ~ ': ' ~ m['content'] | trim }}\n{% endfor %}",
    "{% for m in messages[::-1] if m.role == 'user' %}{{ m.content.split('l')[-1] }}{% else %}none{% endfor %}",
    "{% set ns = namespace(found=false, n=1) %}{% for m in messages %}{% if not ns.found %}{% set ns.found = m.content.startswith('h') %}"
    "{% set ns.n = ns.n * 3 + 1 %}{% endif %}{% endfor %}{{ ns.found }} {{ ns.n }}",
    "{{ messages | map(attribute='content') | join(', ') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{% macro line(text, end='!') %}{{ text | upper }}{{ end }}{% endmacro %}{{ line('a') }}{{ line(end='?', text='b') }}",
    "{% for key, value in {'a': 1, 'b': [2, 3]}.items() %}{{ key }}={{ value }} {% endfor %}{{ {'b': 1, 'a': 2} | dictsort }}",
    "{{ '%' }}{{ 7 % 3 }}{{ 2 ** 10 }}{{ -3 // 2 }}{{ 'ab' * 3 }}{{ [1] * 2 }}{{ 1 + 2.5 }}{{ 'a' + 'b' }}{{ (1, 2) + (3,) }}",
    "{{ nothing }}{{ nothing | default('x') }}{{ none }}{{ true }}{{ 1.5 }}{{ [1, 'a', none] }}{{ 'é' | length }}",
    "{% for i in range(5) %}{% if i == 3 %}{% break %}{% endif %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}",
    "{% filter upper %}text {{ messages[0].role }}{% endfilter %}{% set block %}b{{ 1 }}{% endset %}{{ block }}",
    "{% for c in 'abc' %}{{ c }}{{ loop.cycle('x', 'y') }}{% endfor %}{% for x in [[1], [2]] recursive %}{{ x }}{% endfor %}",
    "{{ 'a,b'.replace(',', ';') }}{{ ', '.join(['a', 'b']) }}{{ 'a-b-c'.replace('-', '+', 1) }}{{ 'abc' | replace('b', '') }}",
    "{{ 'x\ny' | indent(2) }}{{ 'x\ny' | indent(2, true) }}{{ [3, 1, 2] | sort(reverse=true) | first }}{{ 'abc' | reverse }}",
    "{% if 'a' in 'abc' and 1 in [1] and 2 < 3 <= 3 and messages is iterable and messages is not mapping %}yes{% endif %}",
    "{{ range(3) | list }}{{ range(2) }}{{ 'a b' | title }}{{ ' x ' | trim | e }}{{ '3' | int + 1 }}{{ dict(a=1).get('a') }}",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}{% for x, y in [(1, 2)] %}{{ x + y }}{% endfor %}",
    "{{ strftime_now('%d %B %Y') }}{{ strftime_now('%-d') }}",
]


@pytest.mark.parametrize("source", USUAL)
def test_what_templates_usually_do_is_as_jinja_does_it(source):
    assert ChatTemplate(source).render(ASKED) == plain(source, messages=ASKED)


def test_a_long_conversation_is_within_the_budget(golden_root):
    source = (golden_root / "minicpmv4_6" / "checkpoint" / "chat_template.jinja").read_text(encoding="utf-8")
    turns = [{"role": role, "content": f"turn {n} " + "x" * 50} for n in range(1500) for role in ("user", "assistant")]
    assert ChatTemplate(source).render([*turns, ASKED[1]]).count("<|im_end|>") == len(turns) + 1
    long = [{"role": "user", "content": "word " * 1_000_000}]
    assert len(ChatTemplate(source).render(long)) > 4_900_000


def test_a_rendering_can_be_ended():
    cancel, left = threading.Event(), iter(range(1000))

    def check():
        if next(left, None) is None:
            cancel.set()
        if cancel.is_set():
            raise Interrupted("cancelled")

    with pytest.raises(Interrupted):
        ChatTemplate("{% for i in range(20000) %}{% set x = i | string %}{% endfor %}x").render(ASKED, check=check)
