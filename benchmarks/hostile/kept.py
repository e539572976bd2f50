"""What mcv itself has written, changed by somebody: saved conversations, cached pictures, statistics, rows of a batch."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from hostile.bundles import PICTURE
from hostile.changed_json import changed
from hostile.guarded import Case, Draw
from mcv_runtime import Options, load
from mcv_runtime.batch.rows import Defaults
from mcv_runtime.command.batch_cli import answer_batch

_QUESTION = "What does the text say?"


def chats(scratch: Path) -> Draw:
    """A conversation whose header, arrays or archive were changed, its checksum right again."""
    saved, again = scratch / "saved.mcv", scratch / "again.mcv"
    with load(threads=1) as engine:
        chat = engine.chat(system="Be brief.", max_new_tokens=4)
        chat.ask(PICTURE, _QUESTION)
        chat.save(saved)
    magic, _, body = saved.read_bytes().split(b"\n", 2)
    with np.load(io.BytesIO(body)) as archive:
        arrays = {name: archive[name] for name in archive}
    header = json.loads(arrays.pop("header").tobytes())

    def draw(dice: Random) -> Case:
        part = dice.choice(("header", "header", "array", "array", "gone", "archive"))
        what, made = part, body
        if part == "header":
            what, text = changed(header, dice)
            made = _archive(text, arrays)
        elif part == "array":
            name = dice.choice(list(arrays))
            made = _archive(json.dumps(header).encode(), arrays | {name: _odd_array(arrays[name], dice)})
            what = name
        elif part == "gone":
            what = dice.choice(list(arrays))
            made = _archive(json.dumps(header).encode(), {name: array for name, array in arrays.items() if name != what})
        else:
            made = _odd_archive(body, dice)
        saved.write_bytes(magic + b"\n" + hashlib.sha256(made).hexdigest().encode() + b"\n" + made)
        return Case(what, lambda: _go_on(saved, again))

    return draw


def cache_entries(scratch: Path) -> Draw:
    """A cached picture, or calibration's statistics: damaged, of another shape, something else than a file."""
    folder = scratch / "cache"
    with load(threads=1, cache_dir=folder) as engine:
        said = engine.ask(PICTURE, _QUESTION, max_new_tokens=4).text
    (entry,) = folder.glob("*.mcvpicture")
    good = entry.read_bytes()
    from mcv_calibration.store import Store  # not for the others, with all that it imports

    store = Store("origin", scratch / "statistics")
    store.save("key", {"low": np.zeros(5), "high": np.ones(5)})
    (kept,) = (path for path in (scratch / "statistics").rglob("*") if path.is_file())
    statistics = kept.read_bytes()

    def picture() -> str:
        with load(threads=1, cache_dir=folder) as engine:
            answer = engine.ask(PICTURE, _QUESTION, max_new_tokens=4).text
        if answer != said:
            raise AssertionError(f"{answer!r} from a damaged cache, and not {said!r}")
        return answer

    def draw(dice: Random) -> Case:
        if dice.random() < 0.5:
            return Case(_replace(entry, _odd_entry(entry, good, dice), dice), picture)
        return Case(f"statistics: {_replace(kept, _changed_bytes(statistics, dice), dice)}", lambda: store.load("key"))

    return draw


def rows(scratch: Path) -> Draw:
    """Lines of a batch with odd fields, next to good ones, which are answered."""
    path, out = scratch / "rows.jsonl", scratch / "out.jsonl"
    good = json.dumps({"prompt": "What colour is the circle?", "max_new_tokens": 2})
    row = {"id": 1, "image": str(PICTURE), "prompt": _QUESTION, "system": "Be brief.", "max_new_tokens": 2, "stop": ["x"]}
    row |= {"temperature": 0.5, "seed": 1, "choices": ["a", "b"], "logprobs": True, "max_slice_nums": 2, "video": None}
    lines = [b"[" * 100_000, b"\xff\xfe{}", b'{"prompt": "' + b" " * 11_000_000 + b'"}', b"null", b'"x"', b"", b"\0", b"{" * 50]

    def answered() -> int:
        out.unlink(missing_ok=True)
        with load(threads=1) as engine:
            answer_batch(engine, path, out, Defaults(prompt="", system=None, options=Options(), model="m"), 2)
        ends = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        if "answer" not in ends[0] or "answer" not in ends[-1]:
            raise AssertionError("the rows beside it were not answered")
        return len(ends)

    def draw(dice: Random) -> Case:
        if dice.random() < 0.2:
            what, line = "a line", dice.choice(lines)
        else:
            what, line = changed(
                row | {dice.choice(("images", "image", "video", "odd")): dice.choice(("http://127.0.0.1:9/x", "/"))}, dice
            )
        path.write_bytes(good.encode() + b"\n" + line.replace(b"\n", b" ") + b"\n" + good.encode() + b"\n")
        return Case(what, answered)

    return draw


