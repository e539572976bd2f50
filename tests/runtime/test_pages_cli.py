"""`mcv-run` and documents: pages in one question or one by one, and pages that are read out."""

import io
import json

import pypdfium2
import pytest
from PIL import Image

from mcv_runtime import Document, ImageError, OptionError, Options, load, read_as
from mcv_runtime.batch.rows import Defaults, Paging
from mcv_runtime.command import cli
from mcv_runtime.command.batch_cli import answer_batch
from mcv_runtime.command.chat_cli import TerminalChat
from mcv_runtime.command.pages_cli import PageAnswers

DEMO = "models/tiny/demo.png"
QUESTION = "What does the text say?"


@pytest.fixture(scope="module")
def engine():
    return load(threads=1)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Three pages: the demo picture, a page that is damaged, and the demo picture again."""
    from mcv_runtime.bundle import folder

    demo = Image.open(folder.DEFAULT.parents[2] / DEMO).convert("RGB")
    pdf = pypdfium2.PdfDocument.new()
    for _ in range(3):
        page = pdf.new_page(*demo.size)
        drawn = pypdfium2.PdfImage.new(pdf)
        drawn.set_bitmap(pypdfium2.PdfBitmap.from_pil(demo))
        drawn.set_matrix(pypdfium2.PdfMatrix().scale(*demo.size))
        page.insert_obj(drawn)
        page.gen_content()
    pdf.get_page(1).set_mediabox(0, 0, 14400, 14400)
    path = tmp_path_factory.mktemp("documents") / "report.pdf"
    pdf.save(path)
    return path


def run(capsys, *arguments):
    """Exit code, stdout and stderr."""
    try:
        code = cli.app([*map(str, arguments), "-t", "1"], prog_name="mcv-run", standalone_mode=False)
    except OptionError as error:
        code, line = 2, str(error)
        return code, capsys.readouterr().out, line
    said = capsys.readouterr()
    return code, said.out, "\n".join(line for line in said.err.splitlines() if "demo model" not in line)


def test_one_question_about_pages(report, capsys):
    code, out, err = run(capsys, "--image", report, "--pages", "1,3", "--dpi", 72, "-p", QUESTION, "--json")
    assert (code, err) == (0, "")
    told = json.loads(out)
    assert [one["page"] for one in told["images"]] == [1, 3]
    assert told["images"][0]["page_size"] == told["images"][0]["size"]
    code, out, _ = run(capsys, "--image", report, "--pages", "3", "--dpi", 72, "-p", QUESTION)
    assert (code, out) == (0, "HELLO\n")


def test_every_page_on_its_own(report, capsys):
    code, out, err = run(capsys, "--image", report, "--each-page", "--dpi", 72, "-p", QUESTION, "--max-pixels", 1_000_000)
    assert (code, out) == (1, "[page 1]\nHELLO\n\n[page 3]\nHELLO\n\n")
    assert err.startswith(f"mcv-run: {report}, page 2 is too large: 14400 x 14400")
    assert err.count("\n") == 0
    gone = report.with_name("gone.pdf")
    code, out, err = run(
        capsys, "--image", gone, "--image", report, "--pages", "3", "--each-page", "--dpi", 72, "-p", QUESTION, "--json"
    )
    first, second = map(json.loads, out.splitlines())
    assert (code, first["document"], "cannot be read" in first["error"]) == (1, "gone.pdf", True)
    assert (second["document"], second["page"], second["text"]) == ("report.pdf", 3, "HELLO")
    assert err.startswith(f"mcv-run: {gone} cannot be read")


def test_pages_that_are_read_out(report, capsys):
    asked = ["--image", report, "--pages", "1", "--dpi", 72, "-n", 3]
    code, out, _ = run(capsys, *asked, "--to", "markdown")
    assert (code, out.startswith("<!-- page 1 -->\n")) == (0, True)
    (line,) = run(capsys, *asked, "--to", "json")[1].splitlines()
    told = json.loads(line)
    assert f"<!-- page 1 -->\n{told['text']}\n\n" == out
    assert run(capsys, *asked, "--to", "text")[1].startswith("[page 1]\n")
    assert "in Markdown format" in read_as("markdown")
    assert read_as("text") == "What is the text in the picture?"


def test_a_page_that_is_read_out_ends_where_it_goes_round(engine, report, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(PageAnswers, "run", lambda self, prompt, system, options, report: seen.append((prompt, options)) or 0)
    run(capsys, "--image", report, "--to", "markdown")
    run(capsys, "--image", report, "--to", "text", "--repeat-guard", 32, "-n", 9)
    assert [prompt for prompt, _ in seen] == [read_as("markdown"), read_as("text")]
    assert [(options.repeat_guard, options.max_new_tokens) for _, options in seen] == [(256, 2048), (32, 9)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "text"], "need --image or --batch"),
        (["--pages", "1"], "need --image or --batch"),
        (["--to", "text", "-p", "What?", "--image", "a.pdf"], "leave out --prompt"),
        (["--each-page", "--chat", "--image", "a.pdf"], "leave out --each-page"),
        (["--each-page", "--video", "a.mp4", "--image", "a.pdf"], "a video has no pages"),
        (["--pages", "3-1", "--image", "a.pdf"], "pages are numbers"),
        (["--dpi", "0", "--image", "a.pdf"], "dpi must be"),
    ],
)
def test_what_makes_no_sense(capsys, arguments, words):
    assert words in run(capsys, *arguments)[2]


def test_a_batch_of_pages(engine, report, tmp_path):
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"image": str(report), "id": "r"}) + "\n" + json.dumps({"image": DEMO}) + "\n")
    defaults = Defaults(
        prompt=QUESTION,
        system=None,
        options=Options(),
        model="demo",
        paging=Paging("1-", 72, each_page=True),
        max_pixels=1 << 20,
    )
    for _ in range(2):  # the second time, what is there is not asked again
        notices = io.StringIO()
        assert answer_batch(engine, source, out, defaults, 1, notices) == 1
        told = [json.loads(line) for line in out.read_text().splitlines()]
        found = [(one["row"], one.get("page"), one.get("answer")) for one in told]
        assert found[:3] == [(1, 1, "HELLO"), (1, 2, None), (1, 3, "HELLO")]
        assert "page 2 is too large" in told[1]["error"]
        assert (told[0]["tokens"] > 1, sorted(told[0]["timings"])) == (True, ["decode", "prefill", "preprocess", "vision"])
    assert "0 rows answered, 2 were there, 2 failed" in notices.getvalue()


def test_a_document_in_a_conversation(engine, report, capsys):
    chat = TerminalChat(engine, system=None, options=Options(max_new_tokens=5))
    chat.show([Document(report, pages="1", dpi=72)])
    chat.take(QUESTION)
    assert capsys.readouterr().out == "HELLO\n"
    with pytest.raises(ImageError, match="page 2 is too large"):
        chat.take(f"/image {report}")
