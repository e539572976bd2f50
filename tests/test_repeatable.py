"""Every run of the tests says the same."""

import importlib.util
import random
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def drawn():
    examples = []

    @given(st.integers(), st.floats(), st.text())
    def collect(number, fraction, text):
        examples.append(repr((number, fraction, text)))

    collect()
    return examples


@pytest.mark.skipif(not settings.default.derandomize, reason="new examples are wanted")
def test_examples_do_not_hang_on_what_ran_before(tmp_path):
    """On modules that were imported, on random numbers that were drawn, on what earlier runs have found."""
    first = drawn()
    path = tmp_path / "numbers_and_words.py"
    path.write_text("".join(f"A{n}, B{n}, C{n} = {n * 7919}, {n}.25, 'word {n}'\n" for n in range(300)))
    sys.modules[path.stem] = importlib.util.module_from_spec(importlib.util.spec_from_file_location(path.stem, path))
    try:
        random.random()
        assert drawn() == first
    finally:
        del sys.modules[path.stem]
    assert settings.default.database is None
    assert settings.default.deadline is None


def test_what_waits_is_marked():
    """Files that start processes or threads say which of their tests `make stress` runs."""
    starts = re.compile(r"\b(subprocess\.(run|Popen)|ThreadPoolExecutor|threading\.(Thread|Timer)|pty\.openpty)\(")
    files = {path.name: path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py")}
    assert [name for name, text in files.items() if starts.search(text) and "mark.waits" not in text] == []
