"""A conversation on disk: what was said, the pictures' visual tokens, and what the decoder remembers.

One file: a line with the format, a line with the sha256 of all that follows, and a NumPy archive.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.typed_json import parse
from mcv_runtime.decoding.decoder import Decoder
from mcv_runtime.decoding.prefixes import Memory
from mcv_runtime.errors import BundleCorruptError, ChatFileError, OutputError
from mcv_runtime.pictures.picture import Clip, Picture
from mcv_runtime.pictures.slicing import SliceGrid
from mcv_runtime.request.preparation import Part
from mcv_runtime.text.prompts import Message

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAGIC = b"mcv-chat 1\n"


def write_chat(path: Path, bundle: Bundle, messages: Sequence[Message[Part]], memory: Memory | None) -> None:
    """Write a conversation to `path`, all or nothing."""
    arrays: dict[str, NDArray[Any]] = {}
    header: dict[str, Any] = {
        "bundle": bundle.identity,
        "messages": [{"role": m.role, "parts": [_described(part, arrays) for part in m.parts]} for m in messages],
    }
    if memory is not None:
        memory.rewind(memory.keys.shape[1])  # an interrupted step may have left the cache ahead of its keys
        cache = memory.cache
        arrays["keys"] = memory.keys
        arrays |= {f"cache/{name}": tensor for name, tensor in cache.export().items()}
        for length, states in memory.checkpoints.items():
            arrays |= {f"states/{length}/{index}": state for index, state in enumerate(states)}
        header |= {"length": cache.length, "shift": int(cache.shifts[0])}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    payload = io.BytesIO()
    np.savez(payload, allow_pickle=False, **arrays)
    body = payload.getvalue()
    try:
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
            Path(partial).replace(path)
        except BaseException:
            Path(partial).unlink(missing_ok=True)
            raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise OutputError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def read_chat(path: Path, bundle: Bundle, decoder: Decoder) -> tuple[list[Message[Part]], Memory | None]:
    """What `write_chat` wrote; raises `ChatFileError`."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # as above
        raise ChatFileError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not data.startswith(_MAGIC):
        raise ChatFileError(f"{path} is not a conversation that was saved by this version")
    digest, _, body = data[len(_MAGIC) :].partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise ChatFileError(f"{path} is damaged: its checksum does not fit; start the conversation again")
    try:
        with np.load(io.BytesIO(body), allow_pickle=False) as archive:
            arrays = dict(archive)
        header = json.loads(arrays["header"].tobytes())
        if header["bundle"] != bundle.identity:
            raise ChatFileError(f"{path} was saved with another bundle than {bundle.folder}; load it with that one")
        messages: list[Message[Part]] = [
            Message(m["role"], tuple(_restored(part, arrays) for part in m["parts"])) for m in header["messages"]
        ]
        return messages, _memory(header, arrays, decoder) if "keys" in arrays else None
    except (ValueError, KeyError, TypeError, IndexError, BundleCorruptError) as error:
        if isinstance(error, ChatFileError):
            raise
        raise ChatFileError(f"{path} is damaged ({error}); start the conversation again") from None


def _memory(header: dict[str, Any], arrays: dict[str, NDArray[Any]], decoder: Decoder) -> Memory:
    length = int(header["length"])
    cache = decoder.new_cache(length)
    tensors = {name.removeprefix("cache/"): array for name, array in arrays.items() if name.startswith("cache/")}
    cache.restore(tensors, length, int(header["shift"]))
    states: dict[int, list[NDArray[Any]]] = {}
    for name, array in arrays.items():  # in the order in which they were written
        if name.startswith("states/"):
            states.setdefault(int(name.split("/")[1]), []).append(array)
    return Memory(arrays["keys"], cache, {at: tuple(parts) for at, parts in states.items()})


def _described(part: str | Part, arrays: dict[str, NDArray[Any]]) -> Any:
    if isinstance(part, str):
        return part
    if isinstance(part, Clip):
        return {"clip": part.name, "frames": [_described(frame, arrays) for frame in part.frames]}
    assert isinstance(part, Picture)
    number = sum(name.startswith("embeds/") for name in arrays)
    arrays[f"embeds/{number}"] = part.embeds
    fields = ("name", "size", "fingerprint")
    return {"embeds": number, "grid": dataclasses.asdict(part.grid), **{name: getattr(part, name) for name in fields}}


def _restored(part: Any, arrays: dict[str, NDArray[Any]]) -> str | Part:
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
    )
