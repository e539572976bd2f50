"""Prompt lookup: guesses against a plain search, and its tokens against greedy decoding."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcv_runtime.choosing.prompt_lookup import PromptLookup, looked_up
from mcv_runtime.choosing.sampling import penalised

VOCAB = 12


class Model:
    """A random model whose next token hangs on the last two; remembers what it has read."""

    def __init__(self, seed, prompt):
        self.table = np.random.default_rng(seed).standard_normal((VOCAB, VOCAB, VOCAB)).astype(np.float32) * 4
        self.tokens = list(prompt)
        self.reads = []

    def logits(self):
        return self.table[self.tokens[-2], self.tokens[-1]]

    def read(self, tokens):
        self.reads.append(len(tokens))
        rows = []
        for token in tokens:
            self.tokens.append(token)
            rows.append(self.logits())
        return np.stack(rows)

    def rewind(self, count):
        assert 0 < count < self.reads[-1]
        del self.tokens[-count:]


def greedy(model, stop, limit, penalty):
    tokens, logits = [], model.logits()
    while True:
        tokens.append(int(penalised(logits, set(tokens), penalty).argmax()))
        if tokens[-1] in stop or len(tokens) == limit:
            return tokens
        logits = model.read([tokens[-1]])[0]


def searched(history, longest, count):
    """`PromptLookup.guess`, looking everywhere."""
    for size in range(min(longest, len(history)), 0, -1):
        for start in range(len(history) - 1, size - 1, -1):
            if history[start - size : start] == history[-size:]:
                return history[start : start + count]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 4), st.integers(1, 6))
def test_a_guess_follows_the_last_occurrence_of_the_longest_run(history, longest, count):
    assert PromptLookup(history, longest=longest).guess(count) == searched(history, longest, count)
    grown = PromptLookup(history[:5], longest=longest)
    for token in history[5:]:
        grown.append(token)
    assert grown.guess(count) == searched(history, longest, count)


@pytest.mark.parametrize(
    ("history", "count", "guess"),
    [
        ([1, 2, 3, 4, 9, 2, 3], 10, [4, 9, 2, 3]),
        ([1, 2, 3, 5, 1, 2, 3, 4, 2, 3], 1, [4]),
        ([7, 7], 10, [7]),
        ([1, 2, 3], 10, []),
        ([], 10, []),
    ],
)
def test_guess(history, count, guess):
    assert PromptLookup(history).guess(count) == guess


def guessed(first_logits, read, rewind, lookup, stop=frozenset(), limit=50, penalty=1.0, heard=10**9):
    """The tokens of greedy decoding with guesses; after `heard` reads there is no more time."""
    tokens = []

    def choose(logits):
        tokens.append(int(penalised(logits, set(tokens), penalty).argmax()))
        return tokens[-1], tokens[-1] not in stop and len(tokens) < limit

    reading = looked_up(first_logits, choose, lookup, limit)
    try:
        wanted = next(reading)
        while True:
            if wanted.vain:
                rewind(wanted.vain)
            heard -= 1
            wanted = reading.send(read(wanted.tokens) if heard >= 0 and wanted.tokens else None)
    except StopIteration:
        return tokens


@pytest.mark.parametrize("penalty", [1.0, 1.3])
@pytest.mark.parametrize("seed", range(120))
def test_tokens_are_those_of_greedy_decoding(seed, penalty):
    """Answers that repeat themselves and the prompt, with stop tokens wherever, up to any limit, ended early or not."""
    chance = random.Random(seed)
    prompt = [chance.randrange(VOCAB) for _ in range(chance.randrange(2, 60))]
    stop, limit = frozenset(chance.sample(range(VOCAB), chance.randrange(3))), chance.randrange(1, 80)
    plain, quick = Model(seed, prompt), Model(seed, prompt)
    wanted = greedy(plain, stop, limit, penalty)
    lookup = PromptLookup(prompt, longest=chance.randrange(1, 4), count=chance.randrange(1, 11))
    heard = chance.randrange(1, 9) if seed % 3 == 0 else 10**9
    found = guessed(quick.logits(), quick.read, quick.rewind, lookup, stop, limit, penalty, heard)
    if seed % 3:
        assert found == wanted
        assert quick.tokens == plain.tokens
        wrong = lookup.drafted - lookup.accepted
        # a guessed stop token is right, but greedy decoding never reads it
        assert sum(quick.reads) <= len(wanted) - 1 + wrong + 1
        assert len(quick.reads) >= len(wanted) - 1 - lookup.accepted
    else:
        assert found == wanted[: len(found)]
    assert 0 <= lookup.accepted <= lookup.drafted


def test_a_quotation_takes_few_steps():
    """The model says the prompt again: drafts grow until they are ten tokens long."""
    text = list(range(100, 180))
    following = dict(zip(text, [*text[1:], 0], strict=True))
    reads = []

    def read(tokens):
        reads.append(len(tokens))
        return np.eye(200, dtype=np.float32)[[following.get(token, 0) for token in tokens]]

    lookup = PromptLookup([*text, 0, 1])
    assert guessed(np.eye(200)[100], read, lambda count: None, lookup, frozenset({0}), 500) == [*text, 0]
    assert reads == [5, 9, 11, 11, 11, 11, 11, 11]
    assert lookup.drafted == 72
    assert lookup.accepted == 72


def test_bad_guesses_become_rare():
    """The prompt suggests what the model never says."""
    lookup = PromptLookup([token for value in range(50) for token in (value, 99)])
    reads = []

    def read(tokens):
        reads.append(len(tokens))
        return np.eye(100, dtype=np.float32)[[(token + 1) % 50 for token in tokens]]

    assert guessed(np.eye(100)[0], read, lambda count: None, lookup) == list(range(50))
    assert lookup.accepted == 0
    assert sum(size > 1 for size in reads) <= 6
