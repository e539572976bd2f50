"""The folder of a build: what it replaces, two builds at once, what a killed one leaves, and a swap without a gap."""

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mcv_export import output_folder as module
from mcv_export.output_folder import check_output, claimed_folder, output_folder
from mcv_runtime.errors import CheckpointError, OutputError

CHECKPOINT = Path("/nowhere")


def make_bundle(folder: Path, text: str = "old") -> Path:
    (folder / "onnx").mkdir(parents=True)
    (folder / "onnx/a.onnx").write_text(text)
    (folder / "mcv.json").write_text('{"files": {"onnx/a.onnx": {}}}')
    return folder


def replace(out: Path, *, force: bool = True, checkpoint: Path = CHECKPOINT) -> None:
    with output_folder(out, checkpoint, force=force) as folder:
        make_bundle(folder / "made", "new")
        for path in (folder / "made").iterdir():
            path.rename(folder / path.name)
        (folder / "made").rmdir()


def content(out: Path) -> str:
    return (out / "onnx/a.onnx").read_text()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(params=["exchange", "two renames"])
def swaps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With renameat2, and without it."""
    if request.param == "two renames":
        monkeypatch.setattr(module.sys, "platform", "another")
    return str(request.param)


@pytest.mark.usefixtures("swaps")
def test_a_bundle_is_replaced_with_force_only(tmp_path: Path) -> None:
    out = tmp_path / "b"
    replace(out, force=False)
    (out / "onnx/a.onnx").write_text("old")
    with pytest.raises(OutputError, match="exists; choose another folder, or replace it with --force"):
        replace(out, force=False)
    assert content(out) == "old"
    replace(out)
    assert content(out) == "new"
    assert names(tmp_path) == ["b"]


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    replace(tmp_path / "b")
    assert content(tmp_path / "b") == "new"


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "photos": (lambda out: (out / "wedding.jpg").touch(), "exists and is no bundle"),
    "notes in a bundle": (lambda out: (make_bundle(out), (out / "notes.txt").touch()), "holds 'notes.txt'"),
    "a checkpoint in a bundle": (lambda out: (make_bundle(out), make_bundle(out / "ck")), "holds 'ck/mcv.json'"),
    "a linked folder": (lambda out: (make_bundle(out), (out / "data").symlink_to(out.parent)), "holds 'data'"),
    "a hidden file": (lambda out: (make_bundle(out), (out / "onnx/.git").touch()), "holds 'onnx/.git'"),
    "a damaged manifest": (lambda out: (make_bundle(out), (out / "mcv.json").write_text("{")), "cannot be read"),
    "a manifest of nothing": (lambda out: (make_bundle(out), (out / "mcv.json").write_text("[]")), "cannot be read"),
    "a manifest of no files": (lambda out: (make_bundle(out), (out / "mcv.json").write_text('{"files": {}}')), "holds 'onnx"),
    "a name for a terminal": (lambda out: (make_bundle(out), (out / "\x1b[31m").touch()), r"holds '\\x1b\[31m'"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_more_than_a_bundle_stays(name: str, tmp_path: Path) -> None:
    fill, reason = FOREIGN[name]
    out = tmp_path / "b"
    out.mkdir()
    fill_into = tmp_path / "filled"
    fill_into.mkdir() if name == "photos" else None
    fill(fill_into)
    out.rmdir()
    fill_into.rename(out)
    before = tree(tmp_path)
    for force in (True, False):
        with pytest.raises(OutputError, match=reason) as raised:
            replace(out, force=force)
        assert "--force" not in str(raised.value), "advice must not lead to a loss"
    assert tree(tmp_path) == before


def test_a_file_stays(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("precious")
    with pytest.raises(OutputError, match="is no folder"):
        replace(tmp_path / "b")
    assert (tmp_path / "b").read_text() == "precious"


def test_a_report_that_is_not_listed_yet_is_of_the_bundle(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    (tmp_path / "b/report.html").touch()
    replace(tmp_path / "b")


def test_the_checkpoint_stays(tmp_path: Path) -> None:
    out = make_bundle(tmp_path / "b")
    (tmp_path / "link").symlink_to(out)
    for checkpoint, reason in (
        (out, "is the checkpoint"),
        (tmp_path / "link", "is the checkpoint"),
        (out / "onnx", "holds the"),
    ):
        for place in (out, tmp_path / "link"):
            with pytest.raises(OutputError, match=reason):
                replace(place, checkpoint=checkpoint)
    assert content(out) == "old"


@pytest.mark.usefixtures("swaps")
def test_a_link_leads_to_what_is_replaced(tmp_path: Path) -> None:
    out = make_bundle(tmp_path / "big/b")
    (tmp_path / "link").symlink_to("big/b")
    (tmp_path / "new").symlink_to("big/new")
    replace(tmp_path / "link")
    replace(tmp_path / "new", force=False)
    assert content(out) == content(tmp_path / "big/new") == "new"
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["big", "link", "new"]
    assert names(tmp_path / "big") == ["b", "new"]


def test_the_current_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = make_bundle(tmp_path / "b")
    monkeypatch.chdir(out)
    for name in (".", "../b", str(out)):
        with pytest.raises(OutputError, match="current folder"):
            replace(Path(name))
    assert content(out) == "old"


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "loop", "file/b"])
def test_impossible_names(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    before = tree(tmp_path)
    with pytest.raises(OutputError):
        replace(tmp_path / name)
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("swaps")
def test_what_fails_or_comes_in_between_loses_nothing(tmp_path: Path) -> None:
    out = make_bundle(tmp_path / "b")
    with pytest.raises(CheckpointError), output_folder(out, CHECKPOINT, force=True):
        raise CheckpointError("no")
    with (
        pytest.raises(OutputError, match="no space left on the disk; nothing was kept"),
        output_folder(out, CHECKPOINT, force=True),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OutputError, match="holds 'notes'"), output_folder(out, CHECKPOINT, force=True):
        (out / "notes").touch()
    with pytest.raises(OutputError, match="exists"), output_folder(tmp_path / "c", CHECKPOINT, force=False):
        make_bundle(tmp_path / "c")
    assert content(out) == content(tmp_path / "c") == "old"
    assert names(tmp_path) == ["b", "c"]


@pytest.fixture
def killed(tmp_path: Path) -> Iterator[Callable[[str, str], None]]:
    """Run a build of `out` in another process until it is where a line of code waits, and kill it there."""

    def kill(where: str, patch: str = "") -> None:
        code = f"""
