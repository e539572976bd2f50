"""What a batch asks: which files of a folder are pictures, and what a row says."""

import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mcv_runtime import OptionError, Options, Video
from mcv_runtime.batch import lines as batch_lines
from mcv_runtime.batch.rows import FIELDS, Defaults, Paging
from mcv_runtime.batch.sources import batch_source

DEFAULTS = Defaults(prompt="What?", system="Be brief.", options=Options(max_new_tokens=5), model="demo")
PNG = (Path(__file__).parents[2] / "models" / "tiny" / "demo.png").read_bytes()


def put(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def rows(tmp_path, *lines):
    path = put(tmp_path, *lines)
    source = batch_source(path, DEFAULTS)
    found = list(source.rows())
    assert source.count() == len(found)
    return found


def row(tmp_path, **fields):
    return rows(tmp_path, fields)[0]


def test_pictures_are_told_by_name_or_content(tmp_path):
    picture = Image.new("RGB", (32, 32), "red")
    names = {
        "a.png": "PNG", "b.PNG": "PNG", "c.jfif": "JPEG", "d.JPE": "JPEG", "e.jpeg": "JPEG", "f.tif": "TIFF", "g.TIFF": "TIFF",
        "h.webp": "WEBP", "i.gif": "GIF", "j.bmp": "BMP", "k.dib": "DIB", "l.pgm": "PPM", "m.jp2": "JPEG2000",
        "n.j2k": "JPEG2000",
        "o.pcx": "PCX", "p.avif": "AVIF", "q.tga": "TGA", "r.ico": "ICO", "s.sgi": "SGI", "t": "PNG", "u.jpg_large": "JPEG",
        "v.jpg.bak": "JPEG", "w.dat": "WEBP", "x.txt": "GIF", "y y.heic": "JPEG", "data:z.png": "PNG", "~.png": "PNG",
    }  # fmt: skip
    for name, kind in names.items():
        picture.save(tmp_path / name, kind)
    (tmp_path / "damaged.jpg").write_text("said to be a picture: an error of its own")
    (tmp_path / "scan.PDF").write_bytes(b"damaged too")
    (tmp_path / "letter").write_bytes(b"%PDF-1.7")
    wanted = sorted([*names, "damaged.jpg", "scan.PDF", "letter"])
    source = batch_source(tmp_path, DEFAULTS)
    asked = list(source.rows())
    assert source.left_out == ""
    assert [row.request.images for row in asked] == [[tmp_path / name] for name in wanted]
    assert [row.said for row in asked] == [{"image": name} for name in wanted]
    assert [row.number for row in asked] == list(range(1, source.count() + 1))


def test_what_is_no_picture_is_left_out_and_counted(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    for name in (".DS_Store", "._a.png", ".hidden.jpg"):
        (tmp_path / name).write_bytes(PNG)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "elsewhere").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone")
    others = {
        "clip.mp4": b"\0\0\0\x18ftypisom", "clip.MPG": b"\0\0\1\xba", "e.eps": b"%!PS-Adobe",
        "page.svg": b"<svg/>", "photo.psd": b"8BPS\0\1", "Thumbs.db": b"\xd0\xcf\x11\xe0",
        "notes.txt": b"P6 is what it begins with", "empty": b"", "bmw.txt": b"BM and so on", "raw.dng": b"II*\0\x08\0\0\0\0\0",
    }  # fmt: skip
    for name, data in others.items():
        (tmp_path / name).write_bytes(data)
    found = batch_source(tmp_path, DEFAULTS)
    for _ in range(2):
        assert [row.said for row in found.rows()] == [{"image": "a.png"}]
        named = "'Thumbs.db', 'bmw.txt', 'clip.MPG', 'clip.mp4', 'e.eps'"
        assert found.left_out == f"3 hidden, 1 links to folders, {named}, {len(others) + 2 - 5} more"
    (tmp_path / "a.png").unlink()
    with pytest.raises(OptionError, match=r"no pictures in .*left out: 3 hidden"):
        list(batch_source(tmp_path, DEFAULTS).rows())


def test_folders_in_a_folder_are_gone_through_in_order(tmp_path):
    for name in ("b/2.png", "b/10.png", "a.png", "c.png", "b/.hidden/x.png", "b/deep/er/y.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    found = [row.said["image"] for row in batch_source(tmp_path, DEFAULTS).rows()]
    assert found == ["a.png", "b/10.png", "b/2.png", "b/deep/er/y.png", "c.png"]
    deep = tmp_path / "b"
    for _ in range(70):
        deep /= "d"
        deep.mkdir()
    with pytest.raises(OptionError, match="64 folders deep"):
        list(batch_source(tmp_path, DEFAULTS).rows())


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_null_is_as_left_out(tmp_path, name):
    said = {"image": "a.png"} if name == "images" else {"images": ["a.png"]}
    without, null = rows(
        tmp_path, {**said, "id": 7} if name != "id" else said, {**said, name: None, **({} if name == "id" else {"id": 7})}
    )
    assert null.error == ""
    assert (null.digest, null.said, null.request.prompt) == (without.digest, without.said, "What?")
    assert (null.request.system, null.request.options) == ("Be brief.", without.request.options)
    assert null.request.images == without.request.images == [tmp_path / "a.png"]


def test_nulls_in_lists_and_in_every_field(tmp_path):
    assert row(tmp_path, images=["a.png", None]).request.images == [tmp_path / "a.png"]
    assert row(tmp_path, image=None, images=[None], video=[]).request.images == []
    assert "no field 'imge'" in row(tmp_path, imge=None).error


@pytest.fixture
def report(tmp_path, make_pdf):
    bodies = [b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 100 50]>>"] * 3
    (tmp_path / "report.pdf").write_bytes(make_pdf(*bodies, kids=[3, 4, 5]))
    (tmp_path / "a.png").write_bytes(PNG)
    return tmp_path


def test_pages_of_documents(report):
    (whole,) = rows(report, {"image": "report.pdf"})
    assert (whole.request.images, whole.said) == ([report / "report.pdf"], {"image": "report.pdf"})
    (some,) = rows(report, {"image": "report.pdf", "pages": "2-", "dpi": 72})
    (document,) = some.request.images
    assert (document.source, document.pages, document.dpi) == (report / "report.pdf", "2-", 72)
    each = {"image": "report.pdf", "each_page": True}
    found = list(
        batch_source(put(report, {**each, "id": 7}, {**each, "pages": "3,1"}, {**each, "image": "a.png"}), DEFAULTS).rows()
    )
    assert [(row.number, row.said.get("page")) for row in found] == [(1, 1), (1, 2), (1, 3), (2, 3), (2, 1), (3, None)]
    assert [row.request.images[0].number for row in found[:5]] == [1, 2, 3, 3, 1]
    assert found[0].said == {"id": 7, "image": "report.pdf", "page": 1}
    assert found[5].request.images == [report / "a.png"]
    assert len({row.digest for row in (whole, some, *found)}) == 8


def test_pages_by_the_command_s_options(report):
    defaults = Defaults(prompt="What?", system=None, options=Options(), model="demo", paging=Paging("2-", 72, each_page=True))
    source = put(report, {"image": "report.pdf"}, {"image": "report.pdf", "pages": "1", "each_page": False})
    first, second, third = batch_source(source, defaults).rows()
    assert [first.said["page"], second.said["page"]] == [2, 3]
    assert third.request.images[0].pages == "1"
    found = [(row.said["image"], row.error) for row in batch_source(report, defaults).rows()]
    assert found == [
        ("a.png", f"{report / 'a.png'} has no page 2, it ends with page 1"), ("report.pdf", ""), ("report.pdf", "")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"each_page": True, "pages": "9"}, "no page 9"),
        ({"pages": "x"}, "pages are numbers"),
        ({"pages": True}, "pages are numbers"),
        ({"pages": 1.5}, "pages are numbers"),
        ({"pages": {"a": 1}}, "pages are numbers"),
        ({"pages": 9, "each_page": True}, "no page 9"),
        ({"dpi": 0}, "dpi must be"),
        ({"each_page": 1}, "true or false"),
        ({"each_page": True, "video": "a.mp4"}, "one document and nothing else"),
        ({"each_page": True, "images": ["a.png"]}, "one document and nothing else"),
        ({"each_page": True, "image": "broken.pdf"}, "cut off or damaged"),
    ],
)
def test_pages_that_make_no_sense_are_the_row_s_error(report, fields, words):
    (report / "broken.pdf").write_bytes(b"%PDF-1.7")
    bad, good = rows(report, {"image": "report.pdf", **fields}, {"image": "a.png"})
    assert (words in bad.error, good.error) == (True, "")


