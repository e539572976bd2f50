"""`mcv-run --batch`: every row in its order, whatever is wrong with another, and no row twice."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from mcv_runtime import Answer, OptionError, Options, OutputError, Request, load
from mcv_runtime.batch.answer_fields import regions_report
from mcv_runtime.batch.rows import Defaults
from mcv_runtime.batch.sources import batch_source
from mcv_runtime.command.batch_cli import answer_batch, check_batch
from mcv_runtime.request.answer import Timings

DEMO = Path(__file__).parents[2] / "models" / "tiny" / "demo.png"
TEXT, CAPTION = "What does the text say?", "Describe the picture."
SAID = {TEXT: "HELLO", CAPTION: "a red circle and the text HELLO"}
DEFAULTS = Defaults(prompt=CAPTION, system=None, options=Options(max_new_tokens=20), model="demo")


class CountingEngine:
    """Answers as the engine that it has, and counts the requests; may be interrupted before one of them."""

    def __init__(self, engine):
        self._engine, self.asked, self.stop_before = engine, 0, None

    def submit(self, request, **more):
        if self.stop_before is not None and self.asked >= self.stop_before:
            raise KeyboardInterrupt
        ticket = self._engine.submit(request, **more)
        self.asked += 1
        return ticket


@pytest.fixture(scope="module")
def demo():
    return load(threads=1)


@pytest.fixture
def engine(demo):
    return CountingEngine(demo)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for name in ("a.png", "b c.PNG", "d.png"):
        shutil.copy(DEMO, tmp_path / "pictures" / name)
    return tmp_path


def put(path, rows):
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run(engine, source, out, size=2, defaults=DEFAULTS):
    notices = io.StringIO()
    return answer_batch(engine, source, out, defaults, size, notices), notices.getvalue()


def many(count):
    return [{"image": "pictures/a.png", "prompt": TEXT if number % 3 else CAPTION, "id": number} for number in range(count)]


def test_every_row_has_its_answer_or_its_error(engine, folder):
    rows = [
        {"id": "first", "image": "pictures/b c.PNG", "prompt": TEXT},
        {"image": "nothing.png"},
        "{broken",
        "[1]",
        "[" * 100_000,
        "",
        {"images": ["pictures/a.png", "pictures/d.png"], "prompt": "Which picture has text?"},
        {"image": "pictures/a.png", "max_new_tokens": "x"},
        {"image": "pictures/a.png", "colour": "red"},
        {"image": 7},
        {"prompt": "long " * 5000},
        {"image": "pictures/a.png", "max_new_tokens": 2, "logprobs": True, "timeout": None},
        {"image": "pictures/a.png", "num_beams": 2, "num_return_sequences": 2},
        {"id": "\ud800", "image": "pictures/\ud800.png"},
    ]
    code, notices = run(engine, put(folder / "in.jsonl", rows), folder / "out.jsonl")
    found = read(folder / "out.jsonl")
    assert [row["row"] for row in found] == [1, 2, 3, 4, 5, *range(7, 15)]
    errors = {row["row"]: row["error"] for row in found if "error" in row}
    for number, words in {
        2: "nothing.png cannot be read", 3: "not JSON", 4: "not a JSON object", 5: "not JSON", 8: "a whole number",
        9: "no field 'colour'", 10: "path of a file", 11: "context", 14: "cannot be read",
    }.items():  # fmt: skip
        assert words in errors.pop(number)
    assert not errors
    answered = {row["row"]: row for row in found if "error" not in row}
    assert (answered[1]["id"], answered[1]["answer"]) == ("first", "HELLO")
    assert answered[1]["image"] == "pictures/b c.PNG"
    assert answered[7]["images"] == ["pictures/a.png", "pictures/d.png"]
    assert (answered[12]["stop_reason"], len(answered[12]["logprobs"])) == ("length", 2)
    assert answered[13]["answer"] == SAID[CAPTION]
    assert len(answered[13]["alternatives"]) == 1
    assert (code, notices.count("\n")) == (1, 1)
    assert "4 rows answered, 9 failed" in notices


def test_regions_where_places_are_asked_for(engine, folder):
    rows = [
        {"image": "pictures/a.png", "grounding": True},
        {"image": "pictures/a.png"},
        {"images": ["pictures/a.png"] * 2, "grounding": True},
    ]
    run(engine, put(folder / "in.jsonl", rows), folder / "out.jsonl")
    assert [row.get("regions") for row in read(folder / "out.jsonl")] == [[], None, None]
    seen = SimpleNamespace(size=(200, 100), page=None)
    answer = Answer(
        text="<ref>it</ref><box>0 0 500 1000</box>", tokens=(), stop_reason="stop", prompt_tokens=(), timings=Timings(),
        pictures=(seen,),
    )  # fmt: skip
    said = {"shape": "box", "points": ((0, 0), (100, 100)), "label": "it"}
    assert regions_report(answer, asked=True) == {"regions": [said]}


@pytest.mark.parametrize("size", [1, 3, 8])
def test_order_and_answers_do_not_depend_on_the_size_of_a_batch(engine, folder, size):
    rows = many(7)
    rows.insert(4, {"image": "missing.png", "id": "missing"})
    assert run(engine, put(folder / "in.jsonl", rows), folder / "out.jsonl", size)[0] == 1
    found = read(folder / "out.jsonl")
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert [row.get("answer") for row in found] == [SAID.get(row.get("prompt")) for row in rows]


def test_it_goes_on_where_it_was_stopped(engine, folder):
    source, out = put(folder / "in.jsonl", many(9)), folder / "out.jsonl"
    engine.stop_before = 4
    with pytest.raises(KeyboardInterrupt):
        run(engine, source, out, 1)  # two are asked at a time
    assert [row["id"] for row in read(out)] == [0, 1, 2]
    with out.open("a") as file:
        file.write('{"row": 5, "answer": "cut of')
    engine.stop_before = None
    code, notices = run(engine, source, out)
    assert (code, notices) == (0, "mcv-run: 6 rows answered, 3 were there\n")
    assert engine.asked == 4 + 6
    assert [row["id"] for row in read(out)] == list(range(9))
    before = out.read_bytes()
    assert run(engine, source, out) == (0, "mcv-run: 0 rows answered, 9 were there\n")
    assert (engine.asked, out.read_bytes()) == (10, before)


def test_only_what_was_edited_failed_or_is_new_is_asked_again(engine, folder):
    rows = many(12)
    rows[2]["image"] = "late.png"
    source, out = put(folder / "in.jsonl", rows), folder / "out.jsonl"
    assert run(engine, source, out)[0] == 1
    assert engine.asked == 11
    shutil.copy(DEMO, folder / "late.png")  # it failed, and can be answered now
    rows[7]["prompt"] = CAPTION  # edited
    del rows[9]
    rows.insert(5, {"image": "pictures/d.png", "id": "new", "prompt": TEXT})
    put(source, rows)
    engine.stop_before = 12  # stopped once in the middle of it
    with pytest.raises(KeyboardInterrupt):
        run(engine, source, out, 1)
    assert [row["id"] for row in read(out)] == [0, 1]
    engine.stop_before = None
    code, notices = run(engine, source, out, 1)
    assert (code, engine.asked) == (0, 15)
    assert "3 rows answered, 9 were there" in notices
    found = read(out)
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert [row["row"] for row in found] == list(range(1, 13))
    assert [row["answer"] for row in found] == [SAID[row["prompt"]] for row in rows]
    assert sorted(path.name for path in folder.iterdir()) == ["in.jsonl", "late.png", "out.jsonl", "pictures"]


def test_rows_in_another_order_are_not_asked_again_and_nothing_vanishes_unsaid(engine, folder):
    said = io.StringIO()

    def run(*ids):
        put(folder / "in.jsonl", [{"id": one, "image": "pictures/a.png", "prompt": f"{TEXT} {one}"} for one in ids])
        answer_batch(engine, folder / "in.jsonl", folder / "out.jsonl", DEFAULTS, notices=said)
        return [json.loads(line)["id"] for line in (folder / "out.jsonl").read_text().splitlines()]

    assert run(*"abcde") == [*"abcde"]
    assert (run(*"eacbd"), engine.asked) == ([*"eacbd"], 5)
    assert (run(*"ea"), engine.asked) == ([*"ea"], 5)
    assert "3 dropped, whose rows are no more" in said.getvalue()
    with pytest.raises(OptionError, match=r"has no rows, and .* has answers, which are left as they are"):
        run()
    assert (run(*"ea"), engine.asked) == ([*"ea"], 5)


def test_many_that_were_edited_here_and_there_cost_no_others(engine, folder, monkeypatch):
    """More in all than are looked among, but fewer in a row."""
    monkeypatch.setattr("mcv_runtime.batch.answers._WINDOW", 4)

    def run(ids):
        put(folder / "in.jsonl", [{"id": one, "image": "pictures/a.png", "prompt": f"{TEXT} {one}"} for one in ids])
        answer_batch(engine, folder / "in.jsonl", folder / "out.jsonl", DEFAULTS, notices=io.StringIO())
        assert [json.loads(line)["id"] for line in (folder / "out.jsonl").read_text().splitlines()] == ids

    run(list(range(24)))
    run([at for at in range(24) if at % 4 == 3])
    assert engine.asked == 24


def test_what_could_be_read_of_a_damaged_source_is_answered(engine, folder):
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for at in range(12):
            tar.add(DEMO, f"{at}.png")
    data = (folder / "rows.tar").read_bytes()
    (folder / "rows.tar").write_bytes(data[: len(data) * 3 // 4])
    last = 0
    with pytest.raises(OptionError, match="is damaged behind"):
        for row in batch_source(folder / "rows.tar", DEFAULTS).rows():
            last = row.number
    assert last > 4
    for _ in range(2):
        with pytest.raises(OptionError, match="is damaged behind"):
            answer_batch(engine, folder / "rows.tar", folder / "out.jsonl", DEFAULTS, size=4)
        assert len((folder / "out.jsonl").read_text().splitlines()) == engine.asked == last


def test_other_options_or_another_model_give_other_answers(engine, folder):
    source, out = put(folder / "in.jsonl", many(2)), folder / "out.jsonl"
    run(engine, source, out)
    for changed in (
        Defaults(prompt=CAPTION, system=None, options=Options(max_new_tokens=1), model="demo"),
        Defaults(prompt=CAPTION, system=None, options=Options(max_new_tokens=1), model="another"),
        Defaults(prompt=CAPTION, system="Be brief.", options=Options(max_new_tokens=1), model="another"),
    ):
        asked = engine.asked
        run(engine, source, out, defaults=changed)
        assert engine.asked == asked + 2
    assert {row["stop_reason"] for row in read(out)} == {"length"}


def test_a_folder_of_pictures(engine, folder):
    (folder / "pictures" / "notes.txt").write_text("no picture")
    (folder / "pictures" / "broken.jpg").write_text("no picture either")
    defaults = Defaults(prompt=TEXT, system=None, options=Options(), model="demo")
    assert run(engine, folder / "pictures", folder / "out.jsonl", defaults=defaults)[0] == 1
    found = read(folder / "out.jsonl")
    assert [(row["image"], row.get("answer")) for row in found] == [
        ("a.png", "HELLO"), ("b c.PNG", "HELLO"), ("broken.jpg", None), ("d.png", "HELLO")
    ]  # fmt: skip


def test_what_makes_no_sense_is_said_before_anything_is_written(engine, folder):
    source = put(folder / "in.jsonl", many(1))
    (folder / "mine.txt").write_text("do not touch\n")
    nothing = Defaults(prompt="", system=None, options=Options(), model="demo")
    with pytest.raises(OptionError, match="--prompt"):
        run(engine, folder / "pictures", folder / "out.jsonl", defaults=nothing)
    (folder / "empty").mkdir()
    with pytest.raises(OptionError, match="no pictures"):
        run(engine, folder / "empty", folder / "out.jsonl")
    assert not (folder / "out.jsonl").exists()
    with pytest.raises(OutputError, match="something else"):
        run(engine, source, folder / "mine.txt")
    assert (folder / "mine.txt").read_text() == "do not touch\n"
    with pytest.raises(OutputError, match="cannot be written"):
        run(engine, source, folder / "nowhere" / "out.jsonl")
    (folder / "link.jsonl").symlink_to(source)
    for out, size, words in [
        (None, 1, "--out"),
        (folder / "link.jsonl", 1, "requests"),
        (folder / "out.jsonl", 0, "at least 1"),
    ]:
        with pytest.raises(OptionError, match=words):
            check_batch(source, out, size)
    with pytest.raises(OptionError, match="not there"):
        check_batch(folder / "nowhere.jsonl", folder / "out.jsonl", 1)


def test_its_rows_are_streamed(engine, folder):
    """Answers are on disk before later rows are read."""
    source, out = put(folder / "in.jsonl", many(9)), folder / "out.jsonl"
    seen = []

    class Watching(CountingEngine):
        def submit(self, request, **more):
            seen.append(len(out.read_bytes().splitlines()))
            return super().submit(request, **more)

    run(Watching(engine), source, out, 2)
    assert seen == [0, 0, 0, 0, 1, 2, 3, 4, 5]


@pytest.mark.waits
def test_each_request_of_a_batch_has_its_own_end(demo):
    """One is cancelled before it begins, one in the middle, one times out; the others are as if alone."""
    before, during = threading.Event(), threading.Event()
    before.set()

    def cancel(event):
        if event.stage == "answer" and event.done == 3:
            during.set()

    answers = demo.batch(
        [
            Request(DEMO, CAPTION),
            Request(DEMO, CAPTION, options=Options(cancel=before)),
            Request(DEMO, CAPTION, options=Options(cancel=during, progress=cancel)),
            Request(DEMO, CAPTION, options=Options(timeout=1e-9)),
            Request(DEMO, TEXT),
        ]
    )
    assert [answer.stop_reason for answer in answers] == ["stop", "cancelled", "cancelled", "timeout", "stop"]
    whole = answers[0].tokens
    assert [answer.tokens for answer in answers[1:4]] == [(), whole[:3], ()]
    assert [answers[0].text, answers[4].text] == [SAID[CAPTION], "HELLO"]


@pytest.mark.waits
def test_from_the_command_line(folder):
    source, out = put(folder / "in.jsonl", many(3)), folder / "out.jsonl"
    command = [sys.executable, "-m", "mcv_runtime.command.cli", "--batch", str(source), "--out", str(out), "--stop", "circle"]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.splitlines()[-1] == "mcv-run: 3 rows answered"
    assert [row["answer"] for row in read(out)] == ["a red ", "HELLO", "HELLO"]
    put(source, [*many(3), "{"])
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("mcv-run: 0 rows answered, 3 were there, 1 failed")
