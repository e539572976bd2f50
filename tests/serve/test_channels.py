"""Thoughts, answers and calls told apart, wherever the pieces of a text begin and end."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcv_serve.asked import Turn
from mcv_serve.channels import Channels
from mcv_serve.tools import in_words, read_call, schema_of

TOOLS = [
    {"type": "function", "function": {"name": "note", "parameters": {
        "type": "object", "properties": {"text": {"type": "string"}, "times": {"type": "integer"}}}}},
    {"type": "function", "function": {"name": "leave"}},
]  # fmt: skip


def told(pieces, **how):
    channels = Channels(**how)
    parts = [part for piece in pieces for part in channels.push(piece)] + channels.finish()
    joined = {"reasoning": "", "content": ""}
    for part in parts:
        if part.channel != "call":
            joined[part.channel] += part.text
    return joined["reasoning"], joined["content"], [part.text for part in parts if part.channel == "call"]


CASES = [
    ("a plain answer ", {}, ("", "a plain answer ", [])),
    ("a <think>b</think> c", {}, ("", "a <think>b</think> c", [])),  # nobody asked for thoughts
    ("first\n</think>\n\nthen", {"thinking": True}, ("first", "then", [])),
    ("<think>\nfirst\n</think>then </think> on", {"thinking": True}, ("first", "then </think> on", [])),
    ("only thoughts ", {"thinking": True}, ("only thoughts", "", [])),
    ("1 < 2 </thin", {"thinking": True}, ("1 < 2 </thin", "", [])),
    ("x <tool_call>y</tool_call>", {}, ("", "x <tool_call>y</tool_call>", [])),
    ("I note. \n<tool_call>\n{1}\n</tool_call>\n<tool_call>{2}</tool_call>", {"calls": True}, ("", "I note.", ["{1}", "{2}"])),
    ("<tool_call>{1", {"calls": True}, ("", "", ["{1"])),
    ("a <tool_cal", {"calls": True}, ("", "a <tool_cal", [])),
    ("t</think>\n<tool_call>c</tool_call>", {"thinking": True, "calls": True}, ("t", "", ["c"])),
]


@pytest.mark.parametrize(("text", "how", "expected"), CASES)
def test_channels(text, how, expected):
    assert told([text], **how) == expected
    assert told(list(text), **how) == expected


@given(st.sampled_from(CASES), st.lists(st.integers(1, 12), min_size=1))
def test_channels_however_the_text_is_cut(case, sizes):
    text, how, expected = case
    pieces, at = [], 0
    while at < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[at : at + size])
        at += size
    assert told(pieces, **how) == expected


def test_text_is_given_out_at_once_where_nothing_may_begin():
    channels = Channels(calls=True)
    assert [part.text for part in channels.push("a b")] == ["a b"]
    assert [part.text for part in channels.push(" <")] == []
    assert [part.text for part in channels.push("= c")] == [" <= c"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "note", "arguments": {"text": "x"}}', ("note", {"text": "x"})),
        ('{"name": "note", "parameters": {"text": "x"}}', ("note", {"text": "x"})),
        ('{"name": "note", "arguments": "{\\"text\\": \\"x\\"}"}', ("note", {"text": "x"})),
        ('{"name": "leave"}', ("leave", {})),
        ("<function=note>\n<parameter=text>\n1\n2\n</parameter>\n<parameter=times>\n3\n</parameter>\n</function>",
         ("note", {"text": "1\n2", "times": 3})),
        ("<function=leave>\n</function>", ("leave", {})),
        ('{"name": "other", "arguments": {}}', None),
        ("<function=other>\n</function>", None),
        ('{"name": "note", "arguments": [1]}', None),
        ('{"name": "note", "arguments": "{"}', None),
        ("note(x)", None),
        ("[]", None),
        ('{"name": ["note"]}', None),
    ],
)  # fmt: skip
def test_calls_in_either_form(text, expected):
    call = read_call(text, TOOLS)
    assert (call and (call.name, json.loads(call.arguments))) == expected


def test_schemas_of_forced_calls():
    assert schema_of(TOOLS, "note") == TOOLS[0]["function"]["parameters"]
    names = [one["properties"]["name"]["const"] for one in schema_of(TOOLS, "*")["anyOf"]]
    assert names == ["note", "leave"]
    assert schema_of(TOOLS[:1], "*")["properties"]["arguments"] == TOOLS[0]["function"]["parameters"]


def test_tools_in_words():
    turns = [
        Turn("user", ("Note it.",)),
        Turn("assistant", ("Well.",), ({"name": "note", "arguments": {"text": "x"}}, {"name": "leave", "arguments": {}})),
        Turn("tool", ("one",)),
        Turn("tool", ("two",)),
    ]
    system, *rest = in_words(turns, TOOLS)
    assert system.role == "system" and all(json.dumps(tool) in system.parts[0] for tool in TOOLS)
    assert [turn.role for turn in rest] == ["user", "assistant", "user"] and not any(turn.tool_calls for turn in rest)
    assert read_call(rest[1].parts[1].split("</tool_call>")[0].removeprefix("<tool_call>"), TOOLS).name == "note"
    assert rest[2].parts == ("<tool_response>", "one", "</tool_response>", "<tool_response>", "two", "</tool_response>")
    with_system = in_words([Turn("system", ("Be brief.",)), *turns], TOOLS)
    assert with_system[0].parts[0] == "Be brief." and len(with_system) == len(rest) + 1
    assert in_words(turns[:1], []) == (turns[0],)
