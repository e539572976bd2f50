"""Open a bundle folder and check that it is what its manifest says."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath

from mcv_runtime.bundle import checked
from mcv_runtime.bundle.manifest import FILE_NAME, GraphName, Manifest
from mcv_runtime.errors import BundleCorruptError, BundleError, McvError, shown
from mcv_runtime.files import open_regular, read_text

DEFAULT = Path(__file__).parent.parent / "default_bundle"
"""The demo model that ships with the package."""
CHECKED_BYTES = 32 << 20
"""Files up to this size are compared with their sha256 at every opening (hashing them takes milliseconds)."""
_MANIFEST_BYTES = 16 << 20

_REBUILD = "build or copy the bundle again"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle folder whose files are all there and of the right size."""

    folder: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: str | Path) -> Bundle:
        """Read the manifest of `folder`; raises `BundleError` for a missing file, `BundleCorruptError` for a damaged one."""
        folder = Path(folder)
        text = read_text(
            folder / FILE_NAME, error=_damaged, missing=lambda _: _no_bundle(folder), within=folder, max_bytes=_MANIFEST_BYTES
        )
        bundle = cls(folder, Manifest.from_json(text))
        bundle._check_files()
        return bundle

    def graph(self, name: GraphName) -> Path:
        """Where a graph's `.onnx` file is."""
        if name not in self.manifest.graphs:
            raise _damaged(f"{FILE_NAME} names no graph {shown(name)}")
        return self.path(self.manifest.graphs[name].file)

    def path(self, name: str) -> Path:
        """A file of the bundle; raises `BundleCorruptError` for a name that leads out of the folder."""
        parts = PurePosixPath(name)
        if not name or parts.is_absolute() or ".." in parts.parts or "\\" in name or ":" in name:
            raise BundleCorruptError(f"{FILE_NAME} names the file {shown(name)}, which is not inside the bundle")
        return self.folder.joinpath(*parts.parts)

    @property
    def identity(self) -> str:
        """What tells this bundle from others that answer differently: a sha256 over graphs, tokenizer and template."""
        named = {name: self.manifest.files[name].sha256 for name in self._named()}
        named |= {name: file.sha256 for name, file in self.manifest.files.items() if name.startswith("onnx/")}
        return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()

    def read_text(self, name: str) -> str:
        """Content of a text file of the bundle."""
        return read_text(self.path(name), error=_damaged, within=self.folder)

    def verify(self) -> Iterator[str]:
        """Compare every file with its sha256, yielding the name of each that is right."""
        for name in self.manifest.files:
            self._check_hash(name)
            yield name

    def _named(self) -> list[str]:
        """The files that the runtime asks for."""
        graphs = [graph.file for graph in self.manifest.graphs.values()]
        return list(dict.fromkeys([self.manifest.text.tokenizer, self.manifest.text.chat_template, *graphs]))

    def _open(self, name: str) -> BufferedReader:
        path = self.path(name)
        missing = BundleError(f"{path} is missing; {_REBUILD}")
        return open_regular(path, error=_damaged, missing=lambda _: missing, within=self.folder)

    def _check_hash(self, name: str) -> None:
        try:
            with self._open(name) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            if isinstance(error, McvError):
                raise
            raise BundleError(f"{self.path(name)} cannot be read: {error.strerror}") from error
        if digest != self.manifest.files[name].sha256:
            raise _damaged(f"{self.path(name)} was altered: its sha256 is not the manifest's")

    def _check_files(self) -> None:
        """All that is listed is there, whole and as it was built, and all that is used is listed.

        Large files are hashed once: `checked` knows afterwards that they are right, as long as nobody writes to them.
        """
        files = self.manifest.files
        weights = [f"{graph.file}.data" for graph in self.manifest.graphs.values()]
        for name in [*self._named(), *weights]:
            there = os.path.lexists(self.path(name))
            if name not in files and (there or name not in weights):
                raise _damaged(f"{FILE_NAME} does not list {shown(name)}, so that nobody can tell whether it is as built")
        known = checked.known(self.folder)
        large = set()
        for name, spec in files.items():
            with self._open(name) as file:
                size = os.fstat(file.fileno()).st_size
            if size != spec.size:
                raise _damaged(f"{self.path(name)} has {size:,} bytes instead of {spec.size:,}")
            key = checked.file_key(self.path(name), spec.sha256) if size > CHECKED_BYTES else None
            if key not in known:
                self._check_hash(name)
            if key is not None:
                large.add(key)
        if not large <= known:
            checked.remember(self.folder, large)


def _damaged(message: str) -> BundleCorruptError:
    return BundleCorruptError(f"{message}; {_REBUILD}")


def _no_bundle(folder: Path) -> BundleError:
    """What to do about it; never an advice to build into a folder that is in use."""
    if (folder / "config.json").exists():
        return BundleError(f"{folder} is no bundle but a checkpoint; make a bundle of it with `mcv-export build {folder} OUT`")
    try:
        unused = not folder.exists() or not any(folder.iterdir())
    except OSError:
        unused = False
    return BundleError(
        f"{folder} is not a bundle: it has no {FILE_NAME}; make one with `mcv-export build MODEL {folder if unused else 'OUT'}`"
    )
