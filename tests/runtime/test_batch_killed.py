"""A batch from table to table that is killed, wherever it is: no row is lost, repeated or damaged."""

import json
import subprocess
import sys

import pyarrow as pa
import pytest
from pyarrow import parquet

pytestmark = [pytest.mark.waits, pytest.mark.skipif(sys.platform == "win32", reason="kills of POSIX")]
ROWS = 250
RUN = """
import sys
from pathlib import Path
from mcv_runtime import writing
from mcv_runtime.batch import answer_table, answers, whole_file
from mcv_runtime.batch.rows import Defaults
from mcv_runtime.command.batch_cli import answer_batch
from mcv_runtime.decoding.job import Job
from mcv_runtime.decoding.ticket import Ticket
from mcv_runtime.request.answer import Answer, Timings
from mcv_runtime.request.options import Options
from mcv_runtime.request.patience import Patience

class Echo:
    "Answers with the prompt."
    def submit(self, request, **more):
        answer = Answer(
            text=request.prompt, tokens=(1, 2), stop_reason="stop", prompt_tokens=(), pictures=(), timings=Timings()
        )
        return Ticket(None, Job(pictures=(), patience=Patience(None, None), answer=answer, done=True))

def stopped(owner, name, times):
    "Has a function say so when it was called so often, and wait to be killed."
    real, left = getattr(owner, name), [times]
    def wrapped(*given, **more):
        result = real(*given, **more)
        left[0] -= 1
        if not left[0]:
            print("here", flush=True)
            sys.stdin.read()
        return result
    setattr(owner, name, wrapped)

folder, where, times = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if where:
    owner, name = where.split(".")
    owners = {"answers": answers.BatchOutput, "table": answer_table, "whole": whole_file, "writing": writing}
    stopped(owners[owner], name, times)
defaults = Defaults(prompt="", system=None, options=Options(), model="echo")
sys.exit(answer_batch(Echo(), folder / "in.parquet", folder / "out.parquet", defaults, 3))
"""


@pytest.fixture
def folder(tmp_path):
    put(tmp_path, range(ROWS))
    return tmp_path


def put(folder, numbers):
    numbers = list(numbers)
    table = pa.table({"id": [f"row {one}" for one in numbers], "prompt": [f"say {one}\n" * (one % 7 + 1) for one in numbers]})
    parquet.write_table(table, folder / "in.parquet", row_group_size=40)


def run(folder, where="", times=1):
    """The exit code; or, killed where it said that it was, -9."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder), where, str(times)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        if where:
            assert process.stdout.readline() == "here\n", process.stderr.read()
            process.kill()
        process.stdin.close()
        said = process.stderr.read()
    assert "Traceback" not in said, said
    return process.returncode


def found(folder):
    return [(row["row"], row["id"], row["answer"]) for row in parquet.read_table(folder / "out.parquet").to_pylist()]


def wanted(numbers):
    return [(at, f"row {one}", f"say {one}\n" * (one % 7 + 1)) for at, one in enumerate(numbers, 1)]


def test_no_row_is_lost_wherever_it_is_killed(folder):
    for where, times in [("answers.write", 1), ("answers.write", 17), ("answers.has", 5), ("answers.write", 100)]:
        assert run(folder, where, times) == -9
        assert not (folder / "out.parquet").exists()
    lines = [json.loads(line) for line in (folder / "out.parquet.rows").read_bytes().splitlines()]
    assert [line["row"] for line in lines] == list(range(1, 119))
    assert run(folder, "table._write") == -9  # the table is whole, under another name
    assert (folder / "out.parquet.partial").exists()
    assert run(folder, "whole.sync_folder") == -9  # the table is there, and so are its lines
    assert found(folder) == wanted(range(ROWS))
    assert run(folder) == 0
    assert found(folder) == wanted(range(ROWS))
    assert sorted(one.name for one in folder.iterdir()) == ["in.parquet", "out.parquet"]


def test_a_table_that_goes_on_is_whole_wherever_that_is_killed(folder):
    assert run(folder) == 0
    numbers = [*range(5, 100), 1000, *range(120, ROWS)]
    put(folder, numbers)  # some rows go, one is new
    for where, times in [("writing.sync", 1), ("whole.sync_folder", 1), ("answers.settle", 1), ("answers.write", 99)]:
        assert run(folder, where, times) == -9
        assert found(folder) == wanted(range(ROWS))
    assert run(folder) == 0
    assert found(folder) == wanted(numbers)
    assert sorted(one.name for one in folder.iterdir()) == ["in.parquet", "out.parquet"]
