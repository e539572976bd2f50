"""What a manifest says of files: their sizes and hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import Executor
from pathlib import Path
from types import MappingProxyType

from mcv_runtime.bundle.manifest import FILE_NAME, FileSpec

_READ = (".json", ".jinja", ".txt", ".model", ".safetensors", ".bin")
_PIECE = 8 << 20
"""Bytes hashed at once: enough that other threads' turns at Python's lock do not count."""
_NONE: Mapping[str, FileSpec] = MappingProxyType({})


def folder_specs(folder: Path, pool: Executor | None = None, known: Mapping[str, FileSpec] = _NONE) -> dict[str, FileSpec]:
    """Every file of a bundle's folder but the manifest, by the name that the manifest gives it.

    `known` are those that nobody has changed since they were hashed.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != FILE_NAME]
    named = {path.relative_to(folder).as_posix(): path for path in paths}
    new = {name: path for name, path in named.items() if name not in known}
    found = dict(zip(new, (pool.map if pool else map)(file_spec, new.values()), strict=True))
    return {name: known.get(name) or found[name] for name in named}


def checkpoint_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's folder that a build may read, but for code and pictures."""
    return [path for path in sorted(folder.iterdir()) if path.suffix in _READ and path.is_file()]


def file_spec(path: Path) -> FileSpec:
    digest, buffer = hashlib.sha256(), bytearray(_PIECE)
    with path.open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return FileSpec(size=path.stat().st_size, sha256=digest.hexdigest())
