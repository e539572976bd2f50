"""Errors against values worked out by hand."""

import math

import numpy as np
import pytest

from mcv_calibration.distances import DistributionErrors, TensorErrors, cosines, divergences


def test_divergence_of_two_coins():
    fair, biased = np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert divergences(fair, biased + 7) == pytest.approx([expected], abs=1e-12)  # a constant changes no distribution
    assert divergences(fair, fair).tolist() == [0]


def test_agreement_and_histogram():
    errors = DistributionErrors()
    logits = np.array([[2.0, 1, 0], [0, 1, 2]])
    errors.add(logits, logits[[0, 0]])
    result = errors.result()
    assert result.agreement == 0.5
    assert sum(result.divergences.counts) == result.tokens == 2
    assert result.divergences.counts[0] == 1


def test_a_tenth_of_noise_is_20_decibels():
    errors = TensorErrors()
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    errors.add(x, x * np.float32(1.1))
    result = errors.result()
    assert result.relative == pytest.approx(0.1, rel=1e-5)
    assert result.sqnr_db == pytest.approx(20, abs=1e-3)
    assert (result.vectors, result.cosine_min) == (10, pytest.approx(1, abs=1e-9))


def test_cosines():
    a = np.array([[1.0, 0], [1, 0], [3, 4], [0, 0], [0, 0], [0.1, 0.3]])
    b = np.array([[0, 2.0], [-5, 0], [4, 3], [0, 0], [0, 1], [0.1, 0.3]])
    assert cosines(a, b).tolist() == pytest.approx([0, -1, 0.96, 1, 0, 1])
    assert cosines(a, b)[5] == 1


def test_numbers_that_are_none_are_the_worst_of_errors():
    logits = np.zeros((1, 3), np.float32)
    assert divergences(logits, logits * np.nan)[0] > 1e5
    errors = TensorErrors()
    errors.add(np.ones((1, 2)), np.array([[np.nan, 1]]))
    assert errors.result().relative > 1e5
    assert errors.result().cosine_min == -1