def test_where_files_are(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    seen = row(
        tmp_path, image=["a.png", "/b.png"], images=["~/c.png", "~nobody-of-that-name/d.png"], video="e.mp4"
    ).request.images
    home = tmp_path / "home"
    assert seen[:4] == [tmp_path / "a.png", Path("/b.png"), home / "c.png", tmp_path / "~nobody-of-that-name/d.png"]
    assert isinstance(seen[4], Video)
    assert seen[4].source == tmp_path / "e.mp4"


@pytest.mark.parametrize("name", ["image", "images", "video"])
@pytest.mark.parametrize(
    "value", ["data:image/png;base64," + "iVBORw0KGgo" * 100_000, "https://example.com/" + "a" * 9000, "b" * 5000]
)
def test_what_is_no_path_is_not_repeated(tmp_path, name, value):
    for given in (value, [value, "a.png"]):
        found = row(tmp_path, id="x" * 5000, **{name: given})
        assert "is no path of a file" in found.error
        assert len(found.error) < 200
        assert found.said["id"] == "x" * 5000
        assert len(json.dumps(found.said[name])) < 200
        assert value[:80] in json.dumps(found.said[name])


def test_rows_from_a_pipe_name_files_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(PNG)
    line = b'{"image": "a.png"}\n'
    reading, writing = os.pipe()
    os.write(writing, line)
    os.close(writing)
    (tmp_path / "rows").write_bytes(line)
    with (tmp_path / "rows").open("rb") as redirected:  # as by `<`
        for number in (reading, redirected.fileno()):
            (found,) = batch_source(Path(f"/dev/fd/{number}"), DEFAULTS).rows()
            assert (found.error, found.request.images) == ("", [Path("a.png")])
    os.close(reading)


def test_a_row_names_plain_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "self.png").symlink_to("/proc/self/status")
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "fine.png").symlink_to("a.png")
    for name in ("image", "images", "video"):
        for path in ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0", "/proc/self/environ", "/dev/../dev/zero", "/dev/null"):
            assert "is not a plain file" in row(tmp_path, **{name: path}).error
        for path in ("pipe.png", "link.png", "zero.png", "self.png", "folder", "~/../../dev/tty"):
            assert "is not a plain file" in row(tmp_path, **{name: ["a.png", path]}).error
    assert row(tmp_path, images=["fine.png", "a.png", "gone.png"]).error == ""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"id": 1, "id": 2}', "the key 'id' stands twice"),
        ('{"temperature": NaN}', "temperature=NaN is no number"),
        ('{"timeout": 1e999}', "timeout=Infinity is no number"),
        ('{"id": ' + "[" * 1000 + "]" * 1000 + "}", "nested more than 64 levels"),
        ("[" * 100_000, "not JSON"),
        ('{"id": 1', "not JSON"),
        ('{"prompt": "\\ud800"}', "half a character"),
        ("[]", "not a JSON object"),
        ("null", "not a JSON object"),
        (json.dumps({"x" * 100_000: 1}), "no field 'xxx"),
        (json.dumps({"\x1b[31m": 1}), "\\x1b[31m"),
        (json.dumps({"image": [7]}), "path of a file"),
        (json.dumps({"image": ""}), "path of a file"),
        (json.dumps({"image": {"a": 1}}), "path of a file"),
        (json.dumps({"prompt": 7}), "texts"),
    ],
    ids=range(15),
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_one_short_line(tmp_path, line, words):
    bad, good = rows(tmp_path, line, {"image": "a.png"})
    assert words in bad.error
    assert bad.request is None
    assert len(bad.error) < 300
    assert bad.error.isprintable()
    assert good.request is not None


def test_a_row_that_is_too_long_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(batch_lines, "ROW_BYTES", 1000)
    found = rows(tmp_path, {"id": 1, "prompt": "x" * 100_000}, {"id": 2}, "y" * 5000, {"id": 3})
    assert [one.number for one in found] == [1, 2, 3, 4]
    assert [bool(one.error) for one in found] == [True, False, True, False]
    assert "more than 1,000 bytes" in found[0].error


def test_what_is_no_file_of_rows(tmp_path):
    for path in (Path("/dev/zero"), tmp_path / "gone"):
        with pytest.raises(OptionError):
            next(batch_source(path, DEFAULTS).rows())
    for content in (b"%PDF-1.7\n", b"\x89PNG\r\n", b"\x28\xb5\x2f\xfd", '{"prompt": "What?"}\n'.encode("utf-16")):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(OptionError, match="holds no lines of JSON; --batch takes"):
            next(batch_source(tmp_path / "other", DEFAULTS).rows())
    shutil.rmtree(tmp_path)
