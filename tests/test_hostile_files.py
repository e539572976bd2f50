"""Damaged files of every kind, each read in a process of its own; `benchmarks/hostile_files.py` reads many more."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mcv_runtime import OptionError

ROOT = Path(__file__).parents[1]
KINDS = {"manifests": 30, "graphs": 8, "tokenizers": 10, "checkpoints": 6, "pictures": 60, "videos": 15, "chats": 25}
KINDS |= {"cache_entries": 15, "rows": 8, "documents": 40, "tables": 40}
FOUND = [("chats", 2027, [84, 111]), ("chats", 5, [0, 8]), ("checkpoints", 2028, [47]), ("checkpoints", 2030, [40, 43])]
"""Kind, seed and numbers of what was once read wrongly."""


@pytest.fixture(scope="module")
def benchmarks():
    """Lets the programs there be imported."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


def wrong_of(kind, seed, tmp_path, *which):
    """What was read wrongly of a kind; no file is given up before ten minutes of a processor."""
    out = tmp_path / "found.json"
    program = [sys.executable, str(ROOT / "benchmarks" / "hostile_files.py"), "--kind", kind, "--seed", str(seed), *which]
    done = subprocess.run([*program, "--limit-s", "600", "--out", str(out)], capture_output=True, text=True, check=False)
    assert out.exists(), done.stderr
    found = json.loads(out.read_text(encoding="utf-8"))["kinds"][kind]
    assert sum(found["endings"].values()) > 0
    return [one for one in found["wrong"] if one["ending"] != "slow"]


@pytest.mark.fuzz
@pytest.mark.waits
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each file is read in a fork")
@pytest.mark.parametrize("kind", KINDS)
def test_each_ends_in_an_answer_or_in_one_line(kind, drawn_seed, tmp_path):
    assert wrong_of(kind, drawn_seed, tmp_path, "--count", str(KINDS[kind])) == []


@pytest.mark.waits
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each file is read in a fork")
@pytest.mark.parametrize(("kind", "seed", "numbers"), FOUND)
def test_what_was_found_once(kind, seed, numbers, tmp_path):
    assert wrong_of(kind, seed, tmp_path, "--only", *map(str, numbers)) == []


@pytest.mark.waits
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each file is read in a fork")
def test_whatever_else_happens_is_noticed(benchmarks):
    from hostile.guarded import run

    def refuse(text):
        raise OptionError(text)

    def spin():
        while True:
            pass

    ends = {
        "done": lambda: 5,
        "refused": lambda: refuse("one line"),
        "untidy": lambda: refuse("a long line" * 1000),
        "traceback": lambda: [][0],
        "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "hang": spin,
    }
    for ending, read in ends.items():
        assert run(read, limit_s=1 if ending == "hang" else 600, memory_gb=8).ending == ending


def test_a_call_that_reaches_out_is_noticed(benchmarks):
    import reaching_out

    mark, own = reaching_out.MARK, '12 openat(AT_FDCWD, "/a/clip.mp4", O_RDONLY) = 3'
    before = '12 openat(AT_FDCWD, "/secret", O_RDONLY) = 3'
    trace = [before, f'12 stat("{mark}0", 0x7f) = -1 ENOENT', own, '12 openat(AT_FDCWD, "/usr/lib/x.so.1", O_RDONLY) = 3']
    assert reaching_out.calls("\n".join(trace), ["/a/clip.mp4"]) == []
    for call in (
        before,
        "12 connect(4, {sa_family=AF_INET}, 16) = 0",
        '12 execve("/usr/bin/gs", ["gs"], 0x7f) = 0',
        '12 openat(AT_FDCWD, "/a/clip.mp4", O_WRONLY|O_CREAT) = 3',
        "[pid    13] socket(AF_INET, SOCK_STREAM, 0) = 3",
    ):
        (said,) = reaching_out.calls("\n".join([*trace, call]), ["/a/clip.mp4"])
        assert call in said


def test_nothing_was_wrong_in_the_runs_whose_figures_are_kept():
    def kept(name):
        return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))

    found = kept("hostile-files")["kinds"]
    assert found.keys() == KINDS.keys()
    for kind, result in found.items():
        assert sum(result["endings"].values()) >= 10 * KINDS[kind]
        assert result["wrong"] == []
        assert result["longest_cpu_s"] < 5
    killed = kept("kills")
    assert killed.keys() == {"batches", "builds", "full_disk", "two_at_once"}
    assert not any(part["wrong"] for part in killed.values())
    watched = kept("reaching-out")
    assert (watched["files"], watched["read"], watched["packets"], watched["wrong"]) == (500, 500, 0, [])
