"""What is installed is what was meant: floors without known holes, locks that fit them, one index at a time."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SAFE = {"jinja2": "3.1.6", "pillow": "12.3"}
"""The first versions without a known weakness that a stranger's file can use: CVE-2025-27516, CVE-2026-25990."""


def locked(name):
    """The pinned requirements of a lock file, and how many hashes each has."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip())
    found = {}
    for entry in entries:
        first, *hashes = (line.strip().rstrip("\\").strip() for line in entry.splitlines())
        assert hashes
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", line) for line in hashes), first
        requirement = Requirement(first)
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        found.setdefault(canonicalize_name(requirement.name), []).append(pin.version)
    return found


def wanted(*extras):
    texts = [*PROJECT["dependencies"], *(text for extra in extras for text in PROJECT["optional-dependencies"][extra])]
    return [requirement for requirement in map(Requirement, texts) if requirement.name != PROJECT["name"]]


@pytest.mark.parametrize("name", SAFE)
def test_floors_are_above_known_holes(name):
    (requirement,) = (one for one in wanted() if one.name == name)
    (floor,) = (part for part in requirement.specifier if part.operator == ">=")
    assert Version(floor.version) >= Version(SAFE[name])


@pytest.mark.parametrize(
    ("lock", "extras"),
    [("runtime", ["guided", "pdf", "video"]), ("dev", ["dev", "export", "guided", "heic", "pdf", "sign", "tables", "video"])],
)
def test_a_lock_holds_all_that_is_wanted_and_fits_it(lock, extras):
    pinned = locked(lock)
    for requirement in wanted(*extras):
        versions = pinned[canonicalize_name(requirement.name)]
        assert all(version in requirement.specifier for version in versions), requirement


def test_the_runtime_s_lock_is_part_of_the_other_and_without_a_toolchain():
    runtime, dev = locked("runtime"), locked("dev")
    assert {name: dev[name] for name in runtime} == runtime
    assert not runtime.keys() & {"torch", "transformers", "onnx", "optimum", "pytest"}


def test_no_index_may_stand_in_for_another():
    for path in (ROOT / "Makefile", ROOT / ".ci" / "run.sh", ROOT / "README.md"):
        if path.exists():
            assert "--extra-index-url" not in path.read_text(encoding="utf-8")
