"""Documents: which pages are read, how, and what is said of those that cannot be."""

import io
import threading

import numpy as np
import pytest
from PIL import Image

from mcv_runtime import Document, ImageError, McvError, OptionError, PromptError, load
from mcv_runtime.documents.document import is_document, is_pdf
from mcv_runtime.documents.page_numbers import chosen_pages
from mcv_runtime.pictures.images import open_picture
from mcv_runtime.request.answer import Answer, Timings

RED, BLUE = (255, 0, 0), (0, 0, 255)


def page(colour=RED, more=b"", box=b"0 0 100 50"):
    """A page of one colour, and its content."""
    return b"<</Type/Page/Parent 2 0 R/MediaBox[%s]/Contents %%d 0 R %s>>" % (box, more), stream(
        b"%d %d %d rg 0 0 99999 99999 re f" % tuple(level // 255 for level in colour)
    )


def stream(content, more=b""):
    return b"<</Length %d %s>>stream\n%s\nendstream" % (len(content), more, content)


@pytest.fixture(scope="module")
def coloured(make_pdf):
    """A PDF whose pages have these colours."""

    def make(*colours, **options):
        count = len(colours)
        pages, contents = zip(*(page(colour) for colour in colours), strict=True)
        bodies = [body % (3 + count + at) for at, body in enumerate(pages)]
        return make_pdf(*bodies, *contents, kids=range(3, 3 + count), **options)

    return make


@pytest.fixture(scope="module")
def engine():
    return load(threads=1)


def pages(source, **options):
    return list(Document(source, **options).open())


def colours(source, **options):
    return [(one.number, one.image().getpixel((5, 5))) for one in pages(source, **options)]


def said(do):
    with pytest.raises(McvError) as raised:
        do()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def many(kind, count=3, size=(50, 40)):
    frames = [Image.new("RGB", size, (80 * at, 0, 0)) for at in range(count)]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, **({"save_all": True, "append_images": frames[1:]} if count > 1 else {}))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, [1, 2, 3, 4, 5]), ("2", [2]), ("1-3,5", [1, 2, 3, 5]), ("4-", [4, 5]), (" 3 , 1 - 2", [3, 1, 2]),
        ("2,2,1-2", [2, 1]), ([5, 1], [5, 1]), ((2,), [2]),
    ],
)  # fmt: skip
def test_pages_are_numbers_and_spans(wanted, found):
    assert list(chosen_pages(wanted, 5, "it")) == found


@pytest.mark.parametrize(
    "wanted", ["", "0", "3-1", "-3", "1,,2", "a", "1-2-3", "1.5", "²", [], [0], [True], ["1"], "9" * 20, 3.0]
)
def test_what_are_no_pages(wanted):
    with pytest.raises((OptionError, TypeError)):
        Document("a.pdf", pages=wanted)


def test_the_pages_of_a_pdf(coloured, tmp_path):
    data = coloured(RED, BLUE, RED)
    path = tmp_path / "a b.pdf"
    path.write_bytes(data)
    for source in (data, path, str(path)):
        assert colours(source) == [(1, RED), (2, BLUE), (3, RED)]
        assert colours(source, pages="3,2") == [(3, RED), (2, BLUE)]
    (first, *_) = pages(path, dpi=144)
    assert (first.name, first.size(), first.image().size, first.page_size()) == (
        f"{path}, page 1", (200, 100), (200, 100), (100, 50)
    )  # fmt: skip
    assert pages(path)[0].size() == (278, 139)  # 200 dpi
    assert said(lambda: pages(path, pages="2-4")) == f"{path} has no page 4, it ends with page 3"
    for dpi in (0, 0.5, 1e9, float("nan"), "200", True):
        assert "dpi must be" in said(lambda dpi=dpi: Document(path, dpi=dpi))


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PNG", "WEBP", "AVIF"])
def test_the_pages_of_a_picture(kind):
    found = pages(many(kind))
    assert [one.number for one in found] == [1, 2, 3]
    order = [2, 0, 1, 2]  # in any order, and twice
    for at in order:
        assert abs(found[at].image().getpixel((5, 5))[0] - 80 * at) < 4
    assert {(*one.size(), *one.page_size()) for one in found} == {(50, 40, 50, 40)}
    assert is_document(many(kind)) == (kind == "TIFF")


def test_pages_of_a_tiff_are_as_large_as_they_are():
    frames = [Image.new("RGB", (30 + at, 20), RED) for at in range(80)]  # more than are looked at for a picture
    buffer = io.BytesIO()
    thumbnail = Image.new("RGB", (5, 5))
    thumbnail.encoderinfo = {"tiffinfo": {254: 1}}
    frames[0].save(buffer, "TIFF", save_all=True, append_images=[thumbnail, *frames[1:]])
    assert [one.size()[0] for one in pages(buffer.getvalue())] == list(range(30, 110))


