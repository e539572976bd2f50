"""A bundle whose files are missing, cut or altered is refused in one line."""

import json
import shutil

import pytest

from mcv_runtime import Bundle, BundleCorruptError, BundleError, load


@pytest.fixture
def folder(golden_bundle, tmp_path):
    return shutil.copytree(golden_bundle, tmp_path / "bundle")


def edit_manifest(folder, edit):
    data = json.loads((folder / "mcv.json").read_text())
    edit(data)
    (folder / "mcv.json").write_text(json.dumps(data))


def refused(folder, error, reason):
    with pytest.raises(error, match=reason) as caught:
        Bundle.open(folder)
    assert "\n" not in str(caught.value)


def test_verify_names_every_file(folder):
    bundle = Bundle.open(folder)
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(bundle.verify()) == present - {"mcv.json"}


def test_no_bundle(tmp_path):
    refused(tmp_path / "nowhere", BundleError, "mcv-export build")
    refused(tmp_path, BundleError, r"no mcv\.json")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", BundleError, "not a bundle")


def test_damaged_manifest(folder):
    (folder / "mcv.json").write_bytes(b"\xff\xfe{")
    refused(folder, BundleCorruptError, "UTF-8")
    (folder / "mcv.json").write_text("{")
    refused(folder, BundleCorruptError, "not JSON")


def test_every_file_is_needed(folder):
    for name in Bundle.open(folder).manifest.files:
        (folder / name).rename(folder / "away")
        refused(folder, BundleError, "is missing")
        (folder / "away").rename(folder / name)


def test_every_file_must_be_whole(folder):
    for name in Bundle.open(folder).manifest.files:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1])
        refused(folder, BundleCorruptError, "bytes instead of")
        (folder / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
        refused(folder, BundleCorruptError, "altered")
        (folder / name).write_bytes(content)
    Bundle.open(folder)


def test_large_files_are_checked_by_verify(folder, monkeypatch):
    monkeypatch.setattr("mcv_runtime.bundle.folder.CHECKED_BYTES", 0)
    name = Bundle.open(folder).manifest.graphs["resampler"].file
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    bundle = Bundle.open(folder)
    with pytest.raises(BundleCorruptError, match="altered"):
        list(bundle.verify())


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "c:\\x", ""])
def test_files_lie_inside(folder, name):
    edit_manifest(folder, lambda data: data["text"].update(tokenizer=name))
    refused(folder, BundleCorruptError, "not inside the bundle")


def test_missing_graph(folder):
    edit_manifest(folder, lambda data: data["graphs"].pop("resampler"))
    with pytest.raises(BundleCorruptError, match="resampler"):
        load(folder)
