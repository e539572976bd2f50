"""Drawing tokens: against transformers' processors, and draws against the exact distribution."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mcv_runtime.choosing.sampling import Sampler, Sampling, distribution, likeliest, penalised
from mcv_runtime.errors import OptionError

SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.9, "top_k": 3},
    {"top_k": 1},
    {"top_k": 1000},
    {"top_p": 0.8},
    {"top_p": 0.05},
    {"min_p": 0.1},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},  # chat() of the published models
    {"temperature": 1.5, "top_k": 30, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.3},
    {"temperature": 0.6, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 0.8},
]
GENERATED = [3, 4, 3, 7, 11, 39]


def random_logits(seed, size=40, spread=2.0):
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def reference(logits_V, settings, generated):
    """What transformers 5 makes of the logits, in the order of its generate()."""
    import torch
    from transformers import generation

    given = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0, "repetition_penalty": 1.0, **settings}
    processors = []
    if given["repetition_penalty"] != 1:
        processors.append(generation.RepetitionPenaltyLogitsProcessor(penalty=given["repetition_penalty"]))
    processors.append(generation.TemperatureLogitsWarper(given["temperature"]))
    if given["top_k"]:
        processors.append(generation.TopKLogitsWarper(top_k=given["top_k"]))
    if given["top_p"] < 1:
        processors.append(generation.TopPLogitsWarper(top_p=given["top_p"]))
    if given["min_p"]:
        processors.append(generation.MinPLogitsWarper(min_p=given["min_p"]))
    ids = torch.tensor([generated])
    scores = torch.tensor(logits_V[None])
    for processor in processors:
        scores = processor(ids, scores)
    return torch.softmax(scores.double(), -1)[0].numpy()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [40, 3000])
def test_distribution_is_that_of_transformers(settings, size):
    for seed in range(20):
        logits_V = random_logits(seed, size)
        ours, theirs = distribution(logits_V, Sampling(**settings), GENERATED), reference(logits_V, settings, GENERATED)
        np.testing.assert_array_equal(ours > 0, theirs > 0)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [*SETTINGS, {"presence_penalty": 1.5}, {"temperature": 1e-300}], ids=str)
def test_draws_follow_the_distribution(settings):
    """20,000 draws: a chi-square within six standard deviations, each token within six of its own, and only allowed tokens."""
    draws, logits_V = 20_000, random_logits(1)
    sampler = Sampler(Sampling(seed=5, **settings))
    counts = np.bincount([sampler.draw(logits_V, GENERATED) for _ in range(draws)], minlength=len(logits_V))
    expected = distribution(logits_V, Sampling(**settings), GENERATED) * draws
    assert not counts[expected == 0].any()
    deviation = np.sqrt(expected * (1 - expected / draws))
    assert (np.abs(counts - expected) <= 6 * deviation + 1e-9).all()
    common = expected >= 5  # the usual condition of the test
    freedom = max(common.sum() - 1, 1)
    chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert chi_square <= freedom + 6 * np.sqrt(2 * freedom)


def test_a_distribution_that_is_off_would_be_noticed():
    """The bounds above are tight enough to tell a temperature of 0.7 from one of 0.75."""
    draws, logits_V = 20_000, random_logits(1)
    sampler = Sampler(Sampling(seed=5, temperature=0.7))
    counts = np.bincount([sampler.draw(logits_V) for _ in range(draws)], minlength=len(logits_V))
    expected = distribution(logits_V, Sampling(temperature=0.75)) * draws
    common = expected >= 5
    assert ((counts - expected)[common] ** 2 / expected[common]).sum() > common.sum() + 6 * np.sqrt(2 * common.sum())


def test_same_seed_same_tokens():
    def tokens(seed):
        sampler = Sampler(Sampling(seed=seed))
        return [sampler.draw(random_logits(i)) for i in range(50)]

    assert tokens(7) == tokens(7) != tokens(8)
    assert tokens(None) != tokens(None)


def test_the_global_generator_is_left_alone():
    np.random.seed(3)
    wanted = np.random.random()
    np.random.seed(3)
    Sampler(Sampling(seed=1)).draw(random_logits(0))
    assert np.random.random() == wanted


def test_temperature_of_0_takes_the_likeliest():
    logits_V = np.array([1.0, 3.0, 3.0, 2.9], np.float32)
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=1.5))
    assert sampler.draw(logits_V) == 1
    assert sampler.draw(logits_V, [1]) == 2
    assert sampler.draw(logits_V, [1, 2]) == 3


def test_equal_tokens():
    logits_V = np.zeros(6, np.float32)
    assert np.flatnonzero(distribution(logits_V, Sampling(top_p=0.5))).tolist() == [0, 1, 2]
    assert np.flatnonzero(distribution(logits_V, Sampling(top_k=2))).tolist() == [0, 1, 2, 3, 4, 5]
    assert likeliest(np.array([1.0, 2.0, 1.0, 2.0, 1.0]), 4).tolist() == [1, 3, 0, 2]


# The second of the two is likelier, by less than a probability near 1/2 can say.
NEARLY_EQUAL = [[0.0, 2.2e-29], [1.0, np.nextafter(1, 2, dtype=np.float32)], [-3e-30, -1e-30], [0.0, 1e-45]]


@pytest.mark.parametrize("logits", NEARLY_EQUAL, ids=str)
@pytest.mark.parametrize(
    "settings", [{"top_p": 0.5}, {"temperature": 0.5, "top_p": 0.3}, {"top_k": 1}, {"top_k": 2, "top_p": 0.4}], ids=str
)
@pytest.mark.parametrize("others", [0, 600])
def test_logits_decide_between_tokens_of_one_probability(logits, settings, others):
    logits_V = np.concatenate([np.array(logits, np.float32), np.full(others, -50, np.float32)])
    probabilities = distribution(logits_V, Sampling(**settings))
    np.testing.assert_array_equal(probabilities > 0, reference(logits_V, settings, []) > 0)
    assert np.flatnonzero(probabilities).tolist() == [1]
    assert np.flatnonzero(distribution(logits_V[::-1].copy(), Sampling(**settings))).tolist() == [others]


def test_logits_decide_in_a_nucleus_of_thousands():
    """Logits from 0 to 1e-20 all weigh 1, and half of them are wanted."""
    logits_V = np.random.default_rng(0).permutation(3000).astype(np.float32) * np.float32(1e-20 / 3000)
    kept = distribution(logits_V, Sampling(top_p=0.5)) > 0
    assert kept.sum() == 1500
    assert logits_V[kept].min() > logits_V[~kept].max()


def test_a_temperature_that_makes_all_equal_changes_no_order():
    logits_V = random_logits(0, 3000)
    kept = distribution(logits_V, Sampling(temperature=1e30, top_p=0.25)) > 0
    assert kept.sum() == 750
    assert logits_V[kept].min() > logits_V[~kept].max()


def test_scores_that_were_rounded_to_one_value():
    logits_V = np.array([1e-30, 3e-30, 2e-30, 1.0], np.float32)
    scores_V = np.array([0.5, 0.5, 0.5, 0.1], np.float32)
    assert likeliest(scores_V, 2, logits_V).tolist() == [1, 2]
    assert likeliest(scores_V, 4, logits_V).tolist() == [1, 2, 0, 3]
    assert likeliest(scores_V, 4).tolist() == [0, 1, 2, 3]


def test_ruled_out_tokens_are_never_drawn():
    logits_V = np.full(100, -np.inf, np.float32)
    logits_V[[20, 60]] = 1.0, 2.0
    for settings in SETTINGS:
        sampler = Sampler(Sampling(seed=0, **settings))
        assert {sampler.draw(logits_V, GENERATED) for _ in range(200)} <= {20, 60}
    assert likeliest(logits_V, 5).tolist() == [60, 20]


def test_penalties():
    logits_V = np.array([2.0, -2.0, 3.0, -3.0], np.float32)
    np.testing.assert_array_equal(penalised(logits_V, [0, 1, 1], 2.0), np.array([1.0, -4.0, 3.0, -3.0], np.float32))
    np.testing.assert_array_equal(penalised(logits_V, [0, 1, 1], 2.0, 0.5), np.array([0.5, -4.5, 3.0, -3.0], np.float32))
    np.testing.assert_array_equal(logits_V, [2.0, -2.0, 3.0, -3.0])
    assert penalised(logits_V, [0, 1]) is logits_V
    assert penalised(logits_V, [], 2.0) is logits_V


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=50),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)
@example(logits=[0.0, 2.2e-29], temperature=1.0, top_k=0, top_p=0.5, min_p=0.0)
def test_any_settings_leave_a_distribution(logits, temperature, top_k, top_p, min_p):
    """What remains always holds a likeliest token and is never empty; with a single cut, it is what the cut says."""
    logits_V = np.array(logits, np.float32)
    probabilities = distribution(logits_V, Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    assert probabilities.sum() == pytest.approx(1)
    assert probabilities.max() == probabilities[logits_V.argmax()]
    kept = probabilities > 0
    assert logits_V[kept].min() >= logits_V[~kept].max(initial=-np.inf)
    whole = distribution(logits_V, Sampling(temperature=temperature))
    nucleus = distribution(logits_V, Sampling(temperature=temperature, top_p=top_p)) > 0
    assert whole[nucleus].sum() >= top_p - 1e-9
    assert whole[nucleus].sum() - whole[nucleus].min() < top_p + 1e-9  # one fewer would not do


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature must be at least 0, not -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k must be at least 1, or 0 for all tokens, not -1"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, not 0.0"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 1.5}, "min_p must be from 0 to 1, not 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be from 1e-6 to 1e6, not 0.0"),
        ({"presence_penalty": float("inf")}, "presence_penalty must be from -1e6 to 1e6, not inf"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(OptionError, match=message):
        Sampling(**settings)
