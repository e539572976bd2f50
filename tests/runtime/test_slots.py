"""The memory of rows: what requests share in it, what joining and leaving copy, and what fits."""

import tracemalloc
from pathlib import Path

import pytest

from mcv_runtime import Options, Request, ResourceError, load
from mcv_runtime.decoding.arena import DeviceArena

DEMO = Path(__file__).parents[2] / "models" / "tiny" / "demo.png"
CAPTION, SAID = "Describe the picture.", "a red circle and the text HELLO"
TEXT = "What does the text say?"


@pytest.fixture
def engine():
    """The demonstration model, which knows nothing yet."""
    return load(threads=1)


def request(question=CAPTION, picture=DEMO, **options):
    return Request(picture, question, options=Options(**options))


def test_joining_copies_nothing_and_leaving_moves_one_row(engine):
    slots = engine._scheduler.slots
    first = engine.stream(None, "one two three", max_new_tokens=30, stop_token_ids=[], repetition_penalty=1.3)
    next(first)
    before = slots.copied
    second = engine.stream(DEMO, CAPTION)
    next(second)
    shared = sum(row.length for row in slots.rows) and slots.copied - before
    token = slots.need(1) - slots.need(0)
    assert shared <= 16 * token  # the template's beginning, which both have
    list(second)
    list(first)
    assert slots.copied - before <= 16 * token + max(row.length for row in slots.rows) * token


def test_a_short_common_beginning_copies_no_more_than_it(engine):
    engine.ask(None, "? " * 1500, max_new_tokens=1)
    slots = engine._scheduler.slots
    before, kept = slots.copied, engine.memory().kept
    answer = engine.ask(None, "Hi", max_new_tokens=1)
    assert 0 < answer.reused_tokens < 40
    token = slots.need(1) - slots.need(0)
    assert slots.copied - before <= answer.reused_tokens * token
    assert engine.memory().kept - kept <= (len(answer.prompt_tokens) + 1) * token


def test_kept_beginnings_are_counted_by_what_they_hold(bundle_of):
    engine = load(bundle_of("minicpmv2_6"), threads=1, memory_mb=16)
    for number in range(20):
        engine.ask(None, f"{number} " * (30 + 100 * (number % 3)), max_new_tokens=2)
        use = engine.memory()
        assert use.kept <= 4_000_000
        assert use.kept >= sum(engine._scheduler.slots.need(row.length) for row in engine._scheduler.slots.rows)


def test_what_never_fits_is_said_when_it_is_asked(bundle_of):
    engine = load(bundle_of("minicpmv2_6"), threads=1, memory_mb=4)
    with pytest.raises(ResourceError, match=r"take [\d,]+ MB, and memory_mb leaves 2; raise it"):
        engine.submit(Request(None, "Hi", options=Options(max_new_tokens=8000)))
    with pytest.raises(ResourceError, match="ask for fewer tokens or answers"):
        engine.submit(Request(None, "Hi", options=Options(num_beams=200, max_new_tokens=100)))
    assert engine.ask(None, "Hi", max_new_tokens=3).tokens


def test_one_after_the_other_where_memory_is_for_one(bundle_of):
    """Each may get nearly all of it, so the others wait, and nothing is lost."""
    path = bundle_of("minicpmv4_6")
    small, large = load(path, threads=1, memory_mb=8), load(path, threads=1)
    limit = small._scheduler.slots.limit
    tokens = limit // 2 // (small._scheduler.slots.need(2) - small._scheduler.slots.need(1))
    requests = [Request(None, f"Tell me about {n}.", options=Options(max_new_tokens=12, stop_token_ids=[n])) for n in range(6)]
    wide = [Request(one.images, one.prompt, options=Options(max_new_tokens=int(tokens * 0.6), stop="e")) for one in requests]
    assert [a.tokens for a in small.batch(wide)] == [large.ask(None, r.prompt, options=r.options).tokens for r in wide]


def test_no_request_waits_for_room_that_its_own_beginning_takes(bundle_of):
    engine = load(bundle_of("minicpmv2_6"), threads=1, memory_mb=16)
    slots = engine._scheduler.slots
    token = slots.need(1) - slots.need(0)
    hundred = engine.prompt([{"role": "user", "content": "word " * 100}])
    text = "word " * (90 * slots.keep_limit // token // len(hundred.ids))
    engine.ask(None, text, max_new_tokens=1)
    assert engine.memory().kept > 0.8 * slots.keep_limit
    asked = engine.prompt([{"role": "user", "content": text + "Why?"}])
    room = slots.limit // token - len(asked.ids) - 2
    other = engine.ask(None, text + "Why?", max_new_tokens=room, stop=["a", "e", "i", "o", "u", "<"], timeout=120)
    assert other.stop_reason == "stop"


# Conversations


@pytest.mark.parametrize("family", ["minicpmv2_6", "minicpmv4_6"])
def test_keys_and_values_on_a_device_stay_there(family, bundle_of, engine_of, monkeypatch):
    """With the machine's own memory as the device: a token copies nothing, and tokens are the same."""
    monkeypatch.setattr("mcv_runtime.engine.device_of", lambda provider: "cpu")
    engine = load(bundle_of(family), threads=1)
    slots = engine._scheduler.slots
    assert isinstance(slots.arena, DeviceArena)
    usual, options = engine_of(family), {"max_new_tokens": 8}
    wanted = [usual.ask(DEMO, question, **options).tokens for question in (CAPTION, TEXT, "Why?")]
    assert [answer.tokens for answer in engine.batch([request(q, **options) for q in (CAPTION, TEXT, "Why?")])] == wanted
    stream = engine.stream(DEMO, CAPTION, **options)
    next(stream)
    copied = slots.copied
    list(stream)
    assert slots.copied == copied
    assert [engine.ask(DEMO, q, **options).tokens for q in (CAPTION, TEXT)] == wanted[:2]
    beams = engine.ask(DEMO, CAPTION, num_beams=3, **options).tokens
    assert beams == usual.ask(DEMO, CAPTION, num_beams=3, **options).tokens


def test_saving_and_loading_take_one_tensor_at_a_time(bundle_of, tmp_path):
    engine = load(bundle_of("minicpmv2_6"), threads=1)
    chat = engine.chat(max_new_tokens=2)
    chat.ask(None, "word " * 5000)
    held = engine.memory().kept
    tracemalloc.start()
    try:
        chat.save(tmp_path / "chat.mcv")
        saving = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        engine.load_chat(tmp_path / "chat.mcv")
        loading = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "chat.mcv").stat().st_size >= 0.9 * held
    assert max(saving, loading) < held


# What goes wrong
