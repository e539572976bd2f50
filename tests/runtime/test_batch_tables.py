"""Batches from Parquet files, tar archives and OpenAI's lines, and answers as a Parquet file."""

import base64
import io
import json
import tarfile
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from mcv_runtime import OptionError, Options, OutputError, Video
from mcv_runtime.batch.answer_table import AnswerTable
from mcv_runtime.batch.rows import BatchRow, Defaults
from mcv_runtime.batch.sources import batch_source

DEFAULTS = Defaults(prompt="What?", system=None, options=Options(max_new_tokens=5), model="demo")
PNG = (Path(__file__).parents[2] / "models" / "tiny" / "demo.png").read_bytes()
URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


def table(tmp_path, columns, name="rows.parquet", **options):
    parquet.write_table(pa.table(columns), tmp_path / name, **options)
    return tmp_path / name


def rows(path):
    return list(batch_source(path, DEFAULTS).rows())


def error(path):
    with pytest.raises(OptionError) as raised:
        rows(path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("image", "seen", "said"),
    [
        (["a.png", None], ["a.png"], "a.png"),
        ([PNG, None], [PNG], None),
        ([{"bytes": PNG, "path": "x/a.png"}, None], [PNG], "x/a.png"),
        ([{"bytes": PNG, "path": None}, None], [PNG], None),
        ([{"bytes": None, "path": "a.png"}, {"bytes": None, "path": None}], ["a.png"], "a.png"),
        ([["a.png", "a.png"], []], ["a.png", "a.png"], ["a.png", "a.png"]),
        ([[{"bytes": PNG, "path": "b.png"}], None], [PNG], ["b.png"]),
    ],
    ids=["path", "bytes", "struct", "struct of bytes", "struct of a path", "list", "list of structs"],
)
def test_pictures_of_a_table(tmp_path, image, seen, said):
    path = table(tmp_path, {"image": image, "id": ["first", None], "max_new_tokens": pa.array([3, None], pa.int32())})
    first, second = rows(path)
    assert first.request.images == [tmp_path / one if isinstance(one, str) else one for one in seen]
    assert first.said == ({"id": "first"} if said is None else {"id": "first", "image": said})
    assert (first.request.options.max_new_tokens, second.request.options.max_new_tokens) == (3, 5)
    assert (second.request.images, second.said, second.request.prompt) == ([], {}, "What?")


def test_columns_that_are_no_fields_stay_with_the_table(tmp_path):
    path = table(
        tmp_path, {"image": [PNG, PNG], "label": [1, 2], "prompt": ["Which?", "Where?"], "temperature": [float("nan"), 0.5]}
    )
    source = batch_source(path, DEFAULTS)
    first, second = source.rows()
    assert (source.left_out, source.count()) == ("'label'", 2)
    assert (first.request.prompt, first.request.options.temperature, second.request.options.temperature) == (
        "Which?",
        None,
        0.5,
    )
    other = table(tmp_path, {"image": [PNG[:-1]], "prompt": ["Which?"]}, "other.parquet")
    assert len({first.digest, second.digest, rows(other)[0].digest}) == 3
    assert "has no column image, images, video or prompt, but 'label'" in error(table(tmp_path, {"label": [1]}, "c.parquet"))


def test_rows_of_a_table_that_make_no_sense(tmp_path):
    path = table(tmp_path, {"image": ["../../dev/zero", "gone.png", "/dev/zero"], "max_new_tokens": [1, 2, 3]})
    found = rows(path)
    assert [row.number for row in found] == [1, 2, 3]
    assert "not a plain file" in found[2].error
    bad = rows(table(tmp_path, {"image": [{"bytes": PNG, "size": 3}]}, "d.parquet"))
    assert "path of a file" in bad[0].error
    assert "texts" in rows(table(tmp_path, {"prompt": [7]}, "e.parquet"))[0].error


