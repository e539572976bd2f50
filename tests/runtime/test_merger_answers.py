"""The merger generation on fp32 bundles of the golden checkpoints, against the reference's outputs."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from mcv_runtime import Clip, OptionError, Options, Video
from mcv_runtime.decoding.row import prompt_keys
from mcv_runtime.request.preparation import shown

PATCH = 14


def prepared(case, engine):
    """The request cut into slices, and its prompt."""
    sliced = engine._preparer.sliced(case.request(), Options(**case.options))
    return sliced, engine._preparer.prompt(sliced, Options(**case.options))


def encoded(sliced, engine):
    """Visual tokens of the request, in the order of the prompt: [tokens, hidden]."""
    pictures = engine._vision.encode(shown(sliced))
    return np.concatenate([np.empty((0, 96), np.float32), *(picture.embeds for picture in pictures)])


def packed_sha256(pieces):
    """Of the slices as the reference packs them: patches side by side in a strip [3, 14, patches * 14] of uint8."""
    strips = []
    for piece in pieces:
        rows, columns = piece.height // PATCH, piece.width // PATCH
        blocks = np.asarray(piece).transpose(2, 0, 1).reshape(3, rows, PATCH, columns, PATCH)
        strips.append(blocks.transpose(0, 2, 1, 3, 4).reshape(3, PATCH, -1))
    return hashlib.sha256(np.concatenate(strips, axis=-1).tobytes()).hexdigest()


def test_prompt(merger_case, engine_of):
    _, prompt = prepared(merger_case, engine_of(merger_case.family))
    assert prompt.ids.tolist() == merger_case.array("input_ids").tolist()
    if "expanded_prompt" in merger_case.expected:
        assert prompt.text == merger_case.expected["expanded_prompt"]
    if merger_case.has("position_ids"):
        np.testing.assert_array_equal(prompt.positions, merger_case.array("position_ids").reshape(3, -1))


def test_pixels(merger_case, engine_of):
    sliced, _ = prepared(merger_case, engine_of(merger_case.family))
    parts = [part for message in sliced for part in message.pictures]
    still = [piece for part in parts if not isinstance(part, Clip) for piece in part.slices]
    moving = [piece for part in parts if isinstance(part, Clip) for frame in part.frames for piece in frame.slices]
    for pieces, suffix in ((still, ""), (moving, "_videos")):
        sizes = [[piece.height // PATCH, piece.width // PATCH] for piece in pieces]
        assert sizes == merger_case.expected.get(f"target_sizes{suffix}", [])
        if pieces:
            assert packed_sha256(pieces) == merger_case.expected[f"pixel_values_u8_sha256{suffix}"]


def test_visual_tokens(merger_case, engine_of):
    if not merger_case.has("merger"):
        pytest.skip("a case without pictures")
    engine = engine_of(merger_case.family)
    tokens = encoded(prepared(merger_case, engine)[0], engine)
    tokens = tokens[-merger_case.expected.get("merger_rows", len(tokens)) :]  # of a picture and a video, the video's
    wanted = merger_case.array("merger")
    np.testing.assert_allclose(tokens[merger_case.array("merger_idx")], wanted, rtol=0, atol=1e-4)


def test_logits_and_greedy_tokens(merger_case, engine_of, read_prompt):
    """The prompt in one piece and in small chunks, then 24 tokens."""
    engine = engine_of(merger_case.family)
    sliced, prompt = prepared(merger_case, engine)
    embeds, decoder = encoded(sliced, engine), engine._scheduler.decoder
    for chunk in (1 << 20, 100):
        slots, row, (logits,) = read_prompt(engine, prompt, embeds, chunk, more=24)
        wanted = merger_case.array("logits_last")
        np.testing.assert_allclose(logits[: len(wanted)], wanted, rtol=0, atol=merger_case.tolerance)
        tokens = [int(logits.argmax())]
        while len(tokens) < len(merger_case.expected["greedy"]):
            tokens.append(int(decoder.step(slots, [row], tokens[-1:]).argmax()))
        assert tokens == merger_case.expected["greedy"]


def test_cache_after_the_prompt(merger_case, engine_of, read_prompt):
    """Keys, values, convolution inputs and memories, for the cases that list them."""
    if not merger_case.has("cache_rec0"):
        pytest.skip("a case without its cache")
    engine = engine_of(merger_case.family)
    sliced, prompt = prepared(merger_case, engine)
    slots, row, _ = read_prompt(engine, prompt, encoded(sliced, engine))
    cache = dict(slots.export(row))
    for layer in range(3):
        state = cache[f"past_conv.{layer}"]
        np.testing.assert_allclose(state.T, merger_case.array(f"cache_conv{layer}")[:, -3:], rtol=0, atol=2e-3)
        state = cache[f"past_recurrent.{layer}"]
        np.testing.assert_allclose(state, merger_case.array(f"cache_rec{layer}"), rtol=0, atol=2e-3)
    for name, key in (("key", "cache_k3"), ("value", "cache_v3")):
        state = cache[f"past_key_values.3.{name}"]
        np.testing.assert_allclose(state, merger_case.array(key), rtol=0, atol=2e-3)


def test_conversation(conversation, engine_of):
    """A prompt read in odd chunks, and a second turn appended to its cache."""
    engine, expected = engine_of(conversation.family), conversation.expected
    base = type(conversation)(conversation.family, expected["base_case"], _case(conversation, expected["base_case"]))
    sliced, prompt = prepared(base, engine)
    embeds, decoder, places = encoded(sliced, engine), engine._scheduler.decoder, prompt.visual_positions
    keys, slots = prompt_keys(prompt), decoder.new_slots()
    more = np.array(expected["raw_continuation"]["appended_ids"])
    row = decoder.new_row(slots, len(prompt.ids) + len(more) + 24)
    start = 0
    for index, size in enumerate(expected["chunk_sizes"]):
        end = start + size
        first, last = np.searchsorted(places, (start, end))
        part = prompt.ids[start:end], embeds[first:last], places[first:last] - start
        (logits,) = decoder.read(slots, row, *part, keys=keys[:, start:end])
        np.testing.assert_allclose(logits, conversation.array("chunk_end_logits")[index], rtol=0, atol=base.tolerance)
        start = end
    assert start == len(prompt.ids)
    (logits,) = decoder.read(slots, row, more)
    np.testing.assert_allclose(logits, conversation.array("raw_cont_logits_first"), rtol=0, atol=base.tolerance)
    tokens = [int(logits.argmax())]
    while len(tokens) < len(expected["raw_continuation"]["greedy"]):
        tokens.append(int(decoder.step(slots, [row], tokens[-1:]).argmax()))
    assert tokens == expected["raw_continuation"]["greedy"]


def _case(conversation, name):
    import json

    golden = json.loads((conversation.checkpoint.parent / "golden.json").read_text(encoding="utf-8"))
    return next(case for case in golden["cases"] if case["id"] == name)


@pytest.fixture
def drawn(golden_root):
    return golden_root / "images46" / "synth_small.png"


def test_answer_is_the_golden_text(engine_of, golden_root, merger_family):
    """Through the public door, special tokens left out of the text."""
    import json

    golden = json.loads((golden_root / merger_family / "golden.json").read_text(encoding="utf-8"))
    case = next(case for case in golden["cases"] if case["id"] == "small_4x")
    (image,) = (golden_root / "images46" / name.removeprefix("../images/") for name in case["images"])
    text = case["messages"][0]["content"][1]["text"]
    answer = engine_of(merger_family).ask(image, text, downsample_mode="4x", max_new_tokens=24)
    assert list(answer.tokens) == case["greedy"]
    assert answer.text == case["greedy_text"].strip()


@pytest.mark.parametrize("family", ["minicpmv4_6", "minicpmv2_6"])
def test_an_ordinary_token_that_ends_an_answer(family, engine_of, drawn):
    """Decoded with skip_special_tokens by the published code of 4.6; of the earlier models, chat() cuts what ended off."""
    engine = engine_of(family)
    said = engine.ask(drawn, "What is it?", max_new_tokens=8)
    decode = engine._answerer._tokenizer.decode
    place = next(i for i in range(1, 8) if said.tokens[i] not in said.tokens[:i] and decode(said.tokens[i : i + 1]).strip())
    ended = engine.ask(drawn, "What is it?", max_new_tokens=8, stop_token_ids=[said.tokens[place]])
    assert (ended.stop_reason, ended.tokens) == ("stop", said.tokens[: place + 1])
    shown = ended.tokens if family == "minicpmv4_6" else ended.tokens[:-1]
    special = set(engine.bundle.manifest.text.dropped_ids)
    assert ended.text == decode([token for token in shown if token not in special]).strip()


def test_default_bundles_answer(merger_family, engine_of, drawn):
    _answers_in_both_modes(engine_of(merger_family, "q4"), drawn)


def test_a_bundle_of_8_bits_answers(engine_of, drawn):
    _answers_in_both_modes(engine_of("minicpmv4_6", "q8"), drawn)


def _answers_in_both_modes(engine, drawn):
    for mode in ("16x", "4x"):
        assert len(engine.ask(drawn, "What is it?", downsample_mode=mode, max_new_tokens=3).tokens) == 3


def test_both_modes_share_their_weights(merger_family, bundle_of):
    files = sorted(path.name for path in (bundle_of(merger_family) / "onnx").iterdir())
    assert sum("vision_encoder" in name and name.endswith(".data") for name in files) == 1
    assert sum("vision_encoder" in name and name.endswith(".onnx") for name in files) == 2


def test_a_mode_is_opened_when_it_is_needed(bundle_of, drawn):
    from mcv_runtime import load
    from mcv_runtime.sessions.graphs import cpu_session

    opened = []
    engine = load(bundle_of("minicpmv4_6"), session_factory=lambda *a: opened.append(a[0].name) or cpu_session(*a))
    engine.encode_image(drawn)
    assert opened == ["vision_encoder.onnx", "merger.onnx", "decoder_with_past.onnx"]
    assert len(engine.encode_image(drawn, downsample_mode="4x").embeds) > 200
    engine.encode_image(drawn, downsample_mode="4x")
    assert opened[3:] == ["vision_encoder_4x.onnx"]


def test_a_video_is_asked_about_again(engine_of):
    engine = engine_of("minicpmv4_6")
    frames = [Image.new("RGB", (64, 48), (shade, 0, 0)) for shade in (0, 90, 200)]
    clip = engine.encode_video(Video(frames))
    first = engine.ask(clip, "What moves?", max_new_tokens=4)
    assert first.tokens == engine.ask(Video(frames), "What moves?", max_new_tokens=4).tokens
    assert len(first.pictures) == 3
    assert len(engine.ask(Video(frames), "What moves?", max_new_tokens=1, max_num_frames=2).pictures) == 2


def test_options_that_a_model_does_not_have(engine_of, golden_engine, drawn):
    with pytest.raises(OptionError, match="16x, 4x"):
        engine_of("minicpmv4_6").ask(drawn, "x", downsample_mode="8x")
    with pytest.raises(OptionError, match="no such choice"):
        golden_engine.ask(drawn, "x", downsample_mode="4x")
