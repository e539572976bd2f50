"""Beam search: against transformers on a small random Llama. The golden cases' beams are in `test_generation.py`."""

import numpy as np
import pytest

from mcv_runtime.choosing.beams import beam_search
from mcv_runtime.errors import OptionError

VOCAB, PROMPT = 14, [5, 12, 3]
SCORE_TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def llama():
    """A random model that is sure enough of itself for beams to differ and to end."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.7,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        model = LlamaForCausalLM(config).eval()
        model.lm_head.weight.data *= 0.2
        return model

    with torch.random.fork_rng():
        yield make


def reference(model, stop, **options):
    """transformers' beams and scores; from embeddings, so that its penalty does not see the prompt."""
    import torch

    embeds = model.get_input_embeddings()(torch.tensor([PROMPT])).detach()
    stop_ids = sorted(stop) or None
    found = model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        do_sample=False,
        eos_token_id=stop_ids,
        pad_token_id=VOCAB - 1,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    beams = []
    for row in found.sequences.tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in stop), len(row))
        beams.append(tuple(row[:end]))
    scores = getattr(found, "sequences_scores", None)
    return beams, None if scores is None else scores.tolist()


class Rows:
    """Decodes rows of tokens anew at each step."""

    def __init__(self, model, rows):
        self.model, self.rows = model, [[] for _ in range(rows)]

    def logits(self):
        import torch

        with torch.no_grad():
            return self.model(torch.tensor([PROMPT + row for row in self.rows])).logits[:, -1].numpy()

    def step(self, parents, tokens):
        self.rows = [[*self.rows[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        return self.logits()


def search(first_logits, step, **options):
    """What a search finds when `step(parents, tokens)` reads for it."""
    searching = beam_search(first_logits, **options)
    try:
        wanted = next(searching)
        while True:
            wanted = searching.send(step(*wanted))
    except StopIteration as end:
        return end.value


CASES = [
    {"num_beams": 2},
    {"num_beams": 3},
    {"num_beams": 5, "num_return_sequences": 5},
    {"num_beams": 4, "length_penalty": 2.0, "num_return_sequences": 2},
    {"num_beams": 4, "length_penalty": -1.0},
    {"num_beams": 3, "length_penalty": 0.0, "num_return_sequences": 3},
    {"num_beams": 3, "early_stopping": True, "num_return_sequences": 3},
    {"num_beams": 3, "early_stopping": "never", "num_return_sequences": 3},
    {"num_beams": 2, "early_stopping": "never", "length_penalty": -0.5},
    {"num_beams": 3, "repetition_penalty": 1.2, "num_return_sequences": 3},  # what chat() of the published models takes
    {"num_beams": 5, "repetition_penalty": 0.9, "early_stopping": True},
]


@pytest.mark.filterwarnings("ignore:Passing `repetition_penalty` with `inputs_embeds`")  # what is wanted here
@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("stop", [frozenset(), frozenset({4}), frozenset({1, 4, 9})], ids=str)
def test_beams_are_those_of_transformers(options, stop, llama):
    ended = 0
    for seed in range(1, 5):
        model, limit = llama(seed), 4 + 3 * seed
        wanted, scores = reference(model, stop, max_new_tokens=limit, **options)
        rows = Rows(model, 1)
        found = search(rows.logits()[0], rows.step, stop=stop, limit=limit, **options)
        assert [beam.tokens for beam in found] == wanted
        np.testing.assert_allclose([beam.score for beam in found], scores, rtol=0, atol=SCORE_TOLERANCE)
        ended += any(len(beam.tokens) < limit for beam in found)
    assert ended or len(stop) < 3 or options.get("length_penalty", 1.0) > 1  # which favours long answers


def test_one_beam_that_stops_early_is_greedy(llama):
    for seed in range(6):
        wanted, _ = reference(llama(seed), frozenset({1, 4, 9}), max_new_tokens=20, num_beams=1)
        rows = Rows(llama(seed), 1)
        found = search(rows.logits()[0], rows.step, num_beams=1, stop=frozenset({1, 4, 9}), limit=20, early_stopping=True)
        assert [beam.tokens for beam in found] == wanted


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_beams_are_ordered_by_logits_that_round_to_one_probability(penalty):
    """So that one beam is greedy decoding in any case."""
    logits_V = np.array([-9, 1e-30, 3e-30, 0, 2e-30, -9], np.float32)

    def step(parents, tokens):
        return logits_V[None].repeat(len(tokens), 0)

    def found(num_beams, limit):
        options = {"num_beams": num_beams, "num_return_sequences": num_beams, "early_stopping": True}
        return search(logits_V, step, stop=frozenset({5}), limit=limit, repetition_penalty=penalty, **options)

    assert [beam.tokens for beam in found(3, 1)] == [(2,), (4,), (1,)]
    assert found(1, 3)[0].tokens == ((2, 2, 2) if penalty == 1 else (2, 4, 1))


class Digits:
    """Only numbers of `length` ascending digits; what the tokens from 10 on are ruled out for."""

    def __init__(self, length, taken=()):
        self.length, self.taken = length, taken

    @property
    def done(self):
        return len(self.taken) == self.length

    def mask(self, logits_V):
        result = np.full_like(logits_V, -np.inf)
        first = self.taken[-1] + 1 if self.taken else 0
        result[first : 11 - self.length + len(self.taken)] = logits_V[first : 11 - self.length + len(self.taken)]
        return result

    def advance(self, token):
        self.taken = (*self.taken, token)

    def fork(self):
        return Digits(self.length, self.taken)


def test_a_constraint_rules_tokens_out_and_ends_answers(llama):
    """With beams for all of the 120 numbers, the search is exhaustive."""
    from itertools import combinations

    import torch

    model = llama(0)
    rows = Rows(model, 1)
    found = search(
        rows.logits()[0],
        rows.step,
        num_beams=120,
        num_return_sequences=120,
        stop=frozenset({4}),
        limit=9,
        constraint=Digits(3),
    )
    numbers = [number for number in combinations(range(10), 3) if 4 not in number[:2]]  # as token 4 ends an answer
    expected = {}
    for number in numbers:
        with torch.no_grad():
            log_softmax = model(torch.tensor([[*PROMPT, *number]])).logits[0].log_softmax(-1)
        expected[number] = float(sum(log_softmax[len(PROMPT) - 1 + i, token] for i, token in enumerate(number))) / 3
    complete = {beam.tokens: beam.score for beam in found if beam.tokens[-1] != 4 or len(beam.tokens) == 3}
    assert complete == pytest.approx(expected, abs=SCORE_TOLERANCE)
    assert [beam.score for beam in found] == sorted((beam.score for beam in found), reverse=True)


def test_fewer_answers_than_beams():
    """Two of four beams have nothing that they may say."""
    logits_V = np.full(8, -np.inf, np.float32)
    logits_V[[2, 6]] = 1.0, 2.0
    asked = []

    def step(parents, tokens):
        asked.append((parents, tokens))
        return np.where(np.arange(8) == 7, 0, -np.inf)[None].repeat(len(tokens), 0).astype(np.float32)

    found = search(logits_V, step, num_beams=4, stop=frozenset({7}), limit=5, num_return_sequences=4)
    assert [beam.tokens for beam in found] == [(6, 7), (2, 7)]
    assert all(beam.done for beam in found)
    assert asked == [([0, 0], [6, 2])]


def test_what_there_is_when_the_time_is_up(llama):
    """The best of finished and unfinished answers, with the log-probabilities of their tokens."""
    rows, left = Rows(llama(1), 1), [None, None]

    def step(parents, tokens):
        return rows.step(parents, tokens) if left and left.pop() is None and left else None

    found = search(rows.logits()[0], step, num_beams=3, stop=frozenset(), limit=50, num_return_sequences=3)
    assert [len(beam.tokens) for beam in found] == [2, 2, 2]
    assert not any(beam.done for beam in found)
    for beam in found:
        assert beam.score == pytest.approx(np.mean(beam.logprobs), abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1, not 0"),
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences must be from 1 to num_beams=2, not 3"),
        ({"num_beams": 2, "early_stopping": "ever"}, "early_stopping must be True, False or \"never\", not 'ever'"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(OptionError, match=message):
        next(beam_search(np.zeros(9, np.float32), stop=frozenset(), limit=5, **options))
