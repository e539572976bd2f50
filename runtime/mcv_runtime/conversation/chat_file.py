"""A conversation on disk: what was said, the pictures' visual tokens, and what the decoder remembers.

One file: a line with the format, a line with the sha256 of all that follows, and a NumPy archive.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.typed_json import parse
from mcv_runtime.decoding.row import Row
from mcv_runtime.decoding.slots import Slots
from mcv_runtime.errors import BundleCorruptError, ChatFileError, OutputError
from mcv_runtime.files import open_regular, parse_json
from mcv_runtime.pictures.picture import Clip, Picture
from mcv_runtime.pictures.slicing import SliceGrid
from mcv_runtime.request.preparation import Part
from mcv_runtime.text.prompts import Message

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAGIC = b"mcv-chat 2\n"
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, MemoryError, RecursionError)
"""Errors that a damaged archive may raise besides."""


def write_chat(path: Path, bundle: Bundle, messages: Sequence[Message[Part]], slots: Slots, row: Row | None) -> None:
    """Write a conversation to `path`, all or nothing, with the row that holds what the model has read of it."""
    embeds: list[NDArray[np.float32]] = []
    header: dict[str, Any] = {
        "bundle": bundle.identity,
        "messages": [{"role": m.role, "parts": [_described(part, embeds) for part in m.parts]} for m in messages],
    }
    try:
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w+b") as file:
                file.write(_MAGIC + b"0" * 64 + b"\n")
                with zipfile.ZipFile(file, "w") as archive:  # one tensor after the other: a copy of all may not fit
                    _add(archive, "header", np.frombuffer(json.dumps(header).encode(), np.uint8))
                    for number, visual_tokens in enumerate(embeds):
                        _add(archive, f"embeds/{number}", visual_tokens)
                    if row is not None:
                        _add(archive, "keys", row.keys)
                        for name, tensor in slots.export(row):
                            _add(archive, f"cache/{name}", tensor)
                        for length, states in row.checkpoints.items():
                            for index, state in enumerate(states):
                                _add(archive, f"states/{length}/{index}", state)
                digest = _digest(file)
                file.seek(len(_MAGIC))
                file.write(digest)
                file.flush()
                os.fsync(file.fileno())
            Path(partial).replace(path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise OutputError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def read_chat(path: Path, bundle: Bundle, slots: Slots) -> tuple[list[Message[Part]], Row | None]:
    """The messages that `write_chat` wrote, and the row if there is room for it; raises `ChatFileError`."""
    try:
        with open_regular(path, error=ChatFileError) as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ChatFileError(f"{path} is not a conversation that was saved by this version")
            wanted = file.read(65)
            if wanted != _digest(file) + b"\n":
                raise ChatFileError(f"{path} is damaged: its checksum does not fit; start the conversation again")
            file.seek(len(_MAGIC) + 65)
            with np.load(file, allow_pickle=False) as archive:
                return _unpacked(path, bundle, slots, archive)
    except ChatFileError:
        raise
    except OSError as error:
        raise ChatFileError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, IndexError, BundleCorruptError, *_DAMAGED) as error:
        raise ChatFileError(f"{path} is damaged ({' '.join(str(error).split())}); start the conversation again") from None


def _unpacked(
    path: Path, bundle: Bundle, slots: Slots, archive: Mapping[str, NDArray[Any]]
) -> tuple[list[Message[Part]], Row | None]:
    header = parse_json(archive["header"].tobytes(), "the conversation", error=ValueError)
    if header["bundle"] != bundle.identity:
        raise ChatFileError(f"{path} was saved with another bundle than {bundle.folder}; load it with that one")
    messages: list[Message[Part]] = [
        Message(m["role"], tuple(_restored(part, archive) for part in m["parts"])) for m in header["messages"]
    ]
    if "keys" not in archive:
        return messages, None
    states: dict[int, list[NDArray[Any]]] = {}
    for name in archive:  # in the order in which they were written
        if name.startswith("states/"):
            states.setdefault(int(name.split("/")[1]), []).append(archive[name])
    checkpoints = {at: tuple(parts) for at, parts in states.items()}
    return messages, slots.restore(archive["keys"], lambda name: archive[f"cache/{name}"], checkpoints)


def _add(archive: zipfile.ZipFile, name: str, values: NDArray[Any]) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, values, allow_pickle=False)


def _digest(file: Any) -> bytes:
    """Of all behind the digest's own place."""
    file.seek(len(_MAGIC) + 65)
    return hashlib.file_digest(file, "sha256").hexdigest().encode()


def _described(part: str | Part, embeds: list[NDArray[np.float32]]) -> Any:
    if isinstance(part, str):
        return part
    if isinstance(part, Clip):
        return {"clip": part.name, "frames": [_described(frame, embeds) for frame in part.frames]}
    assert isinstance(part, Picture)
    embeds.append(part.embeds)
    fields = ("name", "size", "fingerprint", "graphs")
    return {"embeds": len(embeds) - 1, "grid": dataclasses.asdict(part.grid), **{name: getattr(part, name) for name in fields}}


def _restored(part: Any, arrays: Mapping[str, NDArray[Any]]) -> str | Part:
    if isinstance(part, str):
        return part
    if "clip" in part:
        return Clip(name=part["clip"], frames=tuple(_restored(frame, arrays) for frame in part["frames"]))  # type: ignore[misc]
    width, height = part["size"]
    return Picture(
        name=part["name"],
        size=(width, height),
        grid=parse(SliceGrid, part["grid"], "grid"),
        embeds=arrays[f"embeds/{part['embeds']}"],
        fingerprint=part["fingerprint"],
        graphs=part["graphs"],
    )
