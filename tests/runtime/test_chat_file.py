"""A saved conversation that somebody has changed, its checksum right again: one line, whatever it is."""

import hashlib
import io
import json
import os
import zipfile

import numpy as np
import pytest

from mcv_runtime import ChatFileError, load

PICTURE = np.full((40, 50, 3), 200, np.uint8)


@pytest.fixture(scope="module")
def engine():
    return load(threads=1)


@pytest.fixture(scope="module")
def saved(engine, tmp_path_factory):
    """The header and the arrays of a conversation, and its path."""
    path = tmp_path_factory.mktemp("chat") / "saved.mcv"
    chat = engine.chat(max_new_tokens=2)
    chat.ask(PICTURE, "What is this?")
    chat.save(path)
    with np.load(io.BytesIO(path.read_bytes().split(b"\n", 2)[2])) as archive:
        arrays = {name: archive[name] for name in archive}
    return path, json.loads(arrays.pop("header").tobytes()), arrays


def seal(path, body):
    magic = path.read_bytes().split(b"\n", 1)[0]
    path.write_bytes(magic + b"\n" + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def pack(header, arrays):
    file = io.BytesIO()
    np.savez(file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), **arrays)
    return file.getvalue()


def test_as_it_was(engine, saved):
    path, header, arrays = saved
    seal(path, pack(header, arrays))
    assert engine.load_chat(path).ask(None, "And this?", max_new_tokens=1).tokens


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fingerprint", None),
        ("fingerprint", "x"),
        ("fingerprint", "g" * 64),
        ("graphs", 5),
        ("size", [1]),
        ("size", ["a", "b"]),
        ("size", [0, 5]),
        ("name", ["a"]),
        ("embeds", -1),
        ("embeds", 99),
        ("grid", None),
        ("more", 1),
    ],
)
def test_a_picture_that_is_described_as_none(engine, saved, name, value):
    path, header, arrays = saved
    changed = json.loads(json.dumps(header))
    changed["messages"][0]["parts"][0][name] = value
    seal(path, pack(changed, arrays))
    with pytest.raises(ChatFileError, match="is damaged") as said:
        engine.load_chat(path)
    assert str(said.value).isprintable()


@pytest.mark.parametrize(
    "change",
    [
        lambda tokens: tokens * np.nan,
        lambda tokens: tokens[:-1],
        lambda tokens: tokens[:, :-1],
        lambda tokens: tokens.astype(np.float64),
        lambda tokens: tokens.reshape(-1),
        lambda tokens: tokens + np.inf,
    ],
)
def test_visual_tokens_that_are_none(engine, saved, change):
    path, header, arrays = saved
    seal(path, pack(header, arrays | {"embeds/0": change(arrays["embeds/0"])}))
    with pytest.raises(ChatFileError, match="visual tokens are"):
        engine.load_chat(path)


@pytest.mark.parametrize("parts", ["a text", {"a": 1}, [1], [["a"]], None])
def test_messages_that_are_none(engine, saved, parts):
    path, header, arrays = saved
    changed = header | {"messages": [{"role": "user", "parts": parts}]}
    seal(path, pack(changed, arrays))
    with pytest.raises(ChatFileError, match="is damaged"):
        engine.load_chat(path)


@pytest.mark.parametrize("npy", [b"(" * 5000, b"{'descr': '<f4', 'shape': (1", b"'''", b"\xff" * 10, b"{}"])
def test_an_array_whose_header_is_no_python(engine, saved, npy):
    """numpy's reader lets out what tokenize and ast raise."""
    path, _, _ = saved
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("header.npy", b"\x93NUMPY\x01\x00" + len(npy).to_bytes(2, "little") + npy)
    seal(path, file.getvalue())
    with pytest.raises(ChatFileError, match="is damaged") as said:
        engine.load_chat(path)
    assert str(said.value).isprintable()


def test_a_conversation_is_on_the_disk_before_it_takes_its_name(engine, tmp_path, monkeypatch):
    path, written = tmp_path / "chat.mcv", []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (written.append((os.fstat(handle).st_ino, path.exists())), sync(handle)))
    chat = engine.chat(max_new_tokens=1)
    chat.ask(PICTURE, "What is this?")
    chat.save(path)
    assert written == [(path.stat().st_ino, False)]