def test_columns_of_types_that_requests_have_not(tmp_path):
    """An id is for people: a date is a text. Else what JSON could not say is an error of its row alone."""
    ids = [date(2026, 1, 1), Decimal("1.50"), datetime(2026, 1, 1, 12)]
    for number, (given, said) in enumerate(zip(ids, ["2026-01-01", "1.50", "2026-01-01T12:00:00"], strict=True)):
        (row,) = rows(table(tmp_path, {"id": [given], "image": ["a.png"]}, f"{number}.parquet"))
        assert (row.error, row.said["id"]) == ("", said)
    bad = {"id": [b"x", float("inf"), [float("nan")], {"a": date(2026, 1, 1)}], "json_schema": [{"a": datetime(2026, 1, 1)}],
           "tools": [[b"x"]], "image": [{"bytes": PNG, "more": "x"}], "images": [[[PNG]]]}  # fmt: skip
    for name, values in bad.items():
        for value in values:
            (row,) = rows(table(tmp_path, {"prompt": ["What?"], name: [value]}, "bad.parquet"))
            assert row.error
            json.dumps(row.said)
    assert rows(table(tmp_path, {"id": ["a"], "image": [{"bytes": "no", "path": None}]}, "a.parquet"))[0].said == {"id": "a"}


def test_all_rows_before_a_damaged_group_are_read(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pa.table({"prompt": [f"{at} {'x' * 200}" for at in range(60)]}), path, row_group_size=10,
                        compression="none", use_dictionary=False)  # fmt: skip
    start = parquet.ParquetFile(path).metadata.row_group(3).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    source = batch_source(path, DEFAULTS).rows()
    assert [next(source).number for _ in range(30)] == list(range(1, 31))
    with pytest.raises(OptionError, match="damaged behind row 30"):
        next(source)


def test_what_is_no_table_is_one_line(tmp_path):
    path = table(tmp_path, {"image": [bytes([at % 256]) * 5000 for at in range(2000)]}, compression="none")
    data = path.read_bytes()
    for damaged in (b"", b"PAR1", data[:1000], data[:-100], b"x" * 100):
        path.write_bytes(damaged)
        assert "is no Parquet file, or damaged" in error(path)
    path.write_bytes(data[:100] + bytes(len(data) // 2) + data[100 + len(data) // 2 :])
    assert "damaged behind row" in error(path)
    assert "not there" in error(tmp_path / "gone.parquet")


def archive(tmp_path, *files, name="rows.tar", mode="w"):
    with tarfile.open(tmp_path / name, mode) as tar:
        for path, content in files:
            info = tarfile.TarInfo(path)
            if content is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(info)
            else:
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return tmp_path / name


@pytest.mark.parametrize(("name", "mode"), [("rows.tar", "w"), ("a.TAR.GZ", "w:gz"), ("a.tgz", "w:gz"), ("a.tar.xz", "w:xz")])
def test_samples_of_an_archive(tmp_path, name, mode):
    path = archive(
        tmp_path,
        ("./in/0001.png", PNG), ("./in/0001.json", {"prompt": "Which?", "max_new_tokens": 3, "url": "https://a"}),
        ("./in/0001.txt", b"a caption"), ("./in/.DS_Store", b"x"),
        ("./in/0002.left.png", PNG), ("./in/0002.right.jpg", PNG[:9]), ("./in/0002.json", {"id": 2}),
        ("0003.json", b"[broken"), ("0004.png", None), ("0005.json", {"image": "a.png", "prompt": "Which?"}),
        ("0006.mp4", b"x"), ("0007.png", PNG), ("0007.json", None), ("0001.json", {"prompt": "Which?"}),
        name=name, mode=mode,
    )  # fmt: skip
    source = batch_source(path, DEFAULTS)
    first, second, third, fourth, *others = source.rows()
    assert (first.request.images, first.request.prompt, first.request.options.max_new_tokens) == ([PNG], "Which?", 3)
    assert first.said == {"id": "./in/0001", "image": "./in/0001.png"}
    assert (second.said["id"], second.request.images, second.request.prompt) == (2, [PNG, PNG[:9]], "What?")
    assert ("not JSON" in third.error, third.said) == (True, {"id": "0003"})
    assert "no plain file" in fourth.error
    words = ["the sample '0005' has no picture", "the sample '0006' has", "0007.json is no plain file", "'0001' has no picture"]
    assert [(word in row.error, row.number) for word, row in zip(words, others, strict=True)] == [
        (True, at) for at in range(5, 9)
    ]
    assert source.left_out == "'url of .json', '.txt', '.mp4'"


def test_an_archive_that_is_cut_off_gives_what_it_has(tmp_path):
    path = archive(tmp_path, *((f"{at}.png", PNG) for at in range(50)))
    data, one = path.read_bytes(), 512 + len(PNG) + -len(PNG) % 512
    for length, whole in (
        (20 * one, 19),
        (20 * one + 100, 19),
        (20 * one + 600, 19),
        (50 * one, 49),
    ):  # the last may lack a file
        path.write_bytes(data[:length])
        source = batch_source(path, DEFAULTS).rows()
        assert [next(source).error for _ in range(whole)] == [""] * whole
        with pytest.raises(OptionError, match="is damaged behind"):
            list(source)
    path.write_bytes(b"no tar")
    assert "no tar archive" in error(path)


def chat(tmp_path, body, **more):
    path = tmp_path / "batch.jsonl"
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body, **more}
    path.write_text(json.dumps(line) + "\n")
    (row,) = rows(path)
    return row


ASKED = [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": URL}}]}]


def test_a_request_as_openai_s_batches_have_it(tmp_path):
    body = {
        "model": "any", "max_completion_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": -1, "seed": 3, "stop": ["x"],
        "messages": [{"role": "system", "content": "Be brief."}, *ASKED], "response_format": {"type": "text"},
        "stream": False, "user": "me", "presence_penalty": None, "logit_bias": {"5": -1.5}, "repeat_guard": 64,
        "chat_template_kwargs": {"enable_thinking": False}, "mm_processor_kwargs": {"max_slice_nums": 4},
    }  # fmt: skip
    row = chat(tmp_path, body)
    assert (row.error, row.said) == ("", {"custom_id": "a"})
    assert row.request.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ["What?", PNG]}]
    assert row.request.options.given() == {
        "max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["x"], "logit_bias": {5: -1.5},
        "repeat_guard": 64, "thinking": False, "max_slice_nums": 4,
    }  # fmt: skip
    assert row.digest != chat(tmp_path, {**body, "seed": 4}).digest


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({"temperature": 0, "top_p": 0.9, "seed": 1}, {}),
        ({"top_p": 1.0}, {}),
        ({"n": 2}, {"num_return_sequences": 2, "temperature": 1.0}),
        ({"response_format": {"type": "json_object"}}, {"json_schema": {"type": "object"}}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"a": 1}}}},
            {"json_schema": {"a": 1}},
        ),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choices": ["a", "b"]}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"max_tokens": 9}, {"max_new_tokens": 9}),
        ({"logprobs": True, "top_logprobs": 2}, {"logprobs": True, "top_logprobs": 2}),
    ],
)
def test_options_of_a_body(tmp_path, given, options):
    found = chat(tmp_path, {"messages": ASKED, **given})
    assert (found.error, found.request.options.given()) == ("", {"max_new_tokens": 5, **options})


