"""A conversation on disk: what was said, the pictures' visual tokens, and what the decoder remembers.

One file: a line with the format, a line with the sha256 of all that follows, and a NumPy archive.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.manifest import Manifest
from mcv_runtime.bundle.typed_json import Between, parse
from mcv_runtime.conversation.sealed_archive import Add, sealed, write_sealed
from mcv_runtime.decoding.row import Row
from mcv_runtime.decoding.slots import Slots
from mcv_runtime.errors import ChatFileError
from mcv_runtime.files import parse_json
from mcv_runtime.pictures.picture import Clip, PagePlace, Picture
from mcv_runtime.pictures.slicing import SliceGrid
from mcv_runtime.request.preparation import Part
from mcv_runtime.text.prompts import Message, slice_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAGIC = b"mcv-chat 2\n"
_DIGEST = re.compile(r"[0-9a-f]{64}")


def write_chat(path: Path, bundle: Bundle, messages: Sequence[Message[Part]], slots: Slots, row: Row | None) -> None:
    """Write a conversation to `path`, all or nothing, with the row that holds what the model has read of it."""
    embeds: list[NDArray[np.float32]] = []
    header: dict[str, Any] = {
        "bundle": bundle.identity,
        "messages": [{"role": m.role, "parts": [_described(part, embeds) for part in m.parts]} for m in messages],
    }

    def fill(add: Add) -> None:
        add("header", np.frombuffer(json.dumps(header).encode(), np.uint8))
        for number, visual_tokens in enumerate(embeds):
            add(f"embeds/{number}", visual_tokens)
        if row is not None:
            write_row(add, slots, row)

    write_sealed(path, _MAGIC, fill)


def write_row(add: Add, slots: Slots, row: Row, prefix: str = "") -> None:
    """All that a row is, each tensor under a name that begins with `prefix`."""
    add(f"{prefix}keys", row.keys)
    for name, tensor in slots.export(row):
        add(f"{prefix}cache/{name}", tensor)
    for length, states in row.checkpoints.items():
        for index, state in enumerate(states):
            add(f"{prefix}states/{length}/{index}", state)


def read_row(archive: Mapping[str, NDArray[Any]], slots: Slots, prefix: str = "") -> Row | None:
    """A row as `write_row` wrote it, if there is room for it."""
    states: dict[int, list[NDArray[Any]]] = {}
    start = f"{prefix}states/"
    for name in archive:  # in the order in which they were written
        if name.startswith(start):
            states.setdefault(int(name.removeprefix(start).split("/")[0]), []).append(archive[name])
    checkpoints = {at: tuple(parts) for at, parts in states.items()}
    return slots.restore(archive[f"{prefix}keys"], lambda name: archive[f"{prefix}cache/{name}"], checkpoints)


def read_chat(path: Path, bundle: Bundle, slots: Slots) -> tuple[list[Message[Part]], Row | None]:
    """The messages that `write_chat` wrote, and the row if there is room for it; raises `ChatFileError`."""
    with sealed(path, _MAGIC, "a conversation", "start the conversation again") as archive:
        return _unpacked(path, bundle, slots, archive)


def _unpacked(
    path: Path, bundle: Bundle, slots: Slots, archive: Mapping[str, NDArray[Any]]
) -> tuple[list[Message[Part]], Row | None]:
    header = parse_json(archive["header"].tobytes(), "the conversation", error=ValueError)
    if header["bundle"] != bundle.identity:
        raise ChatFileError(f"{path} was saved with another bundle than {bundle.folder}; load it with that one")
    if not all(isinstance(m["parts"], list) for m in header["messages"]):
        raise ValueError("a message has no list of parts")
    messages: list[Message[Part]] = [
        Message(m["role"], tuple(_restored(part, archive, bundle.manifest) for part in m["parts"])) for m in header["messages"]
    ]
    return messages, read_row(archive, slots) if "keys" in archive else None


def _described(part: str | Part, embeds: list[NDArray[np.float32]]) -> Any:
    if isinstance(part, str):
        return part
    if isinstance(part, Clip):
        return {"clip": part.name, "frames": [_described(frame, embeds) for frame in part.frames]}
    assert isinstance(part, Picture)
    embeds.append(part.embeds)
    fields = ("name", "size", "fingerprint", "graphs")
    said = {"embeds": len(embeds) - 1, "grid": dataclasses.asdict(part.grid), **{name: getattr(part, name) for name in fields}}
    return said if part.page is None else {**said, "page": dataclasses.asdict(part.page)}


_Side = Annotated[int, Between(1, 1 << 32)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Paged:
    """What is written of a document's page."""

    number: Annotated[int, Between(1, 1 << 32)]
    size: tuple[_Side, ...]

    def __post_init__(self) -> None:
        if len(self.size) != 2:
            raise ValueError("a page is not described as one")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pictured:
    """What is written of a picture."""

    name: str
    size: tuple[_Side, ...]
    grid: SliceGrid
    fingerprint: str
    graphs: str
    embeds: int
    page: _Paged | None = None

    def __post_init__(self) -> None:
        if len(self.size) != 2 or not all(_DIGEST.fullmatch(digest) for digest in (self.fingerprint, self.graphs)):
            raise ValueError("a picture is not described as one")


def _restored(part: Any, arrays: Mapping[str, NDArray[Any]], manifest: Manifest) -> str | Part:
    if isinstance(part, str):
        return part
    if "clip" in part:
        frames = tuple(_restored(frame, arrays, manifest) for frame in part["frames"])
        if not isinstance(part["clip"], str) or not all(isinstance(frame, Picture) for frame in frames):
            raise ValueError("a clip is not described as one")
        return Clip(name=part["clip"], frames=frames)  # type: ignore[arg-type]
    said = parse(_Pictured, part, "picture")
    embeds = arrays[f"embeds/{said.embeds}"]
    shape = sum(slice_tokens(manifest.placeholder, said.grid)), manifest.hidden_size
    if embeds.dtype != np.float32 or embeds.shape != shape or not np.isfinite(embeds).all():
        raise ValueError(f"visual tokens are {embeds.dtype} {embeds.shape} instead of finite float32 {shape}")
    width, height = said.size
    return Picture(
        name=said.name,
        size=(width, height),
        grid=said.grid,
        embeds=embeds,
        fingerprint=said.fingerprint,
        graphs=said.graphs,
        page=None if said.page is None else PagePlace(said.page.number, (said.page.size[0], said.page.size[1])),
    )
