"""What `mcv-run tune` found fastest for a bundle on this machine, kept in the user's cache folder.

A profile is for one bundle, one processor, one ONNX Runtime and one version of this package: where any of them differs there is
none. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from mcv_runtime.bundle.checked import cache_folder, code_version
from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.typed_json import Between, parse
from mcv_runtime.errors import BundleCorruptError, OutputError
from mcv_runtime.files import parse_json, read_regular
from mcv_runtime.sessions.cores import ROOT, default_threads
from mcv_runtime.writing import replacing

KV: tuple[Literal["float", "int8"], ...] = ("float", "int8")
_BYTES, _KEPT = 1 << 12, 64
"""The largest profile that is read, and how many are kept: the oldest go first."""
_PROCESSOR = frozenset(
    ("vendor_id", "cpu family", "model", "model name", "stepping", "flags", "CPU implementer", "CPU part", "Features")
)
"""What /proc/cpuinfo says of a processor, but for what changes while it works."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Settings for what a caller of `load` leaves open. `machine` is whatever they were measured with, as `machine_of` says."""

    threads: Annotated[int, Between(1, 1024)]
    prefill_chunk: Annotated[int, Between(1, 1 << 16)]
    batch_slices: Annotated[int, Between(1, 64)]
    kv: Literal["float", "int8"]
    machine: str


def machine_of(bundle: Bundle, root: Path = ROOT) -> str:
    """A sha256 that changes with whatever may make another setting the fastest."""
    import onnxruntime as ort

    told = (bundle.identity, processor(root), default_threads(root), ort.__version__, code_version())
    return hashlib.sha256(repr(told).encode(errors="surrogatepass")).hexdigest()


def processor(root: Path = ROOT) -> str:
    """Tells this kind of processor from others."""
    try:
        block = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0]
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    pairs = (line.partition(":") for line in block.splitlines())
    return "\n".join(f"{name.strip()}: {value.strip()}" for name, _, value in pairs if name.strip() in _PROCESSOR)


def find_profile(bundle: Bundle) -> Profile | None:
    """The profile of this bundle here; None if there is none. One that cannot be used is logged, and passed over."""
    machine = machine_of(bundle)
    path = profile_path(machine)
    if path is None or not os.path.lexists(path):
        return None
    try:
        if hasattr(os, "getuid") and path.lstat().st_uid != os.getuid():
            raise ValueError("it is another user's")
        text = read_regular(path, error=ValueError, within=path.parent, max_bytes=_BYTES)
        profile: Profile = parse(Profile, parse_json(text, "it", error=ValueError), "it")
        if profile.machine != machine:
            raise ValueError("it was measured elsewhere")
        if profile.kv == "int8" and "decoder_with_past_kv8" not in bundle.manifest.graphs:
            raise ValueError("the bundle has no graph for kv='int8'")
    except (OSError, ValueError, BundleCorruptError) as error:
        _log.warning("%s is not used: %s; delete it, or run `mcv-run tune` again", path, error)
        return None
    return profile


def keep_profile(profile: Profile) -> Path:
    """Have `find_profile` find it from now on; raises `OutputError` where nothing can be kept."""
    path = profile_path(profile.machine)
    if path is None:
        raise OutputError("there is no home folder to keep a profile in; set MCV_CACHE to a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with replacing(path) as file:
            file.write(json.dumps(asdict(profile), indent=2).encode("ascii"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}") from error
    _drop_oldest(path.parent)
    return path


def profile_path(machine: str) -> Path | None:
    """Where the profile of a machine and a bundle is, if there is one."""
    folder = cache_folder()
    return None if folder is None else folder / "tuned" / f"{machine}.json"


def _drop_oldest(folder: Path) -> None:
    with suppress(OSError):  # of another process that does the same
        found = sorted(folder.glob("*.json"), key=lambda path: path.lstat().st_mtime_ns)
        for path in found[:-_KEPT]:
            path.unlink(missing_ok=True)
