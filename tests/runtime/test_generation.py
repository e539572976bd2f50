"""Every way to decode, through the public door: against the reference's beams, and against each other."""

import itertools
import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from mcv_runtime import OptionError, Options, Request, load

TINY = Path(__file__).parents[2] / "models" / "tiny"
DEMO = TINY / "demo.png"
QUESTIONS = ["What does the text say?", "Describe the picture.", "What shape is this?", "How many shapes are there?"]


@pytest.fixture(scope="module")
def engine():
    return load(threads=1)


def test_beams(golden_case, golden_engine):
    """The reference marks the cases whose order hangs on rounding."""
    for key in ("beam3", "beam3_rep12_chat_default"):
        expected = golden_case.expected[key]
        settings = expected["settings"]
        answer = golden_engine.ask_messages(
            golden_case.request(),
            num_beams=settings["num_beams"],
            max_new_tokens=settings["max_new_tokens"],
            length_penalty=settings["length_penalty"],
            early_stopping=settings["early_stopping"],
            repetition_penalty=settings.get("repetition_penalty", 1.0),
            **golden_case.options,
        )
        if expected.get("stable_under_2e-4_relative_embed_noise", True):
            assert list(answer.tokens) == expected["tokens"], key


def test_merger_beams(merger_case, engine_of):
    if "beam3" not in merger_case.expected:
        pytest.skip("a case without beams")
    wanted = merger_case.expected["beam3"]
    answer = engine_of(merger_case.family).ask_messages(
        merger_case.request(),
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=24,
        repetition_penalty=1.0,
        **merger_case.options,
    )
    assert [list(one.tokens) for one in (answer, *answer.alternatives)] == wanted
    scores = [one.score for one in (answer, *answer.alternatives)]
    np.testing.assert_allclose(scores, merger_case.expected["beam3_scores"], rtol=0, atol=1e-3)


def test_prompt_lookup_gives_the_greedy_answer(engine, engine_of):
    """200 questions about drawn pictures, and random models whose answers repeat themselves."""
    sys.path.insert(0, str(TINY))
    try:
        from scenes import held_out
    finally:
        del sys.path[0]
    drafted = accepted = 0
    for example in itertools.islice(held_out(200), 200):
        images = list(example.images)
        greedy = engine.ask(images, example.question, max_new_tokens=40)
        guessed = engine.ask(images, example.question, max_new_tokens=40, prompt_lookup=True)
        assert guessed.tokens == greedy.tokens
        drafted, accepted = drafted + guessed.drafted, accepted + guessed.accepted
    assert 0 < accepted < drafted
    for family in ("minicpmv2_6", "minicpmv4_6"):
        for prompt in ("one two one two one two one", "A B C A B C A"):
            options = {"max_new_tokens": 60, "repetition_penalty": 1.0}
            greedy = engine_of(family).ask(None, prompt, **options)
            guessed = engine_of(family).ask(None, prompt, prompt_lookup=True, logprobs=True, **options)
            assert guessed.tokens == greedy.tokens
            again = engine_of(family).ask(None, prompt, logprobs=True, **options)  # goes on from what the guesses left
            assert again.tokens == greedy.tokens
            np.testing.assert_allclose(guessed.logprobs, again.logprobs, atol=1e-3)


def test_sampling_is_reproducible(engine):
    options = {"temperature": 3.0, "max_new_tokens": 12}
    ask = lambda **more: engine.ask(DEMO, "Describe the picture.", **options, **more)  # noqa: E731
    assert ask(seed=7).tokens == ask(seed=7).tokens
    assert len({ask(seed=seed).tokens for seed in range(8)}) > 4
    assert len({ask().tokens for _ in range(8)}) > 4
    assert ask(seed=7, top_k=1).tokens == engine.ask(DEMO, "Describe the picture.", max_new_tokens=12).tokens


def test_several_answers(engine):
    options = {"temperature": 3.0, "seed": 7, "max_new_tokens": 12}
    answer = engine.ask(DEMO, "Describe the picture.", num_return_sequences=5, **options)
    assert len(answer.alternatives) == 4
    assert answer.tokens == engine.ask(DEMO, "Describe the picture.", **options).tokens
    assert len({one.tokens for one in (answer, *answer.alternatives)}) > 2
    best = engine.ask(DEMO, "Describe the picture.", num_beams=4, num_return_sequences=3)
    scores = [one.score for one in (best, *best.alternatives)]
    assert scores == sorted(scores, reverse=True)
    assert len({one.text for one in (best, *best.alternatives)}) == 3


