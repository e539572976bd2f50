"""Open a bundle folder and check that it is what its manifest says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mcv_runtime.bundle.manifest import FILE_NAME, GraphName, Manifest
from mcv_runtime.errors import BundleCorruptError, BundleError

DEFAULT = Path(__file__).parent.parent / "default_bundle"
"""The demo model that ships with the package."""
CHECKED_BYTES = 32 << 20
"""Files up to this size are compared with their sha256 at every opening (hashing them takes milliseconds)."""

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
        try:
            text = (folder / FILE_NAME).read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise BundleError(
                f"{folder} is not a bundle: it has no {FILE_NAME}; make one with `mcv-export build MODEL {folder}`"
            ) from error
        except UnicodeDecodeError as error:
            raise BundleCorruptError(f"{folder / FILE_NAME} is not UTF-8 text; {_REBUILD}") from error
        except OSError as error:
            raise BundleError(f"{folder / FILE_NAME} cannot be read: {error.strerror}") from error
        bundle = cls(folder, Manifest.from_json(text))
        bundle._check_files()
        return bundle

    def graph(self, name: GraphName) -> Path:
        """Where a graph's `.onnx` file is."""
        if name not in self.manifest.graphs:
            raise BundleCorruptError(f"{FILE_NAME} names no graph {name!r}; {_REBUILD}")
        return self.path(self.manifest.graphs[name].file)

    def path(self, name: str) -> Path:
        """A file of the bundle; raises `BundleCorruptError` for a name that leads out of the folder."""
        parts = PurePosixPath(name)
        if not name or parts.is_absolute() or ".." in parts.parts or "\\" in name or ":" in name:
            raise BundleCorruptError(f"{FILE_NAME} names the file {name!r}, which is not inside the bundle")
        return self.folder.joinpath(*parts.parts)

    @property
    def identity(self) -> str:
        """What tells this bundle from others that answer differently: a sha256 over graphs, tokenizer and template."""
        manifest = self.manifest
        texts = (manifest.text.tokenizer, manifest.text.chat_template)
        described = {
            name: manifest.files[name].sha256 if name in manifest.files else self.path(name).stat().st_size
            for name in [*texts, *(graph.file for graph in manifest.graphs.values())]
        }
        described |= {name: file.sha256 for name, file in manifest.files.items() if name.startswith("onnx/")}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def read_text(self, name: str) -> str:
        """Content of a text file of the bundle."""
        try:
            return self.path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleCorruptError(f"{self.path(name)} cannot be read as text; {_REBUILD}") from error

    def verify(self) -> Iterator[str]:
        """Compare every file with its sha256, yielding the name of each that is right."""
        for name in self.manifest.files:
            self._check_hash(name)
            yield name

    def _check_hash(self, name: str) -> None:
        try:
            with self.path(name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BundleError(f"{self.path(name)} cannot be read: {error.strerror}") from error
        if digest != self.manifest.files[name].sha256:
            raise BundleCorruptError(f"{self.path(name)} was altered: its sha256 is not the manifest's; {_REBUILD}")

    def _check_files(self) -> None:
        manifest = self.manifest
        named = [manifest.text.tokenizer, manifest.text.chat_template, *(graph.file for graph in manifest.graphs.values())]
        for name in dict.fromkeys([*named, *manifest.files]):
            path = self.path(name)
            if not path.is_file():
                raise BundleError(f"{path} is missing; {_REBUILD}")
            if name not in manifest.files:
                continue
            size = path.stat().st_size
            if size != manifest.files[name].size:
                raise BundleCorruptError(f"{path} has {size:,} bytes instead of {manifest.files[name].size:,}; {_REBUILD}")
            if size <= CHECKED_BYTES:
                self._check_hash(name)
