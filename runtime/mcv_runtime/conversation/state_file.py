"""What an engine has read for requests that are over, on disk: the next process need not read it again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.conversation.chat_file import read_row, write_row
from mcv_runtime.conversation.sealed_archive import Add, sealed, write_sealed
from mcv_runtime.decoding.slots import Slots
from mcv_runtime.errors import ChatFileError
from mcv_runtime.files import parse_json

_MAGIC = b"mcv-state 1\n"


def write_state(path: Path, bundle: Bundle, slots: Slots) -> int:
    """Write all beginnings that are kept to `path`, all or nothing; how many there are."""
    rows = sorted((row for row in slots.rows if row.kept and row.slot is not None), key=lambda row: row.used)

    def fill(add: Add) -> None:
        header = {"bundle": bundle.identity, "rows": len(rows)}
        add("header", np.frombuffer(json.dumps(header).encode(), np.uint8))
        for number, row in enumerate(rows):
            write_row(add, slots, row, f"{number}/")

    write_sealed(path, _MAGIC, fill)
    return len(rows)


def read_state(path: Path, bundle: Bundle, slots: Slots) -> int:
    """Take up what `write_state` wrote, as far as there is room, and say how many; raises `ChatFileError`."""
    with sealed(path, _MAGIC, "the state of an engine", "go on without it") as archive:
        header = parse_json(archive["header"].tobytes(), "the state", error=ValueError)
        if header["bundle"] != bundle.identity:
            raise ChatFileError(f"{path} was saved with another bundle than {bundle.folder}; go on without it")
        return sum(read_row(archive, slots, f"{number}/") is not None for number in range(header["rows"]))