def _go_on(saved: Path, again: Path) -> str:
    with load(threads=1) as engine:
        chat = engine.load_chat(saved, max_new_tokens=2)
        text = chat.ask(None, "What colour is the circle?").text
        chat.save(again)
        return text


def _archive(header: bytes, arrays: dict[str, Any], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, array in {"header": np.frombuffer(header, np.uint8), **arrays}.items():
            written = io.BytesIO()
            np.save(written, array)
            archive.writestr(f"{name}.npy", written.getvalue())
    return file.getvalue()


def _odd_array(array: Any, dice: Random) -> Any:
    odd = [array.astype(np.float64), array[..., :0], array.reshape(-1), np.zeros((*array.shape, 2), array.dtype), np.array(5)]
    odd += [np.full_like(array, np.nan if array.dtype.kind == "f" else -(2**62)), array.astype(np.complex64), np.array(["x"])]
    return dice.choice(odd if not array.ndim else [*odd, np.concatenate([array, array], axis=-1), array[:-1]])


def _odd_archive(body: bytes, dice: Random) -> bytes:
    headers = [b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }", b"(" * 5000]
    headers += [
        b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
    ]
    headers += [b"{'descr': '|S1000000000', 'fortran_order': False, 'shape': (100,), }"]
    chosen = dice.choice(headers)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("header.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(chosen)) + chosen + bytes(64))
    squeezed = _archive(b"{}", {"zeros": np.zeros(dice.choice((10, 20_000_000)))}, zipfile.ZIP_DEFLATED)
    pickled = b"\x80\x04cos\nsystem\n(S'exit 1'\ntR."
    return dice.choice((file.getvalue(), squeezed, pickled, b"", body[: dice.randrange(len(body))], _changed_bytes(body, dice)))


def _changed_bytes(data: bytes, dice: Random) -> bytes:
    made = bytearray(data)
    for _ in range(dice.choice((1, 3, 20))):
        made[dice.randrange(min(len(made), dice.choice((64, 10**9))))] = dice.choice((0, 255, dice.randrange(256)))
    return bytes(made[: dice.choice((len(made), dice.randrange(len(made))))])


def _odd_entry(path: Path, good: bytes, dice: Random) -> bytes:
    """A cached picture's file with a digest that fits what is in it, or damaged bytes."""
    if dice.random() < 0.5:
        return _changed_bytes(good, dice)
    rows, columns = struct.unpack_from("<QQ", good, 40)
    values = np.frombuffer(good, "<f4", offset=56).reshape(rows, columns)
    odd = [values * np.nan, values + np.inf, values[:-1], values[:0], values[:, :-1], np.vstack([values, values[:1]])]
    chosen = np.ascontiguousarray(dice.choice(odd), "<f4")
    digest = hashlib.sha256(f"{path.stem} {chosen.shape}".encode())
    digest.update(chosen.data)
    said = dice.choice((chosen.shape, chosen.shape, (2**40, 2**20), (0, 0)))
    return struct.pack("<8s32sQQ", good[:8], digest.digest(), *said) + chosen.tobytes()


def _replace(path: Path, data: bytes, dice: Random) -> str:
    """Put data, or something that is no file, in an entry's place."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    path.unlink(missing_ok=True)
    kind = dice.choice(("bytes",) * 8 + ("pipe", "device", "folder", "sparse", "dangling"))
    if kind == "bytes":
        path.write_bytes(data)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(6 << 30)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nothing")
    return kind