def test_a_tiff_that_is_cut_off_between_pages_does_not_pass_for_whole():
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (50, 40), (80 * at, 0, 0)) for at in range(4)]
    frames[0].save(buffer, "TIFF", save_all=True, append_images=frames[1:])
    data = buffer.getvalue()
    counts = set()
    for length in range(len(data) - 20, 6400, -20):
        found = pages(data[:length])
        counts.add(len(found))
        try:
            colours = [page.image().getpixel((49, 39))[0] for page in found]
        except ImageError as error:
            assert "cannot be decoded" in str(error)
        else:  # all that was cut off is nothing that pixels need
            assert colours == [0, 80, 160, 240]
    assert {3, 4} <= counts
    assert len(pages(data)) == 4


def test_any_picture_is_a_document_of_one_page():
    data = many("JPEG", 1)
    assert [(one.number, one.size()) for one in pages(data)] == [(1, (50, 40))]
    assert not is_document(data)
    assert "no picture" in said(lambda: pages(b"hello")) or "not a picture" in said(lambda: pages(b"hello"))
    assert "no document" in said(lambda: Document(Image.new("RGB", (5, 5))))


def test_a_pdf_is_told_by_its_beginning(coloured, tmp_path):
    data = coloured(RED)
    assert is_pdf(data)
    assert is_pdf(b"\xef\xbb\xbf\r\n" + data)
    for other in (b"", b"%!PS", many("JPEG", 1), tmp_path, tmp_path / "gone", "a.pdf", None, 7):
        assert not is_pdf(other)


def test_what_a_pdf_holds_besides_is_not_run_and_what_is_filled_in_is_drawn(make_pdf):
    black = stream(b"0 0 0 rg 0 0 50 50 re f", b"/Type/XObject/Subtype/Form/BBox[0 0 50 50]")
    data = make_pdf(
        page(more=b"/Annots[5 0 R]")[0] % 4, page()[1],
        b"<</Type/Annot/Subtype/Widget/FT/Tx/T(a)/V(x)/Rect[0 0 50 50]/F 4/P 3 0 R/AP<</N 6 0 R>>>>", black,
        catalog=b"/AcroForm<</Fields[5 0 R]>>/OpenAction<</S/JavaScript/JS(app.alert\\(1\\))>>"
        b"/AA<</WC<</S/Launch/F(/bin/true)>>>>",
    )  # fmt: skip
    (only,) = pages(data, dpi=72)
    assert (only.image().getpixel((10, 10)), only.image().getpixel((90, 10))) == ((0, 0, 0), RED)


