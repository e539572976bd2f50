"""A bundle whose files are missing, cut or altered is refused in one line."""

import json
import os
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


@pytest.fixture
def hashed(monkeypatch, tmp_path):
    """Have every file count as large; the names of those that are hashed, in order."""
    monkeypatch.setattr("mcv_runtime.bundle.folder.CHECKED_BYTES", 0)
    monkeypatch.setenv("MCV_CACHE", str(tmp_path / "cache"))
    names = []
    check = Bundle._check_hash

    def noted(self, name):
        names.append(name)
        check(self, name)

    monkeypatch.setattr(Bundle, "_check_hash", noted)
    return names


def test_large_files_are_hashed_once(folder, hashed, tmp_path):
    files = list(Bundle.open(folder).manifest.files)
    assert hashed == files
    (tmp_path / "link").symlink_to(folder)
    Bundle.open(folder)
    Bundle.open(tmp_path / "link")
    assert hashed == files
    shutil.copytree(folder, tmp_path / "copy")
    Bundle.open(tmp_path / "copy")
    assert hashed == files + files


def test_a_large_file_that_was_written_to_is_hashed_again(folder, hashed):
    name = Bundle.open(folder).manifest.graphs["resampler"].file
    status = (folder / name).stat()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(folder / name, ns=(status.st_atime_ns, status.st_mtime_ns))  # as whoever hides it would
    refused(folder, BundleCorruptError, "altered")
    (folder / name).write_bytes(content)
    hashed.clear()
    Bundle.open(folder)
    assert hashed == [name]


def test_a_cache_that_cannot_be_trusted_or_written_costs_time_only(folder, hashed, tmp_path):
    files = list(Bundle.open(folder).manifest.files)
    (entry,) = (tmp_path / "cache/checked").iterdir()
    known = entry.read_bytes()
    for damage in (b"", b"\xff", b"x" * 100_000):
        entry.write_bytes(damage)
        hashed.clear()
        Bundle.open(folder)
        assert hashed == files
        assert entry.read_bytes() == known
    entry.unlink()
    os.mkfifo(entry)
    Bundle.open(folder)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").touch()
    hashed.clear()
    Bundle.open(folder)
    assert hashed == files


def test_what_is_used_is_listed(folder):
    """Else nobody would notice that it is not as built."""
    for name in Bundle.open(folder).manifest.files:
        whole = (folder / "mcv.json").read_text()
        edit_manifest(folder, lambda data, name=name: data["files"].pop(name))
        if name in ("preprocessor_config.json", "generation_config.json"):  # the runtime reads neither
            Bundle.open(folder)
        else:
            refused(folder, BundleCorruptError, f"does not list '{name}'")
        (folder / "mcv.json").write_text(whole)
    edit_manifest(folder, lambda data: data["files"].clear())
    refused(folder, BundleCorruptError, "does not list 'tokenizer.json'")


def test_links_lead_nowhere_else(folder, tmp_path):
    for name in ("mcv.json", "chat_template.jinja", Bundle.open(folder).manifest.graphs["resampler"].file):
        (folder / name).rename(tmp_path / "elsewhere")
        (folder / name).symlink_to(tmp_path / "elsewhere")
        refused(folder, BundleCorruptError, "leads out of")
        (folder / name).unlink()
        (tmp_path / "elsewhere").rename(folder / name)
    Bundle.open(folder)


@pytest.mark.parametrize("name", ["mcv.json", "tokenizer.json"])
def test_a_pipe_is_not_waited_for(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, BundleCorruptError, "is a pipe, not a file")


def test_a_giant_manifest_is_not_read(folder):
    with (folder / "mcv.json").open("r+b") as file:
        file.truncate(3 << 30)
    refused(folder, BundleCorruptError, "at most 16,777,216 are read")


def test_advice_names_no_folder_that_is_in_use(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/wedding.jpg").touch()
    refused(tmp_path / "photos", BundleError, "mcv-export build MODEL OUT`")
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck/config.json").touch()
    refused(
        tmp_path / "ck",
        BundleError,
        f"no bundle but a checkpoint; make a bundle of it with `mcv-export build {tmp_path}/ck OUT`",
    )
    refused(tmp_path / "new", BundleError, f"mcv-export build MODEL {tmp_path}/new`")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "c:\\x", ""])
def test_files_lie_inside(folder, name):
    edit_manifest(folder, lambda data: data["text"].update(tokenizer=name))
    refused(folder, BundleCorruptError, "not inside the bundle")


def test_missing_graph(folder):
    edit_manifest(folder, lambda data: data["graphs"].pop("resampler"))
    with pytest.raises(BundleCorruptError, match="resampler"):
        load(folder)
