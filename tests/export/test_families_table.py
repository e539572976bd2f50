"""The README's table of families is the one that the families make, and it says what their plans say."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from mcv_export.checkpoint import open_checkpoint
from mcv_export.families import families, recognise
from mcv_export.plan import Family


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("families_table")


def test_readme_has_the_table(script: ModuleType) -> None:
    readme = (script.ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count(script.START) == readme.count(script.END) == 1, "README.md lacks the markers of the table of families"
    table = readme.partition(script.START)[2].partition(script.END)[0].strip()
    assert table == script.table().strip(), "run `python tests/families_table.py --write`"


def test_write_changes_only_the_table(script: ModuleType, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{script.START}\nold\n{script.END}\nafter\n", encoding="utf-8")
    script.write(readme)
    assert readme.read_text(encoding="utf-8") == f"before\n{script.START}\n{script.table()}{script.END}\nafter\n"
    readme.write_text("no markers", encoding="utf-8")
    with pytest.raises(SystemExit, match="families"):
        script.write(readme)


def test_every_row_is_whole(script: ModuleType) -> None:
    rows = script.table().splitlines()
    assert len(rows) == 2 + len(families())
    assert {row.count("|") for row in rows} == {len(script.HEAD) + 1}


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_a_row_says_what_the_plan_says(family: Family, golden_root: Path) -> None:
    folder = golden_root / family.name / "checkpoint"
    if not (folder / "model.safetensors").exists():
        pytest.skip("no golden checkpoint of this family")
    checkpoint = open_checkpoint(folder)
    assert recognise(checkpoint.config) is family
    assert checkpoint.config["architectures"][0] in family.description.config
    plan, about = family.plan(checkpoint), family.description
    assert (plan.video is not None) == ("video" in about.inputs)
    assert plan.video is None or "video" not in about.left_out
    assert all(mode in about.inputs for mode in plan.image.downsample)
