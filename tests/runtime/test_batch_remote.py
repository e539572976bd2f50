"""Batches from stores and into them, over fsspec's store in memory, which needs no network."""

import builtins
import io
import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from mcv_runtime import OptionError, Options, load
from mcv_runtime.batch import remote, remote_output
from mcv_runtime.batch.remote import RemoteFile, fetched_folders, place_of
from mcv_runtime.batch.rows import Defaults, Paging, fetched
from mcv_runtime.batch.sources import batch_source
from mcv_runtime.command.batch_cli import answer_batch

fsspec = pytest.importorskip("fsspec")
DEMO = (Path(__file__).parents[2] / "models" / "tiny" / "demo.png").read_bytes()
TEXT = "What does the text say?"
DEFAULTS = Defaults(prompt=TEXT, system=None, options=Options(max_new_tokens=20), model="demo")


@pytest.fixture
def store(monkeypatch, tmp_path):
    monkeypatch.setenv("MCV_CACHE", str(tmp_path / "cache"))
    files = fsspec.filesystem("memory")
    files.store.clear()
    files.pseudo_dirs[:] = [""]
    yield files
    files.store.clear()


@pytest.fixture(scope="module")
def engine():
    with load(threads=1) as opened:
        yield opened


def put(store, name, data):
    store.pipe_file(name, data if isinstance(data, bytes) else "".join(f"{json.dumps(row)}\n" for row in data).encode())


def run(engine, source, out, defaults=DEFAULTS):
    notices = io.StringIO()
    return answer_batch(engine, place_of(source), place_of(out), defaults, 2, notices), notices.getvalue()


def lines(store, name):
    return [json.loads(line) for line in store.cat_file(name).splitlines()]


def test_addresses_of_stores_of_this_machine_and_of_neither():
    assert place_of("s3://bucket/a/b.jsonl") == RemoteFile("s3", "bucket/a/b.jsonl")
    assert place_of("file:///tmp/a%20b") == Path("/tmp/a b")
    assert place_of("a/b.jsonl") == Path("a/b.jsonl")
    for text in ("https://a.example/b", "s3://", "s3://a/../b", "zip://x::s3://a/b", "s3://a::memory://b", "file://host/a"):
        with pytest.raises(OptionError) as refused:
            place_of(text)
        assert "\n" not in str(refused.value)


def test_a_folder_of_a_store_and_its_answers_there(store, engine):
    for name in ("in/a.png", "in/deeper/b.png", "in/.hidden", "in/notes.txt"):
        put(store, name, DEMO)
    code, said = run(engine, "memory://in", "memory://out/answers.jsonl")
    assert code == 0
    assert "'notes.txt'" in said and "1 hidden" in said
    assert [(one["image"], one["answer"]) for one in lines(store, "out/answers.jsonl")] == [
        ("a.png", "HELLO"), ("deeper/b.png", "HELLO"),
    ]  # fmt: skip


def test_rows_name_what_lies_beside_them_and_the_rest_only_where_it_is_allowed(store, engine, tmp_path):
    put(store, "in/a.png", DEMO)
    put(store, "secret/a.png", DEMO)
    rows = [{"image": "a.png"}, {"image": "../secret/a.png"}, {"image": "/etc/hostname"}, {"image": "memory://secret/a.png"},
            {"image": "https://a.example/a.png"}, {"image": "gone.png"}, {"video": "a.png"}]  # fmt: skip
    put(store, "in/rows.jsonl", rows)
    assert run(engine, "memory://in/rows.jsonl", "memory://out.jsonl")[0] == 1
    first, *others = lines(store, "out.jsonl")
    assert first["answer"] == "HELLO"
    words = ["leads out", "leads out", "not fetched", "no path of a file", "not there", "on this machine"]
    assert all(word in other["error"] for word, other in zip(words, others, strict=True))
    here = tmp_path / "rows.jsonl"
    here.write_text('{"image": "memory://secret/a.png"}\n{"image": "memory://secrets/a.png"}\n')
    allowed = Defaults(prompt=TEXT, system=None, options=Options(), model="demo", fetch=fetched_folders(["memory://secret"]))
    first, second = batch_source(here, allowed).rows()
    assert fetched(first.request).images == [DEMO]
    assert "--fetch" in second.error
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "memory://secret/a.png"}}]}]}
    here.write_text(json.dumps({"custom_id": "1", "body": body}))
    (chat,) = batch_source(here, allowed).rows()
    assert fetched(chat.request).messages[0]["content"] == [DEMO]
    assert "--fetch" in next(batch_source(here, DEFAULTS).rows()).error
    with pytest.raises(OptionError, match="on this machine"):
        fetched_folders([str(tmp_path)])


