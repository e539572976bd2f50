"""Answers that go round in circles, and what is told of tokens."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcv_runtime import OptionError, Piece, load
from mcv_runtime.choosing.repetition import RepeatGuard
from mcv_runtime.choosing.sampling import Sampling, distribution


def loops_from(tokens, window):
    """The length at which a guard first says so."""
    guard = RepeatGuard(window)
    return next((end for end in range(1, len(tokens) + 1) if guard.loops(tokens[:end])), None)


def is_loop(tokens, window):
    """By the definition: the last `window` tokens are one piece, at least four times over."""
    last = tokens[-window:]
    return len(last) == window and any(last[:-size] == last[size:] for size in range(1, window // 4 + 1))


@given(st.lists(st.integers(0, 2), max_size=80), st.integers(16, 24))
def test_guard_is_the_definition(tokens, window):
    expected = next((end for end in range(1, len(tokens) + 1) if is_loop(tokens[:end], window)), None)
    assert loops_from(tokens, window) == expected


@pytest.mark.parametrize(("size", "caught"), [(1, True), (4, True), (5, False)])
def test_long_pieces_are_no_loop_before_the_fourth_time(size, caught):
    assert (loops_from(list(range(size)) * 30, 16) == 16) == caught
    assert loops_from(list(range(1000)), 16) is None


@pytest.fixture(scope="module")
def engine():
    with load(threads=1) as engine:
        yield engine


def test_answer_ends_where_it_goes_round(engine):
    answer = engine.ask(None, "Hello", regex="x(ab){200}", max_new_tokens=300, repeat_guard=32)
    assert answer.stop_reason == "repetition"
    assert loops_from(list(answer.tokens), 32) == len(answer.tokens)
    assert answer.text == ("x" + "ab" * 200)[: len(answer.text)]
    whole = engine.ask(None, "Hello", regex="x(ab){20}", max_new_tokens=300)
    assert (whole.text, whole.stop_reason) == ("x" + "ab" * 20, "stop")


def test_logit_bias_and_frequency_penalty_are_added_to_logits():
    logits = np.array([1.0, 2.0, 3.0, 0.5], np.float32)
    biased = distribution(logits, Sampling(logit_bias={0: 5.0, 2: -100.0}))
    expected = np.exp(np.array([6.0, 2.0, -97.0, 0.5]))
    np.testing.assert_allclose(biased, expected / expected.sum(), rtol=1e-6)
    # OpenAI: mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence
    penalised = distribution(logits, Sampling(frequency_penalty=0.5, presence_penalty=0.25), [1, 1, 3])
    expected = np.exp(np.array([1.0, 2.0 - 1.0 - 0.25, 3.0, 0.5 - 0.5 - 0.25]))
    np.testing.assert_allclose(penalised, expected / expected.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {"x": 1.0}},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {1: float("nan")}},
        {"logit_bias": {True: 1.0}},
        {"logit_bias": {1_000_000: 1.0}},
        {"logit_bias": {1: 1.0}, "num_beams": 2},
        {"frequency_penalty": 1.0, "num_beams": 2},
        {"frequency_penalty": float("inf")},
        {"frequency_penalty": 1.0, "prompt_lookup": True},
        {"top_logprobs": 3},
        {"top_logprobs": 1000, "logprobs": True},
        {"repeat_guard": 3},
        {"repeat_guard": -1},
    ],
)
def test_options_that_make_no_sense(engine, options):
    with pytest.raises(OptionError):
        engine.ask(None, "Hello", max_new_tokens=2, **options)


def test_top_logprobs_are_the_likeliest(engine):
    answer = engine.ask(None, "Hello", max_new_tokens=5, logprobs=True, top_logprobs=3)
    assert answer.top_logprobs is not None and len(answer.top_logprobs) == len(answer.tokens) > 1
    for token, logprob, top in zip(answer.tokens, answer.logprobs, answer.top_logprobs, strict=True):
        assert top[0] == (token, logprob)  # greedy takes the likeliest
        assert [one[1] for one in top] == sorted((one[1] for one in top), reverse=True)
        assert sum(np.exp(one[1]) for one in top) <= 1 + 1e-6
    banned = engine.ask(None, "Hello", max_new_tokens=1, logprobs=True, logit_bias={answer.tokens[0]: -1000.0})
    assert banned.tokens[0] == answer.top_logprobs[0][1][0]
    assert banned.logprobs[0] == pytest.approx(answer.top_logprobs[0][1][1], abs=1e-5)  # of the model, before any bias


def test_pieces_know_their_tokens(engine):
    pieces = list(ticket := engine.stream(None, "Hello", max_new_tokens=12, logprobs=True, top_logprobs=2))
    answer = ticket.result()
    assert "".join(pieces) == answer.text
    assert all(isinstance(piece, Piece) for piece in pieces)
    told = [token for piece in pieces for token in piece.tokens]
    assert tuple(told) == answer.tokens[: len(told)] and len(told) >= len(answer.tokens) - 1
    assert [one for piece in pieces for one in piece.logprobs] == list(answer.logprobs[: len(told)])
    assert [one for piece in pieces for one in piece.top_logprobs] == list(answer.top_logprobs[: len(told)])


def test_raw_prompts_have_no_template(engine):
    ids = engine.prompt([{"role": "user", "content": "HELLO<|im_end|>"}], raw=True).ids.tolist()
    assert tuple(ids) == engine.tokenize("HELLO<|im_end|>")  # a control token is one
    assert engine.detokenize(ids) == "HELLO<|im_end|>"
    with_picture = engine.prompt([{"role": "user", "content": [np.zeros((112, 112, 3), np.uint8), "<image>x"]}], raw=True)
    assert len(with_picture.visual_positions) == 64  # but what stands for a picture is text
    with pytest.raises(OptionError, match="no token"):
        engine.detokenize([10**6])
