"""CONTRIBUTING's picture of the runtime is the one that its imports make."""

from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("rooms_picture")


def test_contributing_has_the_picture(script: ModuleType) -> None:
    page = (script.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    drawn = page.partition(script.START)[2].partition(script.END)[0].strip()
    assert drawn == script.picture().strip(), "run `python tests/rooms_picture.py --write`"


def test_an_arrow_that_follows_from_others_is_left_out(script: ModuleType) -> None:
    arrows = {("a", "b"), ("b", "c"), ("a", "c"), ("d", "c")}
    assert set(script._direct(arrows)) == {("a", "b"), ("b", "c"), ("d", "c")}
