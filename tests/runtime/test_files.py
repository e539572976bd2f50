"""Strangers' files: what is opened, what is refused, and that nothing is ever waited for."""

import json
import os
import sys
from pathlib import Path

import pytest

from mcv_runtime.errors import BundleError, ImageError, McvError, OptionError, shown
from mcv_runtime.files import open_regular, parse_json, read_bounded, read_regular, read_text


def test_a_plain_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    with open_regular(tmp_path / "a", error=ImageError, within=tmp_path, max_bytes=3) as file:
        assert file.read() == b"abc"
    assert read_regular(str(tmp_path / "a"), error=ImageError) == b"abc"


def test_a_link_is_followed_where_it_may_be(tmp_path: Path) -> None:
    inside, outside = tmp_path / "folder", tmp_path / "secret"
    inside.mkdir()
    outside.write_text("secret")
    (inside / "a").write_text("a")
    (inside / "near").symlink_to("a")
    (inside / "out").symlink_to(outside)
    (inside / "up").symlink_to("..")
    assert read_text(inside / "near", error=ImageError, within=inside) == "a"
    assert read_text(inside / "out", error=ImageError) == "secret"  # a path that the user gave himself
    for name in ("out", "up/secret", "../secret"):
        with pytest.raises(ImageError, match="leads out of"):
            read_text(inside / name, error=ImageError, within=inside)


def test_the_folder_itself_may_be_reached_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a").write_text("a")
    (tmp_path / "link").symlink_to("real")
    assert read_text(tmp_path / "link/a", error=ImageError, within=tmp_path / "link") == "a"


def test_files_of_the_hubs_cache_are_links_to_blobs(tmp_path: Path) -> None:
    """Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache"""
    model = tmp_path / "models--openbmb--MiniCPM-V-2_6"
    snapshot = model / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (model / "blobs/ffee").write_text("{}")
    (model / "other").write_text("secret")
    (snapshot / "config.json").symlink_to("../../blobs/ffee")
    (snapshot / "out.json").symlink_to("../../other")
    assert read_text(snapshot / "config.json", error=ImageError, within=snapshot) == "{}"
    with pytest.raises(ImageError, match="leads out of"):
        read_text(snapshot / "out.json", error=ImageError, within=snapshot)


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes by name")
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path, kind in ((tmp_path / "pipe", "a pipe"), (tmp_path / "folder", "a folder"), (Path("/dev/zero"), "a device")):
        with pytest.raises(ImageError, match=f"is {kind}, not a file"):
            open_regular(path, error=ImageError)


def test_what_is_not_there_may_be_another_error(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    for name in ("b", "a/b", "dangling"):
        with pytest.raises(BundleError, match="not there"):
            open_regular(tmp_path / name, error=ImageError, missing=BundleError)
        with pytest.raises(ImageError):
            open_regular(tmp_path / name, error=ImageError)


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 5000, "loop"])
def test_impossible_names(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ImageError) as raised:
        open_regular(tmp_path / name, error=ImageError)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 300


def test_a_giant_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ImageError, match=r"has 1,099,511,627,776 bytes; at most 1,000 are read"):
        read_regular(tmp_path / "sparse", error=ImageError, max_bytes=1000)


def test_a_stream_is_read_up_to_a_limit() -> None:
    read, write = os.pipe()
    os.write(write, b"12345")
    os.close(write)
    with os.fdopen(read, "rb") as stream, pytest.raises(ImageError, match="stdin has more than 4 bytes"):
        read_bounded(stream, "stdin", error=ImageError, max_bytes=4)


def test_text_must_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    with pytest.raises(ImageError, match="is not UTF-8 text"):
        read_text(tmp_path / "a", error=ImageError)
    (tmp_path / "b").write_bytes("ä\r\n".encode())
    assert read_text(tmp_path / "b", error=ImageError) == "ä\r\n"


@pytest.mark.parametrize("value", [{"a": [1, 2.5, None, True, "字\U0001f600"]}, [], 10**30, "x"])
def test_json_is_parsed(value: object) -> None:
    for ascii_only in (False, True):
        text = json.dumps(value, ensure_ascii=ascii_only)
        assert parse_json(text, "it", error=OptionError) == value
        assert parse_json(b"\xef\xbb\xbf" + text.encode(), "it", error=OptionError) == value


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[" * 100_000, "nested more than 64 levels deep"),
        ("[" * 65 + "]" * 65, "nested more than 64 levels deep"),
        ('{"a":' * 65 + "1" + "}" * 65, "nested more than 64 levels deep"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' stands twice"),
        ("NaN", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[1e999]", r"not JSON \(\[0\]=Infinity is no number\)"),
        ('{"a": [1, {"b\\n": [2, -1e999]}], "c": NaN}', r"\(a\[1\]\.b\\n\[1\]=-Infinity is no number\)"),
        ("1" + "0" * 5000, "is not JSON"),
        (r'["\ud800"]', "half a character"),
        (r'{"\udc00": 1}', "half a character"),
        ('["\ud800"]', "half a character"),
        (b'["\xff"]', "not UTF-8"),
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[1]" + " " * 200, "more than 200 bytes"),
    ],
)
def test_bad_json_is_one_short_line(text: str | bytes, complaint: str) -> None:
    limit = 200 if len(text) == 203 else 1 << 20
    with pytest.raises(OptionError, match=complaint) as raised:
        parse_json(text, "it", error=OptionError, max_bytes=limit)
    assert isinstance(raised.value, McvError) and str(raised.value).isprintable() and len(str(raised.value)) < 250


def test_depth_of_json_up_to_the_limit() -> None:
    assert parse_json("[" * 64 + "]" * 64, "it", error=OptionError)
    assert parse_json("[[1]]", "it", error=OptionError, max_depth=2) == [[1]]
    with pytest.raises(OptionError):
        parse_json("[[[]]]", "it", error=OptionError, max_depth=2)


def test_strangers_values_in_messages() -> None:
    assert shown("a\x1b[31m\n字") == r"'a\x1b[31m\n字'"
    assert shown({"a": 1}) == "{'a': 1}"
    assert shown("a" * 1_000_000) == "'" + "a" * 80 + "'..."
    assert len(shown(["a"] * 10_000)) < 90
    assert shown("\u202eabc") == r"'\u202eabc'"


def test_a_name_that_is_too_long_behind_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ImageError, match="is not there"):
        open_regular(tmp_path / "none" / ("a" * 300), error=ImageError)
