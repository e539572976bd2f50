"""The folder of encoded pictures: it deletes nothing that it has not made, and fails no request, whatever lies in it."""

import hashlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mcv_runtime import OutputError, load
from mcv_runtime.vision.picture_store import PictureStore

pytestmark = pytest.mark.waits
DEMO = Path(__file__).parents[2] / "models" / "tiny" / "demo.png"
KEY, LIMIT = "ab" * 32, 1_000_000
NAME = f"{KEY}.mcvpicture"
WRITER = """
import os, sys, numpy as np
from mcv_runtime.vision.picture_store import PictureStore
def at_fsync(fd):
    {}
os.fsync = at_fsync
PictureStore(sys.argv[1], 1_000_000).put("ab" * 32, np.ones((4, 8), np.float32))
"""


def embeds(value, rows=4, columns=8):
    return np.full((rows, columns), value, np.float32)


def entry(values, key=KEY):
    """An entry as somebody else may write it, its digest right."""
    values = np.ascontiguousarray(values, "<f4")
    digest = hashlib.sha256(f"{key} {values.shape}".encode() + values.tobytes()).digest()
    return struct.pack("<8s32sQQ", b"MCVPIC01", digest, *values.shape) + values.tobytes()


def writer(folder, at_fsync):
    """A process that writes an entry, and does something in the middle of it."""
    command = [sys.executable, "-c", WRITER.format(at_fsync), str(folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def test_what_it_has_not_made_stays(tmp_path):
    """However old, and whatever it is called; and the limit holds nevertheless."""
    mine = [
        ".env", ".netrc", ".gitignore", ".bashrc", ".a.b", ".DS_Store", f".{KEY}", f".{KEY}.0123", KEY, f"{NAME}.bak",
        "holiday.mcvpicture", ".mcvpicture", f"{KEY.upper()}.mcvpicture", f".{KEY}.0123456789abcdef.swp", "notes.txt",
    ]  # fmt: skip
    for name in mine:
        (tmp_path / name).write_text("precious")
    folders = [".git", "cd" * 32 + ".mcvpicture", f".{KEY}.0123456789abcdef"]
    for name in folders:
        (tmp_path / name).mkdir()
    (tmp_path / f".{KEY}.aaaaaaaaaaaaaaaa").symlink_to(tmp_path / ".env")
    (tmp_path / f"{'ef' * 32}.mcvpicture").symlink_to(tmp_path / ".env")
    before = sorted(path.name for path in tmp_path.iterdir())
    for path in tmp_path.iterdir():
        os.utime(path, (0, 0), follow_symlinks=False)
    store = PictureStore(tmp_path, 3000)
    for number in range(40):
        store.put(f"{number:064x}", embeds(number, 10, 10))
    made = [path for path in tmp_path.iterdir() if path.name not in before]
    assert sorted(path.name for path in tmp_path.iterdir() if path not in made) == before
    assert {path.name for path in made} == {f"{number:064x}.mcvpicture" for number in range(34, 40)}
    assert sum(path.stat().st_size for path in made) <= 3000
    assert all((tmp_path / name).read_text() == "precious" for name in mine)


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder", "a link", "a link out", "a large file"])
def test_what_is_no_entry_is_one_line_and_stays(tmp_path, caplog, kind):
    path, outside = tmp_path / "cache" / NAME, tmp_path / "outside"
    store = PictureStore(path.parent, LIMIT)
    outside.write_bytes(entry(embeds(1)))
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a large file":
        with path.open("wb") as file:
            file.write(entry(embeds(1)))
            file.truncate(6 << 30)
    else:
        path.symlink_to({"a device": Path("/dev/zero"), "a link": path, "a link out": outside}[kind])
    assert store.get(KEY) is None
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    caplog.clear()
    store.put(KEY, embeds(2))
    if kind == "a large file":  # is of this user and has the name: it was an entry
        np.testing.assert_array_equal(store.get(KEY), embeds(2))
    else:
        assert store.get(KEY) is None
        assert os.path.lexists(path)
        assert sorted(found.name for found in path.parent.iterdir()) == [NAME]
    assert outside.read_bytes() == entry(embeds(1))


@pytest.mark.parametrize(
    "values",
    [embeds(np.nan), embeds(np.inf), embeds(1, rows=3), embeds(1, rows=5), embeds(1, rows=0), embeds(1, columns=7), embeds(1)],
    ids=["nan", "inf", "a row less", "a row more", "no rows", "a column less", "right"],
)
def test_only_what_fits_is_taken(tmp_path, values):
    store = PictureStore(tmp_path, LIMIT)
    right = np.array_equal(values, embeds(1))
    (tmp_path / NAME).write_bytes(entry(values))
    assert (store.get(KEY, (4, 8)) is not None) == right
    assert (tmp_path / NAME).exists() == right
    store.put(KEY, values)
    assert (store.get(KEY, (4, 8)) is not None) == right


@pytest.mark.parametrize("size", [0, 1, 8, 55, 56])
def test_an_entry_that_is_too_short(tmp_path, size):
    store = PictureStore(tmp_path, LIMIT)
    (tmp_path / NAME).write_bytes(entry(embeds(1))[:size])
    assert store.get(KEY) is None
    assert not (tmp_path / NAME).exists()


def test_sizes_of_a_liar_take_no_memory(tmp_path):
    store = PictureStore(tmp_path, LIMIT)
    for rows, columns in [(1 << 62, 1 << 62), (1 << 40, 1), (0, 1 << 63)]:
        (tmp_path / NAME).write_bytes(struct.pack("<8s32sQQ", b"MCVPIC01", b"x" * 32, rows, columns))
        assert store.get(KEY) is None


def test_a_folder_that_is_only_read_fails_nothing(tmp_path, monkeypatch, caplog):
    """Entries that are right serve, damaged ones and new ones are a line in the log."""
    store = PictureStore(tmp_path, LIMIT)
    store.put(KEY, embeds(1))
    (tmp_path / f"{'cd' * 32}.mcvpicture").write_bytes(b"garbage")

    def refuse(*arguments, **options):
        raise OSError(30, "Read-only file system")

    for name in ("utime", "unlink", "replace"):
        monkeypatch.setattr(os, name, refuse)
    system_open = os.open
    monkeypatch.setattr(
        os, "open", lambda path, flags, *more: refuse() if flags & os.O_WRONLY else system_open(path, flags, *more)
    )
    np.testing.assert_array_equal(store.get(KEY), embeds(1))
    assert not caplog.records
    assert store.get("cd" * 32) is None
    store.put("ef" * 32, embeds(3))
    assert [record.getMessage().rpartition(" (")[0] or record.getMessage() for record in caplog.records] == [
        f"cached picture {tmp_path / ('cd' * 32)}.mcvpicture is damaged; encoding it again",
        f"the picture cache {tmp_path} cannot be written",
    ]


@pytest.mark.waits
def test_a_full_disk_fails_nothing_and_leaves_nothing(tmp_path):
    code = """
import resource, sys, numpy as np
from mcv_runtime.vision.picture_store import PictureStore
store = PictureStore(sys.argv[1], 1_000_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
store.put("cd" * 32, np.ones((100, 100), np.float32))
store.put("ab" * 32, np.ones((4, 8), np.float32))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, f"the picture cache {tmp_path} cannot be written (File too large)\n")
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


@pytest.mark.waits
def test_what_a_killed_process_left_is_deleted_by_the_next(tmp_path):
    writer(tmp_path, "os.kill(os.getpid(), 9)").communicate()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(f".{KEY}.")
    assert left.stat().st_size > 0
    PictureStore(tmp_path, LIMIT).put("cd" * 32, embeds(1))
    assert [path.name for path in tmp_path.iterdir()] == [f"{'cd' * 32}.mcvpicture"]


@pytest.mark.waits
def test_what_a_process_is_writing_stays_and_counts(tmp_path):
    with writer(tmp_path, "print(flush=True), sys.stdin.read()") as busy:
        busy.stdout.readline()
        (partial,) = tmp_path.iterdir()
        store = PictureStore(tmp_path, 3 * partial.stat().st_size)
        for number in range(3):
            store.put(f"{number:064x}", embeds(number))
        assert partial in tmp_path.iterdir()
        assert [store.get(f"{number:064x}") is not None for number in range(3)] == [False, True, True]
        busy.stdin.close()
    assert busy.returncode == 0
    assert not partial.exists()
    np.testing.assert_array_equal(store.get(KEY), embeds(1))


def test_an_entry_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(os.fstat(fd).st_size), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("renamed"), replace(*paths)))
    PictureStore(tmp_path, LIMIT).put(KEY, embeds(1))
    assert done == [len(entry(embeds(1))), "renamed"]
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600


def test_whose_folder_and_whose_entries(tmp_path, caplog, monkeypatch):
    tmp_path.chmod(0o777)
    with pytest.raises(OutputError, match="anybody may write"):
        PictureStore(tmp_path, LIMIT)
    tmp_path.chmod(0o770)
    store = PictureStore(tmp_path, LIMIT)
    store.put(KEY, embeds(1))
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert store.get(KEY) is None
    assert "another user's" in caplog.text
    store.put(KEY, embeds(2))
    PictureStore(tmp_path, 200).put("cd" * 32, embeds(3))
    monkeypatch.setattr(os, "geteuid", lambda: user)
    np.testing.assert_array_equal(store.get(KEY), embeds(1))  # neither replaced nor deleted


def test_a_poisoned_cache_changes_no_answer(tmp_path):
    ask = lambda: load(threads=1, cache_dir=tmp_path).ask(DEMO, "What does the text say?", max_new_tokens=6).text  # noqa: E731
    assert ask() == "HELLO"
    (path,) = tmp_path.iterdir()
    right = path.read_bytes()
    values = np.frombuffer(right, "<f4", offset=56).reshape(64, 128)
    for wrong in (values[:63], np.vstack([values, values[:1]]), values[:, :127], values * np.nan):
        path.write_bytes(entry(wrong, path.stem))
        assert ask() == "HELLO"
        assert path.read_bytes() == right
