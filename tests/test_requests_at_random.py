"""Requests of all kinds end in an answer or in an error of ours; `benchmarks/random_requests.py` makes many more."""

import json
import random
import sys
from pathlib import Path

import pytest

from mcv_runtime import load

ROOT = Path(__file__).parents[1]
REQUESTS = 300


@pytest.fixture(scope="module")
def requests():
    """The module that makes them."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        import random_requests
    finally:
        del sys.path[0]
    return random_requests


@pytest.fixture(scope="module")
def engine():
    return load(threads=1, memory_mb=128)


@pytest.mark.fuzz
def test_every_request_ends_as_it_should(requests, engine, drawn_seed, tmp_path):
    rng = random.Random(drawn_seed)
    ends = [requests.attempt(engine, rng, tmp_path) for _ in range(REQUESTS)]
    assert {"stop", "length", "OptionError", "ImageError", "PromptError"} <= set(ends)
    answer = engine.ask(ROOT / "models" / "tiny" / "demo.png", "What does the text say?")
    assert (answer.text, answer.stop_reason) == ("HELLO", "stop")


def test_anything_else_is_noticed(requests, tmp_path):
    class Broken:
        def __getattr__(self, name):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        requests.attempt(Broken(), random.Random(0), tmp_path)


def test_ten_thousand_of_them_leaked_nothing():
    """In the run whose figures are kept."""
    kept = json.loads((ROOT / "benchmarks" / "results" / "random-requests.json").read_text(encoding="utf-8"))
    assert kept["requests"] == sum(kept["ended"].values()) == 10_000
    assert kept["growth_from_third_to_fourth_quarter_percent"] < 2