import os, signal, sys
from pathlib import Path
from mcv_export import output_folder as module
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
{patch}
with module.output_folder(Path(sys.argv[1]), Path("/nowhere"), force=True) as folder:
    (folder / "mcv.json").write_text('{{"files": {{}}}}')
    {where}
"""
        result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], check=False)
        assert result.returncode == -signal.SIGKILL

    yield kill


@pytest.mark.waits
def test_what_a_killed_build_left_is_removed(tmp_path: Path, killed: Callable[..., None]) -> None:
    make_bundle(tmp_path / "b")
    (tmp_path / ".b.download.partial").mkdir()  # somebody else's
    killed("die()")
    assert len(names(tmp_path)) == 3
    assert content(tmp_path / "b") == "old"
    replace(tmp_path / "b")
    assert names(tmp_path) == [".b.download.partial", "b"]


@pytest.mark.waits
def test_what_a_killed_search_left_is_removed(tmp_path: Path, killed: Callable[..., None]) -> None:
    """The folder of its attempts, and an attempt that was being built in it, by the next build of the same folder."""
    killed(
        "pass",
        """
with module.claimed_folder(Path(sys.argv[1]), ".search") as search:
    with module.output_folder(search / "attempts/1", Path("/nowhere"), force=False) as attempt:
        die()
