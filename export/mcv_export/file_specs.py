"""What a manifest says of files: their sizes and hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path

from mcv_runtime.bundle.manifest import FILE_NAME, FileSpec

_READ = (".json", ".jinja", ".txt", ".model", ".safetensors", ".bin")


def folder_specs(folder: Path) -> dict[str, FileSpec]:
    """Every file of a bundle's folder but the manifest, by the name that the manifest gives it."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != FILE_NAME]
    return {path.relative_to(folder).as_posix(): file_spec(path) for path in paths}


def checkpoint_specs(folder: Path) -> dict[str, FileSpec]:
    """The files of a checkpoint's folder that a build may read, but for code and pictures, by name."""
    paths = [path for path in sorted(folder.iterdir()) if path.suffix in _READ and path.is_file()]
    return {path.name: file_spec(path) for path in paths}


def file_spec(path: Path) -> FileSpec:
    with path.open("rb") as stream:
        return FileSpec(size=path.stat().st_size, sha256=hashlib.file_digest(stream, "sha256").hexdigest())