def test_a_table_of_a_store_and_pages_of_its_documents(store, engine, tmp_path):
    parquet.write_table(pa.table({"image": ["a.png", "b.png"], "id": ["x", "y"]}), tmp_path / "rows.parquet")
    put(store, "in/rows.parquet", (tmp_path / "rows.parquet").read_bytes())
    put(store, "in/a.png", DEMO)
    put(store, "in/b.png", DEMO)
    assert run(engine, "memory://in/rows.parquet", "memory://out/answers.parquet")[0] == 0
    found = parquet.read_table(io.BytesIO(store.cat_file("out/answers.parquet"))).to_pylist()
    assert [(one["id"], one["answer"]) for one in found] == [("x", "HELLO"), ("y", "HELLO")]
    assert store.find("out") == ["/out/answers.parquet"]
    each = Defaults(prompt=TEXT, system=None, options=Options(), model="demo", paging=Paging(each_page=True))
    first, _ = batch_source(place_of("memory://in"), each).rows()
    assert (first.request.images, first.said) == ([DEMO], {"image": "a.png"})
    put(store, "in/rows.parquet", b"no table")
    with pytest.raises(OptionError, match="no Parquet"):
        run(engine, "memory://in/rows.parquet", "memory://out/answers.parquet")


def test_the_store_has_answers_before_all_are_there(store, engine, monkeypatch):
    monkeypatch.setattr(remote_output, "_EVERY_S", 0.0)
    put(store, "in/rows.jsonl", [{"prompt": TEXT, "id": number, "max_new_tokens": 1} for number in range(3)])
    there, real = [], type(store).put_file

    def noted(self, file, path, **more):
        real(self, file, path, **more)
        there.append((path.strip("/"), len(lines(store, path)) if path.endswith(".rows") else None))

    monkeypatch.setattr(type(store), "put_file", noted)
    assert run(engine, "memory://in/rows.jsonl", "memory://out.parquet")[0] == 0
    assert there == [("out.parquet.rows", 1), ("out.parquet.rows", 2), ("out.parquet.rows", 3), ("out.parquet", None)]
    assert store.find("") == ["/in/rows.jsonl", "/out.parquet"]


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.parquet"])
def test_what_was_stopped_goes_on_from_the_store_on_another_machine(store, engine, name, monkeypatch, tmp_path):
    put(store, "in/a.png", DEMO)
    put(store, "in/rows.jsonl", [{"image": "a.png", "id": number} for number in range(6)])

    class Stopped:
        asked = 0

        def submit(self, request, **more):
            Stopped.asked += 1
            if Stopped.asked == 5:
                raise KeyboardInterrupt
            return engine.submit(request, **more)

    with pytest.raises(KeyboardInterrupt):
        run(Stopped(), "memory://in/rows.jsonl", f"memory://out/{name}")
    (there,) = store.find("out")
    kept = len(lines(store, there))
    assert 0 < kept < 6
    monkeypatch.setenv("MCV_CACHE", str(tmp_path / "another"))
    code, said = run(engine, "memory://in/rows.jsonl", f"memory://out/{name}")
    assert (code, f"{kept} were there" in said, store.find("out")) == (0, True, [f"/out/{name}"])
    monkeypatch.setenv("MCV_CACHE", str(tmp_path / "cache"))
    assert f"{kept} were there" in run(engine, "memory://in/rows.jsonl", f"memory://out/{name}")[1]  # what it has itself
    assert "6 were there" in run(engine, "memory://in/rows.jsonl", f"memory://out/{name}")[1]
    assert not [path for path in (tmp_path / "cache").rglob("answers*") if path.is_file()]


def test_a_store_that_fails_is_one_line_and_nothing_is_lost(store, engine, monkeypatch):
    put(store, "in/rows.jsonl", [{"prompt": TEXT}])

    def full(*given, **more):
        raise RuntimeError("no room\nat all")

    with monkeypatch.context() as patch:
        patch.setattr(type(store), "put_file", full)
        with pytest.raises(OSError, match=r"^memory://out\.jsonl cannot be used: no room$"):
            run(engine, "memory://in/rows.jsonl", "memory://out.jsonl")
    code, said = run(engine, "memory://in/rows.jsonl", "memory://out.jsonl")
    assert (code, "1 were there" in said, len(lines(store, "out.jsonl"))) == (0, True, 1)


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *more):
        if name == "fsspec":
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    remote._store.cache_clear()
    with pytest.raises(OptionError, match=r"s3:// needs s3fs; install it with `pip install minicpmv-onnx\[remote\]`"):
        place_of("s3://bucket/a.jsonl").exists()
    remote._store.cache_clear()