def test_pictures_of_a_body(tmp_path):
    def seen(**part):
        row = chat(tmp_path, {"messages": [{"role": "user", "content": [part]}]})
        return row.error or row.request.messages[0]["content"][0]

    path = tmp_path / "a b.png"
    assert seen(type="image_url", image_url=URL) == PNG
    assert seen(type="image_url", image_url={"url": f"file://{tmp_path}/a%20b.png"}) == path
    assert seen(type="file", file={"filename": "a.pdf", "file_data": URL}) == PNG
    video = seen(type="video_url", video_url={"url": f"file://{tmp_path}/a.mp4"})
    assert isinstance(video, Video)
    assert "is not fetched" in seen(type="image_url", image_url={"url": "https://example.com/a.png"})
    assert "is not fetched" in seen(type="image_url", image_url={"url": "file://host/a.png"})
    assert "not a plain file" in seen(type="image_url", image_url="file:///dev/zero")
    assert "not base64" in seen(type="image_url", image_url="data:image/png;base64,!!!")
    assert "a part is of the type" in seen(type="input_audio", input_audio={})
    low = {"type": "image_url", "image_url": {"url": URL, "detail": "low"}}
    assert chat(tmp_path, {"messages": [{"role": "user", "content": [low]}]}).request.options.max_slice_nums == 1


