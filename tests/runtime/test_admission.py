"""What cannot fit is refused before a picture is decoded or a long text tokenized, and a request can be ended at any time."""

import io
import json
import threading

import numpy as np
import pytest
from PIL import Image

import mcv_runtime.pictures.picture
from mcv_runtime import ImageError, Options, PromptError, Request, Video, load
from mcv_runtime.batch.rows import Defaults
from mcv_runtime.bundle.manifest import DownsampleSpec, ImageSpec, PlaceholderSpec, TextSpec
from mcv_runtime.command.batch_cli import answer_batch
from mcv_runtime.pictures.picture import least_grid, slice_picture
from mcv_runtime.request.patience import Interrupted
from mcv_runtime.text.prompts import Message, PromptBuilder
from mcv_runtime.text.template import ChatTemplate
from mcv_runtime.text.tokens import TextTokenizer

PICTURE = np.zeros((40, 50, 3), np.uint8)
ALIGNED = ImageSpec(
    slicing="aligned_grid",
    scale_resolution=112,
    downsample={"16x": DownsampleSpec(graph="vision_encoder_16x", merge=2)},
    downsample_mode="16x",
)


@pytest.fixture(scope="module")
def engine():
    return load(threads=1)


@pytest.fixture
def decoded(monkeypatch):
    """The pictures that were decoded."""
    found = []
    original = mcv_runtime.pictures.picture.open_picture
    monkeypatch.setattr(
        mcv_runtime.pictures.picture, "open_picture", lambda source, *more: found.append(source) or original(source, *more)
    )
    return found