""",
    )
    assert [name.rpartition(".")[2] for name in names(tmp_path)] == ["search"]
    replace(tmp_path / "b", force=False)
    assert names(tmp_path) == ["b"]


@pytest.mark.waits
def test_a_kill_at_the_swap(tmp_path: Path, killed: Callable[..., None]) -> None:
    """Right before the swap the old bundle is there, right after it the new one."""
    make_bundle(tmp_path / "b")
    killed("pass", "module._swap = die")
    assert content(tmp_path / "b") == "old"
    killed("pass", "module.sync_folder = lambda path: die() if path == Path(sys.argv[1]).parent else None")
    assert (tmp_path / "b/mcv.json").read_text() == '{"files": {}}'
    replace(tmp_path / "b")
    assert names(tmp_path) == ["b"]


@pytest.mark.waits
def test_a_kill_between_two_renames_is_made_good(tmp_path: Path, killed: Callable[..., None]) -> None:
    """Where names cannot be exchanged, the old bundle is put back by the next build, even by one that is refused."""
    make_bundle(tmp_path / "b")
    patch = """
sys.platform = "another"
rename = Path.rename
Path.rename = lambda path, target: die() if path.name.endswith(".partial") else rename(path, target)
"""
    killed("pass", patch)
    assert not (tmp_path / "b").exists()
    with pytest.raises(OutputError, match="exists"):
        replace(tmp_path / "b", force=False)
    assert content(tmp_path / "b") == "old"
    replace(tmp_path / "b")
    assert names(tmp_path) == ["b"]


@pytest.mark.waits
def test_two_builds_at_once(tmp_path: Path) -> None:
    with output_folder(tmp_path / "b", CHECKPOINT, force=False) as folder:
        make_bundle(folder / "x")
        shutil.copytree(folder / "x", folder, dirs_exist_ok=True)
        shutil.rmtree(folder / "x")
        with pytest.raises(OutputError, match="another build is making"):
            replace(tmp_path / "b")
        replace(tmp_path / "b.c")  # its leftovers have other names
        with claimed_folder(tmp_path / "c", ".search"), pytest.raises(OutputError, match="another build is making"):
            replace(tmp_path / "c")
    assert content(tmp_path / "b") == "old"
    assert names(tmp_path) == ["b", "b.c"]


def test_builds_inside_of_a_search(tmp_path: Path) -> None:
    with claimed_folder(tmp_path / "b", ".search") as folder:
        replace(folder / "attempts/1", force=False)
        assert content(folder / "attempts/1") == "new"
    assert names(tmp_path) == []


def test_a_lock_of_somebody_else_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0)
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        module.fcntl.flock(handle, module.fcntl.LOCK_EX)
        replace(tmp_path / "b", force=False)
    finally:
        os.close(handle)
    assert names(tmp_path) == ["b"]


def test_where_there_are_no_locks_leftovers_are_named(
    tmp_path: Path, killed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    killed("die()")
    (left,) = names(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING):
        replace(tmp_path / "b")
    assert left in caplog.text
    assert names(tmp_path) == [left, "b"]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    fsync, rename = os.fsync, module._rename

    def noted_sync(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        fsync(handle)

    def noted_rename(source: Path, target: Path, flag: int) -> None:
        synced.append("rename")
        rename(source, target, flag)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(module, "_rename", noted_rename)
    replace(tmp_path / "b")
    swap = synced.index("rename")
    assert {"a.onnx", "mcv.json", "onnx"} < set(synced[:swap])
    assert synced[swap + 1 :] == [tmp_path.name]


def test_the_check_is_the_one_of_the_build(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b")
    with pytest.raises(OutputError, match="--force"):
        check_output(tmp_path / "b", CHECKPOINT, force=False)
    assert check_output(tmp_path / "b", CHECKPOINT, force=True) == tmp_path / "b"
    assert check_output(tmp_path / "new/b", CHECKPOINT, force=False) == tmp_path / "new/b"
    assert names(tmp_path) == ["b"]