def test_what_cannot_be_opened_is_one_line(make_pdf, coloured):
    body = page()[0] % 4, page()[1]
    lock = b"<</Filter/Standard/V 1/R 2/O<%s>/U<%s>/P -4>>" % (b"41" * 32, b"42" * 32)
    marked = b"/Encrypt 5 0 R/ID[<00><00>]"
    data = coloured(RED)
    for bad, words in [
        (make_pdf(*body, lock, trailer=marked), "encrypted with a password; save it without one"),
        (make_pdf(*body, lock.replace(b"Standard", b"Strange"), trailer=marked), "encrypted in a way"),
        (make_pdf(kids=[]), "empty, cut off or damaged"),
        (data[: len(data) // 2], "empty, cut off or damaged"),
        (b"%PDF-1.7\n", "empty, cut off or damaged"),
        (b"%PDF-1.7\n" + bytes(1000), "empty, cut off or damaged"),
    ]:
        assert words in said(lambda bad=bad: pages(bad))
    assert colours(data) == [(1, RED)]  # a refused file is not held against the next


def test_only_the_bad_pages_of_a_document_are_refused(make_pdf):
    body, content = page()
    data = make_pdf(
        body % 6, b"(no page)", page(box=b"0 0 14400 14400")[0] % 6, content, kids=[3, 4, 5, 3]
    )  # fmt: skip
    first, second, third, fourth = pages(data)
    assert (first.image().getpixel((5, 5)), fourth.image().getpixel((5, 5))) == (RED, RED)
    assert "page 2 cannot be read: the PDF is damaged there" in said(second.image)
    assert "page 3 is too large: 40000 x 40000 is more than 64,000,000 pixels; lower dpi" in said(third.size)
    assert "too large" in said(third.image)
    assert pages(data, pages="3", dpi=2)[0].image().size == (400, 400)


def test_a_count_that_lies_and_one_that_is_large(make_pdf):
    body, content = page()
    lie = make_pdf(body % 4, content).replace(b"/Count 1/", b"/Count 2000000000/")
    assert colours(lie) == [(1, RED)]
    large = make_pdf(body % 4, content, kids=[3] * 10_000)
    assert len(pages(large)) == 10_000
    assert colours(large, pages="9999-", dpi=72) == [(9999, RED), (10_000, RED)]
    assert "at most 100,000 are read" in said(lambda: pages(make_pdf(body % 4, content, kids=[3] * 100_001)))


def test_a_page_that_takes_long_can_be_left(make_pdf):
    content = stream(b"0 0 m 10 10 l S\n" * 5000)
    (only,) = pages(make_pdf(page()[0] % 4, content))
    calls = []

    def check():
        calls.append(1)
        if len(calls) == 3:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        only.image(check=check)
    assert only.image().size == (278, 139)  # and what is left is left in order


@pytest.mark.waits
def test_threads_may_draw_at_once(coloured):
    data, found, colour = coloured(*[RED, BLUE] * 10), [], {1: RED, 0: BLUE}

    def draw():
        for one in Document(data, dpi=72).open():
            found.append(one.image().getpixel((5, 5)) == colour[one.number % 2])

    threads = [threading.Thread(target=draw) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 80


def test_without_its_library_a_pdf_is_one_line(monkeypatch, coloured):
    import sys

    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    assert said(lambda: pages(coloured(RED))).endswith("needs pypdfium2; install it with `pip install minicpmv-onnx[pdf]`")


def test_one_question_about_all_pages_or_one(engine, coloured, tmp_path):
    path = tmp_path / "report.pdf"
    path.write_bytes(coloured(RED, BLUE, RED))
    options = {"max_new_tokens": 3, "max_slice_nums": 1}
    answer = engine.ask(Document(path, pages="2-3"), "What colour?", **options)
    assert [picture.page.number for picture in answer.pictures] == [2, 3]
    assert [picture.name for picture in answer.pictures] == [f"{path}, page 2", f"{path}, page 3"]
    alone = engine.ask([page.image() for page in pages(path, pages="2-3")], "What colour?", **options)
    assert (answer.tokens, alone.pictures[0].page) == (alone.tokens, None)
    for source in (path, path.read_bytes()):  # a PDF is a document by itself
        assert len(engine.ask(source, "What colour?", **options).pictures) == 3
    (second,) = pages(path, pages="2")
    by_itself = engine.ask(engine.encode_image(second, max_slice_nums=1), "What colour?", **options)
    assert by_itself.tokens == engine.ask(Document(path, pages=[2]), "What colour?", **options).tokens
    assert by_itself.pictures[0].page.number == 2


def test_more_pages_than_a_context_holds_are_refused_before_one_is_drawn(engine, make_pdf, monkeypatch):
    body, content = page(box=b"0 0 600 600")
    data = make_pdf(body % 4, content, kids=[3] * 1000)
    monkeypatch.setattr("mcv_runtime.documents.pdf.PdfLeaves.draw", None)
    with pytest.raises(PromptError, match="context"):
        engine.ask(Document(data), "What?")


def test_places_on_a_page_are_told_in_its_points(engine, coloured):
    seen = engine.ask(Document(coloured(RED), dpi=144), "What?", max_new_tokens=1).pictures
    answer = Answer(
        text="<box>0 0 500 1000</box>", tokens=(), stop_reason="stop", prompt_tokens=(), timings=Timings(), pictures=seen
    )
    assert (seen[0].size, seen[0].page.size) == ((200, 100), (100, 50))
    assert answer.regions()[0].points == ((0, 0), (50, 50))


def test_a_saved_conversation_knows_the_page(engine, coloured, tmp_path):
    chat = engine.chat(max_new_tokens=2)
    chat.ask(Document(coloured(RED, BLUE), pages="2"), "What colour?")
    chat.save(tmp_path / "chat")
    (picture,) = engine.load_chat(tmp_path / "chat").messages[0].pictures
    assert (picture.page.number, picture.page.size) == (2, (100, 50))


def test_heic_is_read_where_its_library_is(monkeypatch):
    import pillow_heif

    from mcv_runtime.pictures import formats

    picture = Image.new("RGB", (60, 40), RED)
    picture.paste(BLUE, (30, 0, 60, 40))
    buffer = io.BytesIO()
    pillow_heif.from_pillow(picture).save(buffer, quality=95)
    data = buffer.getvalue()
    assert np.abs(np.asarray(open_picture(data), np.int16)[20, [5, 55]] - [RED, BLUE]).max() < 12
    with pytest.raises(ImageError, match="too large"):
        open_picture(data, 100)
    for damaged in (data[:100], data[:300], data[:-50]):
        with pytest.raises(ImageError, match="cannot be decoded"):
            open_picture(damaged)
    monkeypatch.setattr(formats, "heic_reader", lambda: None)
    with pytest.raises(ImageError, match=r"pip install minicpmv-onnx\[heic\]"):
        open_picture(data)