@pytest.fixture
def tokenized(monkeypatch):
    """How long the texts were that were tokenized."""
    found = []
    original = TextTokenizer.encode
    monkeypatch.setattr(
        TextTokenizer, "encode", lambda self, text, *more: found.append(len(text)) or original(self, text, *more)
    )
    return found


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A file that says that it has 10 ** 9 pixels."""
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "BMP")
    data = bytearray(file.getvalue())
    data[18:26] = (100_000).to_bytes(4, "little") + (10_000).to_bytes(4, "little")
    path = tmp_path_factory.mktemp("wide") / "wide.bmp"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("text", [" " * 11_000_000 + "x", "word " * 2_000_000, "\U000f0000" * 3_000_000, "<image>" * 1_000_000])
def test_a_text_of_megabytes_is_refused_unread(engine, tokenized, decoded, text):
    with pytest.raises(PromptError, match=r"characters; .* use less text"):
        engine.submit(Request(PICTURE, text))
    with pytest.raises(PromptError, match="characters"):
        engine.ask_messages([{"role": "system", "content": text}, {"role": "user", "content": "x"}])
    assert not tokenized
    assert not decoded


def test_a_text_beyond_the_context_is_tokenized_piece_by_piece(engine, tokenized, decoded):
    with pytest.raises(PromptError, match=r"[0-9,]+ tokens or more, .* 4,096"):
        engine.submit(Request(PICTURE, "one " * 30_000))
    assert sum(tokenized) < 100_000
    assert not decoded


@pytest.mark.parametrize("number", [65, 200, 5000])
def test_too_many_pictures_are_not_decoded(engine, decoded, number):
    with pytest.raises(PromptError, match="context"):
        engine.submit(Request([PICTURE] * number, "What?"))
    assert not decoded


def test_pictures_and_text_are_counted_together_before_any_is_decoded(engine, decoded):
    large = np.zeros((336, 336, 3), np.uint8)  # ten slices of 64 tokens
    with pytest.raises(PromptError, match=r"4,\d+ tokens \(3,840 of them visual\)"):
        engine.submit(Request([large] * 6, "one two three four five six " * 40))
    assert not decoded


def test_a_picture_beyond_the_limit_behind_others_is_found_first(engine, decoded, wide):
    with pytest.raises(ImageError, match="too large"):
        engine.submit(Request([PICTURE, wide], "What?"))
    with pytest.raises(ImageError, match=r"not there|cannot be read"):
        engine.submit(Request([PICTURE, "nothing.jpg"], "What?"))
    with pytest.raises(ImageError, match="too long and narrow"):
        engine.submit(Request([PICTURE, np.zeros((1, 60_000, 3), np.uint8)], "What?"))
    assert not decoded


def test_a_video_of_too_many_frames_is_not_decoded(engine, decoded):
    video = Video([PICTURE] * 3000, fps=1)
    with pytest.raises(PromptError, match="context"):
        engine.submit(Request(video, "What?", options=Options(max_num_frames=3000)))
    assert not decoded


def test_messages_without_end_are_refused(engine):
    with pytest.raises(PromptError, match="messages, texts and pictures"):
        engine.ask_messages([{"role": "user", "content": ""}] * 5000)


def test_what_fits_is_answered_as_before(engine, decoded, tokenized):
    answer = engine.ask([PICTURE] * 3, "What?", max_new_tokens=1)
    assert len(answer.pictures) == len(decoded) == 3
    assert len(tokenized) == 1


def test_a_batch_goes_on_behind_a_row_of_megabytes(engine, tmp_path):
    rows = [{"prompt": prompt, "max_new_tokens": 2} for prompt in ("hi", " " * 11_000_000 + "x", "hello")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    defaults = Defaults(prompt="", system=None, options=Options(), model="m")
    assert answer_batch(engine, tmp_path / "rows.jsonl", tmp_path / "out.jsonl", defaults, 1) == 1
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert ["answer" in row for row in written] == [True, False, True]
    assert "11,000,001 characters" in written[1]["error"]


def test_a_request_is_ended_between_pictures(engine, monkeypatch):
    cancel, opened = threading.Event(), []
    original = mcv_runtime.pictures.picture.open_picture

    def open_one(source, *more):
        opened.append(source)
        cancel.set()
        return original(source, *more)

    monkeypatch.setattr(mcv_runtime.pictures.picture, "open_picture", open_one)
    answer = engine.ask([PICTURE] * 5, "What?", cancel=cancel)
    assert (answer.stop_reason, answer.text, len(opened)) == ("cancelled", "", 1)


def test_a_request_is_ended_between_pieces_of_its_text(golden_root, tokenized):
    checkpoint = golden_root / "minicpmv2_6" / "checkpoint"
    builder = PromptBuilder(
        TextTokenizer((checkpoint / "tokenizer.json").read_text(encoding="utf-8")),
        ChatTemplate("{{ messages[0].content }}"),
        TextSpec(vocab_size=584, context_length=32768),
        PlaceholderSpec(token="<unk>", tokens_per_slice=64),
    )
    asked = [Message("user", (" " * 200_000 + "x",))]  # eight spaces make a token
    assert len(builder.build(asked).ids) == pytest.approx(25_001, abs=5)
    assert len(tokenized) == 5  # four pieces, and then all
    tokenized.clear()

    def check():
        if len(tokenized) == 2:
            raise Interrupted("timeout")

    with pytest.raises(Interrupted):
        builder.build(asked, check=check)
    assert len(tokenized) == 2


@pytest.mark.parametrize("upsize", ["always", "never", "adaptive"])
def test_the_least_grid_makes_no_more_tokens_than_the_picture_does(upsize):
    rng = np.random.default_rng(0)
    options = Options(small_image_upsize=upsize)

    def tokens(grid):
        return sum(rows * columns for rows, columns in grid.token_shapes)

    for _ in range(150):
        width, height = rng.integers(20, 500, 2)
        pixels = rng.integers(0, 255, (height // 3 + 1, width // 3 + 1, 3)).astype(np.uint8)
        picture = Image.fromarray(pixels).resize((int(width), int(height)), Image.Resampling.NEAREST)
        cut = slice_picture(picture, ALIGNED, small_image_upsize=upsize)
        least = least_grid("it", picture.size, ALIGNED, options)
        assert tokens(least) <= tokens(cut.grid)
        if upsize != "adaptive":
            assert least == cut.grid
