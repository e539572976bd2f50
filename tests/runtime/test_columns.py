"""Rows of other people's tables, some columns at a time: what Ray Data, datasets and Spark hand over."""

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mcv_runtime import ColumnAnswerer, OptionError
from mcv_runtime.distributed.columns import assigned_cpus

DEMO = Path(__file__).parents[2] / "models" / "tiny" / "demo.png"
TEXT = "What does the text say?"


@pytest.fixture(scope="module")
def answerer():
    made = ColumnAnswerer(prompt=TEXT, options={"max_new_tokens": 20}, folder=DEMO.parent, threads=1)
    yield made
    made.close()


def test_columns_in_columns_out_and_an_error_for_a_row_that_makes_no_sense(answerer):
    data = DEMO.read_bytes()
    bad = ["gone.png", "https://a.example/a.png", "s3://a/b.png", data[:99]]
    columns = {
        "image": ["demo.png", data, {"bytes": data, "path": None}, *bad],
        "max_new_tokens": [None, 20, 1, None, None, None, None],
        "label": [1, 2, 3, 4, 5, 6, 7],
    }
    found = answerer(columns)
    assert {name: found[name] for name in columns} == columns
    assert found["answer"][:2] == ["HELLO", "HELLO"]
    assert (found["stop_reason"][2], found["tokens"][2]) == ("length", 1)
    assert found["error"][:3] == ["", "", ""]
    words = ["cannot be read", "no path of a file", "--fetch", "cannot be decoded"]
    assert all(word in line for word, line in zip(words, found["error"][3:], strict=True))
    assert found["answer"][3:] == [""] * 4 and found["tokens"][3:] == [0] * 4
    assert {len(column) for column in found.values()} == {7}


def test_columns_of_numpy_as_ray_data_has_them(answerer):
    columns = {
        "image": np.array([str(DEMO), DEMO.read_bytes()], object),
        "max_new_tokens": np.array([1, 20]),
        "prompt": np.array([TEXT, TEXT]),
        "temperature": np.array([np.nan, np.nan]),
    }
    found = answerer(columns)
    assert (found["error"], found["answer"][1], found["tokens"][0]) == (["", ""], "HELLO", 1)
    assert answerer({"image": [], "prompt": []})["answer"] == []


def test_pickled_it_is_opened_again_where_it_is_called(answerer):
    answerer({"prompt": ["Hi"], "max_new_tokens": [1]})
    other = pickle.loads(pickle.dumps(answerer))
    assert other._opened is None
    assert other({"image": ["demo.png"]})["answer"] == ["HELLO"]
    other.close()


def test_columns_that_make_no_sense_are_refused_at_once(answerer):
    with pytest.raises(OptionError, match="no column image"):
        answerer({"label": [1]})
    with pytest.raises(OptionError, match="column error already"):
        answerer({"prompt": ["Hi"], "error": [""]})
    with pytest.raises(OptionError, match="colour"):
        ColumnAnswerer(options={"colour": "red"})
    assert "each_page" in answerer({"prompt": ["Hi"], "each_page": [True]})["error"][0]


@pytest.mark.parametrize(
    ("mode", "resources", "cpus"), [("worker", {"CPU": 3.0}, 3), ("worker", {"CPU": 0.5}, None), ("driver", {}, None)]
)
def test_threads_are_the_cpus_that_ray_gives(monkeypatch, mode, resources, cpus):
    context = SimpleNamespace(worker=SimpleNamespace(mode=mode), get_assigned_resources=lambda: resources)
    ray = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context, WORKER_MODE="worker")
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert assigned_cpus() == cpus
