"""The answers of a batch on disk: one writer, a full disk, signals, and names that lead elsewhere."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mcv_runtime import OutputError
from mcv_runtime.batch.answers import BatchOutput
from mcv_runtime.batch.rows import BatchRow

pytestmark = [pytest.mark.waits, pytest.mark.skipif(sys.platform == "win32", reason="pipes, locks and signals of POSIX")]
DEMO = str(Path(__file__).parents[2] / "models" / "tiny" / "demo.png")
MAIN = "from mcv_runtime.command.cli import main; main()"
LIMITED = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2); {MAIN}"


def rows(count):
    asked = ("What does the text say?", "Describe the picture.")
    return [{"id": number, "image": DEMO, "prompt": asked[number % 2], "max_new_tokens": 3} for number in range(count)]


def put(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def batch(source, out, *more, code=MAIN):
    """A finished run: exit code and what it said behind the line about the demo model."""
    command = [sys.executable, "-c", code, *more, "--batch", str(source), "--out", str(out), "--batch-size", "1", "-t", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done.returncode, [line for line in done.stderr.splitlines() if "demo model" not in line]


class Fed:
    """A run that reads its rows from a pipe, and that has answered all but one and waits for the next."""

    def __init__(self, folder, out, rows):
        pipe = folder / "rows"
        os.mkfifo(pipe)
        command = [sys.executable, "-c", MAIN, "--batch", str(pipe), "--out", str(out), "--batch-size", "1", "-t", "1"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.pipe = pipe.open("w")
        for row in rows:
            self.pipe.write(f"{json.dumps(row)}\n")
        self.pipe.flush()
        while not out.exists() or out.read_bytes().count(b"\n") < len(rows) - 1:  # one more is asked before the first is due
            assert self.process.poll() is None

    def end(self):
        self.pipe.close()
        stderr = self.process.communicate()[1]
        return self.process.returncode, [line for line in stderr.splitlines() if "demo model" not in line]


def written(number, digest="d", text="x"):
    return {"row": number, "answer": text, "request": digest}


def row(number, digest="d"):
    return BatchRow(number=number, digest=digest)


def test_a_second_run_is_refused_and_nothing_is_lost(tmp_path):
    (tmp_path / "link.jsonl").symlink_to("out.jsonl")
    out = tmp_path / "out.jsonl"
    first = Fed(tmp_path, out, rows(4))
    for name in (out, tmp_path / "link.jsonl"):
        before = out.read_bytes()
        second = batch(put(tmp_path / "other.jsonl", rows(2)), name)
        assert second == (2, [f"mcv-run: another mcv-run is writing {name}; wait for it, or name another file"])
        assert out.read_bytes()[: len(before)] == before
    assert first.end() == (0, ["mcv-run: 4 rows answered"])
    assert [row["id"] for row in read(out)] == [0, 1, 2, 3]
    assert batch(put(tmp_path / "all.jsonl", rows(4)), out) == (0, ["mcv-run: 0 rows answered, 4 were there"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGKILL, -9)])
def test_a_signal_leaves_what_is_written(tmp_path, number, code):
    out = tmp_path / "out.jsonl"
    run = Fed(tmp_path, out, rows(4))
    run.process.send_signal(number)
    ended, said = run.end()
    assert ended == code
    kept = len(read(out))
    assert kept == 3
    assert said == (
        [] if code < 0 else [f"mcv-run: stopped after {kept} rows; the same command goes on from there", "mcv-run: ended"]
    )
    assert batch(put(tmp_path / "all.jsonl", rows(6)), out) == (0, [f"mcv-run: {6 - kept} rows answered, {kept} were there"])
    assert [row["id"] for row in read(out)] == list(range(6))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.jsonl", "out.jsonl", "rows"]


@pytest.mark.parametrize("limit", [1, 400, 777])
def test_a_full_disk_is_one_line(tmp_path, limit):
    source, out = put(tmp_path / "in.jsonl", rows(6)), tmp_path / "out.jsonl"
    code, said = batch(source, out, str(limit), code=LIMITED)
    assert (code, said) == (2, [f"mcv-run: {out} cannot be written: File too large; the same command goes on from there"])
    kept = out.read_bytes().count(b"\n")
    assert batch(source, out) == (0, [f"mcv-run: {6 - kept} rows answered" + (f", {kept} were there" if kept else "")])
    assert [row["id"] for row in read(out)] == list(range(6))


def test_a_full_disk_while_rows_are_put_aside(tmp_path):
    source, out = put(tmp_path / "in.jsonl", rows(6)), tmp_path / "out.jsonl"
    assert batch(source, out)[0] == 0
    before = out.read_bytes()
    put(source, rows(6)[1:])
    code, said = batch(source, out, "300", code=LIMITED)
    assert (code, said) == (2, [f"mcv-run: {out} cannot be written: File too large"])
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert batch(source, out) == (0, ["mcv-run: 0 rows answered, 5 were there, 1 dropped, whose rows are no more"])
    assert [row["id"] for row in read(out)] == [1, 2, 3, 4, 5]


def test_rows_are_aside_on_the_disk_before_they_go(tmp_path, monkeypatch):
    out = put(tmp_path / "out.jsonl", [written(1), written(2, "e")])
    steps = []
    fsync, size = os.fsync, out.stat().st_size
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append((os.fstat(fd).st_ino, out.stat().st_size)), fsync(fd)))
    with BatchOutput(out) as output:
        output.settle()
        rest = (tmp_path / "out.jsonl.rest").stat().st_ino
        assert steps == [(rest, size), (tmp_path.stat().st_ino, size)]
        assert out.stat().st_size == 0
        output.write(written(1))
        output.finish()
        assert steps[2:] == [(out.stat().st_ino, size // 2)]
    assert not (tmp_path / "out.jsonl.rest").exists()


@pytest.mark.parametrize("name", ["out.jsonl.rest", "out.jsonl.rest.partial"])
@pytest.mark.parametrize("kind", ["a link", "a hard link", "a pipe", "a folder"])
def test_names_that_nobody_gave_lead_nowhere_else(tmp_path, name, kind):
    out = put(tmp_path / "out.jsonl", [written(1), written(2, "e")])
    mine = tmp_path / "mine.txt"
    mine.write_text("precious\n")
    path = tmp_path / name
    if kind == "a link":
        path.symlink_to(mine)
    elif kind == "a hard link":
        path.hardlink_to(mine)
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    try:
        with BatchOutput(out) as output:
            output.settle()
            output.finish()
    except OutputError as error:
        assert name in str(error)
        assert read(out) == [written(1), written(2, "e")]
        assert os.path.lexists(path)
    else:
        assert (name, kind) == ("out.jsonl.rest.partial", "a hard link")
    assert mine.read_text() == "precious\n"


def test_what_a_killed_run_left_of_putting_aside(tmp_path):
    out = put(tmp_path / "out.jsonl", [written(2, "e"), written(3, "f")])
    (tmp_path / "out.jsonl.rest.partial").write_text('{"row": 2, "te')
    put(tmp_path / "out.jsonl.rest", [written(9, "i")])
    with BatchOutput(out) as output:
        output.settle()
        assert not (tmp_path / "out.jsonl.rest.partial").exists()
        assert [output.earlier(row(1, digest)) for digest in "efi"] == [written(1, digest) for digest in "efi"]


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder", "somebody else's"])
def test_what_is_no_file_for_answers(tmp_path, kind):
    out = tmp_path / "out.jsonl"
    if kind == "a pipe":
        os.mkfifo(out)
    elif kind == "a device":
        out.symlink_to("/dev/null")
    elif kind == "a folder":
        out.mkdir()
    else:
        out.write_text("mine\n")
    words = {"a folder": "is a folder; name a file in it", "somebody else's": "something else"}.get(kind, "no plain file")
    with pytest.raises(OutputError, match=words), BatchOutput(out):
        pass
    if kind == "somebody else's":
        assert out.read_text() == "mine\n"
    with pytest.raises(OutputError, match="cannot be written"), BatchOutput(tmp_path / "a\0b"):
        pass


def test_the_lock_ends_with_the_run(tmp_path):
    out = tmp_path / "out.jsonl"
    with BatchOutput(out) as output, pytest.raises(OutputError, match="another mcv-run is writing"):
        output.settle()
        output.write(written(1))
        with BatchOutput(out):
            pass
    with BatchOutput(out) as output:
        assert output.has(row(1))
