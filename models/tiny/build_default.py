"""Build the bundle that ships inside the runtime: `python models/tiny/build_default.py`."""

from __future__ import annotations

from pathlib import Path

from mcv_export.build import BuildOptions, build
from mcv_runtime.bundle.folder import DEFAULT


def main() -> None:
    result = build(Path(__file__).parent / "checkpoint", DEFAULT, BuildOptions(precision="q8", force=True), model="models/tiny")
    print(f"{result.folder}: {sum(file.size for file in result.manifest.files.values()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
