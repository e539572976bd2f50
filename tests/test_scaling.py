"""The simulation of servers and batches: it takes what its costs say."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COSTS = {
    "fits": {
        "slices": {"factors": [0.5, 1.0]},
        "prompt": {"factors": [0.1, 0.01, 1e-5]},
        "step": {"factors": [0.0, 0.0, 1e-4]},
    },
    "points": {"step": [{"rows": rows, "context": 100, "seconds": 0.05 + 0.01 * rows + 1e-2 * rows} for rows in (1, 2, 4, 16)]},
}


@pytest.fixture(scope="module")
def simulation():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import scaling_simulation

    sys.path.remove(str(ROOT / "benchmarks"))
    return scaling_simulation


def work(simulation, **changes):
    usual = {"slices": 3, "prompt": 200, "prompt_again": 0, "known_again": 0, "questions": 1, "lengths": {"10": 1}}
    return simulation.Work(**usual | changes)


def test_one_client_takes_the_sum_of_the_costs(simulation):
    costs = simulation.Costs(COSTS)
    found = simulation.simulate(costs, work(simulation), 1, 1)
    first = 0.5 + 3 + 2 * 0.1 + 2 + 1e-5 * 200**2 / 2  # in two pieces: nothing is known of its pace yet
    assert found["first_token_ms"]["p50"] == pytest.approx(1e3 * first, abs=0.01)
    steps = sum(0.05 + 0.01 + 1e-4 * (200 + made) for made in range(1, 10))
    assert 1 / found["answers_per_s"] == pytest.approx(first + steps)


def test_rows_together_take_less_than_one_by_one(simulation):
    costs = simulation.Costs(COSTS)
    alone, eight = (simulation.simulate(costs, work(simulation, lengths={"50": 1}), count, 500) for count in (1, 8))
    assert 1 < eight["answers_per_s"] / alone["answers_per_s"] < 8


def test_nobody_who_decodes_waits_for_more_than_a_slice(simulation):
    found = simulation.simulate(simulation.Costs(COSTS), work(simulation, slices=9, lengths={"50": 1}), 4, 500)
    one_slice, step_of_four = 1.5, 0.05 + 0.04 + 4 * 1e-4 * 250
    assert found["between_tokens_ms"]["p99"] <= 1e3 * (one_slice + step_of_four)


def test_what_is_known_is_not_read_again(simulation):
    known = work(simulation, questions=4, prompt_again=220, known_again=190)
    found = simulation.simulate(simulation.Costs(COSTS), known, 1, 100)
    assert found["first_token_known_picture_ms"]["p50"] == pytest.approx(
        1e3 * (0.1 + 0.3 + 1e-5 * (220**2 - 190**2) / 2), abs=0.01
    )


def test_slower_machines_take_longer(simulation):
    usual, slow = (simulation.simulate(simulation.Costs(COSTS, by, by), work(simulation), 4, 100) for by in (1.0, 2.0))
    assert usual["answers_per_s"] / slow["answers_per_s"] == pytest.approx(2, rel=0.05)


def test_the_kept_simulation_is_near_what_was_measured(simulation):
    """The files belong together, and SCALING.md says what they say."""
    kinds = ("scaling-costs", "load", "scaling")
    costs, load, kept = (json.loads((RESULTS / f"{kind}-minicpmv4_6.json").read_text(encoding="utf-8")) for kind in kinds)
    again = simulation.checked(costs, load)
    assert again == kept["against_measured"]
    assert [run["clients"] for run in again["runs"]] == [1, 4, 16]
    said = (ROOT / "benchmarks" / "SCALING.md").read_text(encoding="utf-8")
    for run, measured in zip(again["runs"], load["runs"], strict=True):
        assert abs(run["off"]["answers_per_s"]) <= 0.15
        assert f"{measured['answers_per_s']:.3f}, {run['answers_per_s']:.3f}" in said
