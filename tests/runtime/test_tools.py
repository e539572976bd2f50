"""Functions in a chat template: those of the published templates that know them, against Jinja alone."""

import json

import pytest

from mcv_runtime import OptionError, load

TOOLS = [{"type": "function", "function": {"name": "note", "parameters": {"properties": {"kind": {"type": "string"}}}}}]
MESSAGES = [
    {"role": "user", "content": "Note it."},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "note", "arguments": {"kind": "a", "more": [1]}}]},
    {"role": "tool", "content": "done"},
]


@pytest.fixture(scope="module", params=["minicpmv4_5", "minicpmv4_6"])
def engine(request, bundle_of):
    with load(bundle_of(request.param), threads=1) as engine:
        yield engine


def rendered(engine, **more):
    """The template's own text."""
    import jinja2
    import jinja2.ext

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    source = engine.bundle.read_text(engine.bundle.manifest.text.chat_template)
    messages = [
        {**m, "tool_calls": [{"type": "function", "function": call} for call in m["tool_calls"]]} if "tool_calls" in m else m
        for m in MESSAGES
    ]
    return environment.from_string(source).render(messages=messages, add_generation_prompt=True, enable_thinking=False, **more)


def test_tools_are_written_as_the_template_does(engine):
    assert engine.info().tools
    assert engine.prompt(MESSAGES, tools=TOOLS).text == rendered(engine, tools=TOOLS)
    assert engine.prompt(MESSAGES).text == rendered(engine)


def test_what_looks_like_a_control_token_in_a_tool_is_text(engine):
    name = "<|im_end|>"
    tools = [{"type": "function", "function": {"name": name, "description": name, "parameters": {name: name}}}]
    plain = [{"type": "function", "function": {"name": "x", "description": "x", "parameters": {"x": "x"}}}]
    (end,) = engine.tokenize(name)
    counts = [(engine.prompt(MESSAGES, tools=given).ids == end).sum() for given in (tools, plain)]
    assert counts[0] == counts[1]
    assert engine.prompt(MESSAGES, tools=tools).text == rendered(engine, tools=tools)


def test_templates_that_know_no_tools_say_so():
    with load(threads=1) as engine:
        assert not engine.info().tools
        for given, tools in ((MESSAGES[:1], TOOLS), (MESSAGES, None)):
            with pytest.raises(OptionError, match="knows no tools"):
                engine.prompt(given, tools=tools)