def test_logprobs_are_the_models_own(engine):
    """Equal from one by one, from a search and from a lookup; their mean is the score of a beam without penalties."""
    plain = engine.ask(DEMO, "Describe the picture.", logprobs=True, repetition_penalty=1.0)
    assert len(plain.logprobs) == len(plain.tokens)
    assert all(value <= 0 for value in plain.logprobs)
    best = engine.ask(DEMO, "Describe the picture.", logprobs=True, repetition_penalty=1.0, num_beams=3)
    assert best.tokens == plain.tokens
    np.testing.assert_allclose(best.logprobs, plain.logprobs, atol=1e-3)
    assert best.score == pytest.approx(np.mean(plain.logprobs), abs=1e-3)
    assert engine.ask(DEMO, "Describe the picture.").logprobs is None


def test_stop_strings_and_ids(engine):
    whole = engine.ask(DEMO, "Describe the picture.")
    assert whole.text == "a red circle and the text HELLO"
    pieces = list(engine.stream(DEMO, "Describe the picture.", stop=[" and", "HELLO"]))
    assert "".join(pieces) == "a red circle"
    assert engine.ask(DEMO, "Describe the picture.", stop="xyz").text == whole.text
    cut = engine.ask(DEMO, "Describe the picture.", stop_token_ids=[whole.tokens[3]])
    assert cut.tokens == whole.tokens[:4]
    assert (cut.stop_reason, engine.ask(DEMO, "Describe the picture.", stop=" and").stop_reason) == ("stop", "stop")


@pytest.mark.parametrize("more", [{}, {"temperature": 2.0, "seed": 1}, {"num_beams": 3}])
def test_constrained_answers(engine, more):
    schema = {
        "type": "object",
        "properties": {"text": {"type": "string", "maxLength": 8}, "shapes": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["text", "shapes"],
        "additionalProperties": False,
    }
    answer = engine.ask(DEMO, "Describe the picture.", json_schema=schema, max_new_tokens=250, **more)
    assert answer.stop_reason == "stop", answer
    found = json.loads(answer.text)
    assert (type(found["text"]), type(found["shapes"]), len(found)) == (str, int, 2)
    assert engine.ask(DEMO, "What colour?", choices=["green", "red"], **more).text in ("green", "red")
    assert engine.ask(DEMO, "How many?", regex="[0-9]{3}", **more).text.isdigit()


@pytest.mark.waits
def test_a_cancelled_batch_and_stream(engine):
    cancel = threading.Event()
    stream = engine.stream(DEMO, "Describe the picture.", cancel=cancel)
    first = next(stream)
    cancel.set()
    rest = []
    while True:
        try:
            rest.append(next(stream))
        except StopIteration as end:
            answer = end.value
            break
    assert answer.stop_reason == "cancelled"
    assert answer.text == first + "".join(rest)
    requests = [Request(DEMO, question, options=Options(cancel=cancel)) for question in QUESTIONS]
    assert [answer.stop_reason for answer in engine.batch(requests)] == ["cancelled"] * 4
    abandoned = engine.stream(DEMO, "Describe the picture.")
    next(abandoned)
    abandoned.close()
    assert engine.ask(DEMO, "Describe the picture.").text == "a red circle and the text HELLO"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"top_p": 0.5}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1.0, "num_beams": 2}, "exclude"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 10**9}, "num_beams"),
        ({"stop": ["a", ""]}, "stop string"),
        ({"timeout": 0}, "timeout"),
        ({"prompt_lookup": True, "temperature": 1.0}, "prompt_lookup"),
        ({"regex": "a", "choices": ["b"]}, "exclude"),
        ({"regex": "("}, "regex"),
        ({"json_schema": "{"}, "json_schema"),
        ({"prefill_chunk": 0}, "prefill_chunk"),
        ({"length_penalty": float("nan")}, "length_penalty"),
        ({"presence_penalty": 1.0, "num_beams": 2}, "presence_penalty"),
        ({"temperatur": 1.0}, "temperatur"),
    ],
)
def test_options_that_make_no_sense(engine, options, line):
    with pytest.raises(OptionError, match=line):
        engine.ask(DEMO, "x", **options)
    with pytest.raises(OptionError, match=line):
        engine.batch([Request(DEMO, "x", options=Options.of(None, options))])
