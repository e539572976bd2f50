"""The runtime on an fp32 bundle of the golden checkpoint, against the reference's outputs."""

from pathlib import Path

import numpy as np
import pytest

from mcv_runtime import BundleCorruptError, OptionError, Options, PromptError
from mcv_runtime.pictures.picture import slice_picture
from mcv_runtime.request.preparation import shown

VISION_TOLERANCE = 1e-4
LOGITS_TOLERANCE = 2e-3  # on logits with a standard deviation of about 12


def prepared(case, engine):
    """The case's prompt and its visual tokens [visual, hidden]."""
    sliced = engine._preparer.sliced(case.request(), Options(**case.options))
    pictures = engine._vision.encode(shown(sliced))
    return engine._preparer.prompt(sliced, Options(**case.options)), engine._scheduler.decoder.visual_tokens(pictures)


def test_prompt(golden_case, golden_engine):
    prompt = golden_engine.prompt(golden_case.request(), **golden_case.options)
    assert prompt.text == golden_case.expected["expanded_text"]
    assert prompt.ids.tolist() == golden_case.expected["input_ids"]
    bound = golden_case.expected["image_bound"]
    assert prompt.visual_positions.tolist() == [i for start, end in bound for i in range(start, end)]


def test_greedy_tokens(golden_case, golden_engine):
    for penalty, key in [(1.0, "greedy24"), (1.05, "greedy24_rep105")]:
        answer = golden_engine.ask_messages(
            golden_case.request(), max_new_tokens=24, repetition_penalty=penalty, **golden_case.options
        )
        assert list(answer.tokens) == golden_case.expected[key]["tokens"], key
        # The reference of 2.0 gives stray bytes out one by one, newer tokenizers (and we) the broken character as a whole.
        if golden_case.family != "minicpmv2_0":
            assert answer.text == golden_case.expected[key]["text"], key


def test_prefill_logits(golden_case, golden_engine, read_prompt):
    """In one piece and in small chunks."""
    prompt, embeds = prepared(golden_case, golden_engine)
    for chunk in (4096, 100):
        logits = read_prompt(golden_engine, prompt, embeds, chunk)[-1]
        expected = golden_case.array("prefill_last_logits")
        np.testing.assert_allclose(logits[0], expected, rtol=0, atol=LOGITS_TOLERANCE)


def test_visual_tokens(golden_case, golden_engine):
    _, embeds = prepared(golden_case, golden_engine)
    manifest = golden_engine.bundle.manifest
    slices = embeds.reshape(-1, manifest.placeholder.tokens_per_slice, manifest.hidden_size)
    if not golden_case.images:
        assert not len(slices)
        return
    try:
        expected = golden_case.array("resampler_out")
    except KeyError:  # most cases keep four of the tokens
        expected, slices = golden_case.array("resampler_out_q0_7_33_63"), slices[:, [0, 7, 33, 63]]
    np.testing.assert_allclose(slices, expected, rtol=0, atol=VISION_TOLERANCE)


def test_vision_output(golden_case, golden_engine):
    """The first values and the mean of every slice's features, and all of the one case that is kept in full."""
    manifest = golden_engine.bundle.manifest
    sliced = [slice_picture(path, manifest.image, **limit(golden_case)) for path in golden_case.images]
    pieces = [piece for picture in sliced for piece in picture.slices]
    stats = golden_case.expected["vision_out_valid_rows_stats"] if pieces else []
    longest = max((piece.width * piece.height // 14**2 for piece in pieces), default=0)
    for i, (piece, expected) in enumerate(zip(pieces, stats, strict=True)):
        hidden = golden_engine._vision._tower.look([piece], None, longest)["vision_hidden"][0]
        np.testing.assert_allclose(hidden.ravel()[:8], expected["first8"], rtol=0, atol=VISION_TOLERANCE)
        assert abs(hidden.mean() - expected["mean"]) < VISION_TOLERANCE
        if golden_case.has(f"vision_out/{i}"):
            whole = golden_case.array(f"vision_out/{i}")
            np.testing.assert_allclose(hidden, whole, rtol=0, atol=VISION_TOLERANCE)


def limit(case):
    return {name: value for name, value in case.options.items() if name == "max_slice_nums"}


@pytest.fixture(scope="module")
def drawn(golden_root):
    return golden_root / "images" / "synth_300x200.png"


def test_stream_joins_to_the_answer(golden_engine, drawn):
    pieces = list(golden_engine.stream(str(drawn), "What is this?", max_new_tokens=40))
    assert len(pieces) > 5
    assert "".join(pieces) == golden_engine.ask(drawn, "What is this?", max_new_tokens=40).text


def test_encoded_picture_is_reused(golden_engine, drawn):
    picture = golden_engine.encode_image(drawn)
    with pytest.raises(OptionError, match="max_slices"):
        golden_engine.encode_image(drawn, max_slices=1)
    first = golden_engine.ask(drawn, "What is this?", max_new_tokens=8)
    again = golden_engine.ask(picture, "What is this?", max_new_tokens=8)
    assert again.tokens == first.tokens
    assert again.pictures == (picture,)


def test_kinds_of_sources_answer_alike(golden_engine, drawn):
    from PIL import Image

    with Image.open(drawn) as opened:
        picture = opened.convert("RGB")
    sources = [str(drawn), Path(drawn), drawn.read_bytes(), picture, np.asarray(picture)]
    answers = {golden_engine.ask(source, "What is this?", max_new_tokens=6).tokens for source in sources}
    assert len(answers) == 1


def test_limits(golden_engine, drawn):
    with pytest.raises(PromptError, match=r"the prompt has \d{2},\d{3} tokens or more, .* 32,768"):
        golden_engine.ask(None, "a" + " a" * 20_000 + " b" * 20_000)
    with pytest.raises(PromptError, match="empty"):
        golden_engine.ask(drawn, "")
    with pytest.raises(OptionError, match="max_new_tokens"):
        golden_engine.ask(drawn, "x", max_new_tokens=0)
    with pytest.raises(OptionError, match="repetition_penalty"):
        golden_engine.ask(drawn, "x", repetition_penalty=0.0)


def test_unusable_graph_is_one_line(golden_bundle):
    from mcv_runtime import load

    def refuse(path, options):
        raise RuntimeError(f"no such operator\nin {path}")

    with pytest.raises(BundleCorruptError, match=r"vision_encoder\S* cannot be opened: no such operator;"):
        load(golden_bundle, session_factory=refuse)
