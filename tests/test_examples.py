"""The examples, run as far as what they show is installed here."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import parquet

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "models" / "tiny" / "demo.png"


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for at in range(3):
        shutil.copy(DEMO, folder / f"{at}.png")
    return folder


@pytest.mark.waits
@pytest.mark.parametrize(("name", "package"), [("ray_data", "ray"), ("datasets_map", "datasets"), ("pandas_udf", "pyspark")])
def test_each_picture_of_a_folder_is_answered(name, package, pictures, tmp_path):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"no {package} here")
    out = tmp_path / "answers.parquet"
    command = [sys.executable, ROOT / "deploy" / "examples" / f"{name}.py", pictures, out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = parquet.read_table(out).to_pylist()
    assert [(row["answer"], row["error"]) for row in rows] == [("HELLO", "")] * 3


def test_frames_of_spark_are_answered_without_it():
    pandas = pytest.importorskip("pandas")
    spec = importlib.util.spec_from_file_location("pandas_udf", ROOT / "deploy" / "examples" / "pandas_udf.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    frame = pandas.DataFrame({"path": ["a", "b"], "content": [DEMO.read_bytes(), b"none"]})
    (found,) = example.answer(iter([frame]))
    assert found["answer"].tolist() == ["HELLO", ""]
    assert list(found) == [column.split()[0] for column in example.SCHEMA.split(", ")]
