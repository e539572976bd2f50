"""What is kept of a calibration: found again, replaced whole, and thrown away when damaged."""

import io
import logging
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mcv_calibration.store import Store, content_hash, fingerprint, make_room, mark_used
from mcv_runtime.bundle.checked import cache_folder, known, remember

ARRAYS = {"a/b": np.arange(5000, dtype=np.float32), "done": np.array(3)}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    store = Store("tiny vision_encoder", tmp_path / "cache")
    key = store.key("samples", "layers")
    assert store.load(key) is None
    store.save(key, ARRAYS)
    loaded = Store("tiny vision_encoder", tmp_path / "cache").load(key)
    assert loaded is not None
    assert loaded.keys() == ARRAYS.keys()
    assert all(np.array_equal(loaded[name], array) for name, array in ARRAYS.items())
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{key}.npz"]


def test_keys_tell_everything_apart(tmp_path: Path) -> None:
    one, other = Store("a", tmp_path), Store("b", tmp_path)
    keys = [one.key("x", "y"), one.key("xy"), one.key("x", "y", ""), one.key("y", "x"), other.key("x", "y")]
    assert len(set(keys)) == len(keys)
    assert content_hash("a\0b") != content_hash("a", "b")


def zipped(content: bytes, *, flags: int = 0, method: int = 0) -> bytes:
    """An archive with one array, whose two headers say that it is encrypted, or compressed in another way."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", content)
    data = bytearray(file.getvalue())
    for header in (6, data.index(b"PK\x01\x02") + 8):
        data[header], data[header + 2] = flags, method
    return bytes(data)


def test_entries_that_hang_or_fill_memory_are_discarded(tmp_path: Path) -> None:
    """A pipe, an encrypted archive, an unknown compression, an array of 2 ** 60 numbers, a header that is no Python."""
    store = Store("tiny", tmp_path)
    key = store.key("x")
    path = tmp_path / f"{key}.npz"
    os.mkfifo(path)
    assert store.load(key) is None
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1152921504606846976,), }".ljust(117) + b"\n"
    giant = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    for content in (
        zipped(b"", flags=1),
        zipped(b"", method=99),
        zipped(giant),
        zipped(giant.replace(b"(115", b"((((")),
        b"PK",
    ):
        path.write_bytes(content)
        assert store.load(key) is None
        assert not path.exists()


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    store = Store("tiny", tmp_path)
    key = store.key("x")
    old, new, other = (tmp_path / name for name in (f".{key}.npz.a", f".{key}.npz.b", ".c.npz.a"))
    for left in (old, new, other):
        left.touch()
    for left in (old, other):
        os.utime(left, (0, 0))
    store.save(key, ARRAYS)
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / f"{key}.npz", new, other])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other"])
def test_a_damaged_entry_is_discarded(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store("tiny", tmp_path)
    key = store.key("x")
    store.save(key, ARRAYS)
    path = tmp_path / f"{key}.npz"
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "truncated": whole[:middle],
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "empty": b"",
            "other": b"not an archive" * 100,
        }[damage]
    )
    with caplog.at_level(logging.WARNING):
        assert store.load(key) is None
    assert "is damaged" in caplog.text
    assert not path.exists()


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    store = Store("tiny", tmp_path / "file" / "cache")
    store.save(store.key("x"), ARRAYS)
    store.save(store.key("x"), ARRAYS)
    assert caplog.text.count("cannot be written") == 1
    assert store.load(store.key("x")) is None


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MCV_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("MCV_CACHE")
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "mcv"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "mcv"
    monkeypatch.setenv("MCV_CACHE", "~nobody-of-that-name/x")
    assert cache_folder() == Path("~nobody-of-that-name/x")


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("MCV_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert cache_folder() is None
    store = Store("origin")
    for _ in range(2):
        store.save(store.key("x"), {"a": np.zeros(3)})
    assert store.load(store.key("x")) is None
    assert caplog.text.count("no home folder") == 1
    remember(tmp_path, ["a"])
    assert known(tmp_path) == frozenset()


def test_a_checkpoint_that_was_written_again_is_another(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"1234")
    first = fingerprint([file])
    assert fingerprint([file]) == first
    os.utime(file, ns=(1, 1))
    assert fingerprint([file]) != first


def test_other_versions_of_this_code_find_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("tiny", tmp_path)
    now = store.key("x")
    monkeypatch.setattr("mcv_calibration.store.code_version", lambda: "99.0")
    assert store.key("x") != now


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    """Statistics are files and blocks are folders; what has another name was made by somebody else."""
    old, used, blocks, fresh = (content_hash(name) for name in ("old", "used", "blocks", "fresh"))
    (tmp_path / f"{old}.npz").write_bytes(bytes(1000))
    (tmp_path / f"{used}.npz").write_bytes(bytes(1000))
    (tmp_path / blocks).mkdir()
    (tmp_path / blocks / "layers.0.npz").write_bytes(bytes(1000))
    (tmp_path / "photos.npz").write_bytes(bytes(1000))
    (tmp_path / f"{fresh}.npz").write_bytes(bytes(1000))
    for seconds, name in enumerate((f"{used}.npz", f"{old}.npz", blocks, "photos.npz")):
        os.utime(tmp_path / name, (seconds, seconds))
    mark_used(tmp_path / f"{used}.npz")
    make_room(tmp_path, 4000)
    assert len(list(tmp_path.iterdir())) == 5
    make_room(tmp_path, 3500)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"{used}.npz", blocks, "photos.npz", f"{fresh}.npz"])
    make_room(tmp_path, 0)  # but for what another build may be reading
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([f"{used}.npz", "photos.npz", f"{fresh}.npz"])
    make_room(tmp_path / "missing", 0)


def test_loading_and_saving_keep_the_folder_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store("tiny", tmp_path)
    first, second, third = (store.key(name) for name in "abc")
    for key in (first, second):
        store.save(key, ARRAYS)
        os.utime(tmp_path / f"{key}.npz", (0, 0))
    assert store.load(first)  # used now
    size = (tmp_path / f"{first}.npz").stat().st_size
    monkeypatch.setattr("mcv_calibration.store.make_room", lambda folder: make_room(folder, 2 * size))
    store.save(third, ARRAYS)
    assert {path.stem for path in tmp_path.iterdir()} == {first, third}