@pytest.mark.parametrize(
    ("body", "more", "words"),
    [
        ({"messages": ASKED, "tools": []}, {}, "'tools', which is not understood"),
        ({"messages": ASKED, "max_tokens": 1, "max_completion_tokens": 2}, {}, "twice"),
        ({"messages": ASKED, "stream": True}, {}, "whole answers"),
        ({"messages": ASKED, "mm_processor_kwargs": {"x": 1}}, {}, "mm_processor_kwargs may say"),
        ({"messages": ASKED, "response_format": {"type": "json_schema"}}, {}, "response_format"),
        ({"messages": ASKED, "logit_bias": {"a": 1}}, {}, "token id"),
        ({"messages": ASKED, "temperature": "hot"}, {}, "a number"),
        ({}, {}, "no messages"),
        ({"messages": ["a"]}, {}, "no messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, {}, "of the role"),
        ({"messages": [{"role": "user", "content": None}]}, {}, "list of parts"),
        ([], {}, "custom_id"),
        ({"messages": ASKED}, {"url": "/v1/embeddings"}, "takes POST /v1/chat/completions"),
        ({"messages": ASKED}, {"custom_id": 7}, "custom_id"),
        ({"messages": ASKED}, {"more": 7}, "no field 'more'"),
    ],
    ids=range(15),
)
def test_a_body_that_is_not_understood_is_one_line(tmp_path, body, more, words):
    row = chat(tmp_path, body, **more)
    assert words in row.error
    assert (row.request, len(row.error) < 300, row.error.isprintable()) == (None, True, True)


def answer(number, digest="d", **more):
    timings = {"preprocess": 0.1, "vision": 0.2, "prefill": 0.3, "decode": 0.4}
    told = {"answer": f"text {number}", "stop_reason": "stop", "tokens": 3, "prompt_tokens": 9, "timings": timings}
    return {"row": number, **more, **told, "request": digest}


MIXED = [
    answer(1, id="a", image="a.png"),
    answer(2, id=2, image="b.pdf", page=1),
    answer(2, id=2, image="b.pdf", page=2, regions=[{"shape": "box"}]),
    {"row": 3, "id": [1], "images": ["a", "b"], "error": "it is broken"},
    answer(4, custom_id="c"),
]


def write(path, answers, have=()):
    with AnswerTable(path) as output:
        found = [output.has(BatchRow(number=row["row"], digest="d")) for row in have]
        output.settle()
        for row in answers:
            output.write(row)
        output.finish()
    return found


def test_answers_as_a_table(tmp_path):
    path = tmp_path / "out.parquet"
    write(path, MIXED)
    found = parquet.read_table(path).to_pylist()
    assert [row["answer"] for row in found] == ["text 1", "text 2", "text 2", None, "text 4"]
    assert [row["page"] for row in found] == [None, 1, 2, None, None]
    assert [row["id"] for row in found] == ["a", "2", "2", "[1]", None]
    assert (found[0]["timings"]["decode"], found[0]["tokens"], found[3]["error"]) == (0.4, 3, "it is broken")
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
    with AnswerTable(path) as output:  # the lines that it was made of, to go on from
        assert [json.loads(line) for line in (tmp_path / "out.parquet.rows").read_bytes().splitlines()] == MIXED
        assert output.has(BatchRow(number=1, digest="d"))
    assert write(path, MIXED[3:], have=MIXED[:3]) == [True] * 3
    assert parquet.read_table(path).to_pylist() == found


def test_a_table_that_is_something_else_is_left_alone(tmp_path):
    path = table(tmp_path, {"row": [1]}, "out.parquet")
    before = path.read_bytes()
    with pytest.raises(OutputError, match="something else"), AnswerTable(path):
        pass
    path.write_bytes(before[:-9])
    with pytest.raises(OutputError, match="no Parquet file, or damaged"), AnswerTable(path):
        pass
    path.unlink()
    path.mkdir()
    with pytest.raises(OutputError, match="is a folder; name a file in it"), AnswerTable(path):
        pass
    assert [one.name for one in tmp_path.iterdir()] == ["out.parquet"]


def test_lines_count_where_a_run_was_killed_between_them_and_the_table(tmp_path):
    path = tmp_path / "out.parquet"
    write(path, MIXED)
    (tmp_path / "out.parquet.rows").write_text(json.dumps(answer(1, id="new")) + "\n")
    (tmp_path / "out.parquet.partial").write_text("PAR1 and no more")
    with AnswerTable(path) as output:
        assert output.has(BatchRow(number=1, digest="d"))
        output.settle()
        output.finish()
    assert [row["id"] for row in parquet.read_table(path).to_pylist()] == ["new"]
    (tmp_path / "out.parquet.rows.partial").write_text("half")  # killed while lines were made of the table
    with AnswerTable(path) as output:
        assert output.has(BatchRow(number=1, digest="d"))
        with pytest.raises(OutputError, match="another mcv-run is writing"), AnswerTable(path):
            pass
