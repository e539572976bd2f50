"""What is not read twice: earlier requests' beginnings, conversations, saved and forked ones; batches, several rows."""

import threading

import numpy as np
import pytest

from mcv_runtime import OptionError, Options, OutputError, Request, load
from mcv_runtime.errors import ChatFileError

FAMILIES = ["minicpmv2_6", "minicpmv4_5", "minicpmv4_6", "minicpmv4_7"]
"""Attention alone, attention with the template's thoughts, recurrent states, and positions on a canvas."""
SHORT = {"max_new_tokens": 10}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def engine(family, bundle_of):
    return load(bundle_of(family), threads=1)


@pytest.fixture(scope="module")
def forgetful(family, bundle_of):
    """An engine that reads every prompt from its beginning."""
    return load(bundle_of(family), threads=1, reuse=False)


@pytest.fixture(scope="module")
def drawn(golden_root):
    return golden_root / "images" / "synth_300x200.png"


def test_a_common_beginning_is_read_once(engine, forgetful, drawn):
    engine.ask(drawn, "What is this?", **SHORT)
    for question in ("What is this?", "What is that?", "Why?"):
        answer = engine.ask(drawn, question, **SHORT)
        assert answer.reused_tokens > len(answer.pictures[0].embeds)
        assert answer.tokens == forgetful.ask(drawn, question, **SHORT).tokens
    assert forgetful.ask(drawn, "What is this?", **SHORT).reused_tokens == 0


def test_forgetting(engine, drawn):
    engine.forget()
    engine.ask(drawn, "What is this?", **SHORT)
    slices = []
    again = engine.ask(drawn, "What is this?", progress=slices.append, **SHORT)
    assert again.reused_tokens and not any(event.stage == "slices" for event in slices)
    engine.forget()
    anew = engine.ask(drawn, "What is this?", progress=slices.append, **SHORT)
    assert (anew.tokens, anew.reused_tokens) == (again.tokens, 0)
    assert any(event.stage == "slices" for event in slices)
    chat = engine.chat(**SHORT)
    chat.ask(drawn, "What is this?")
    engine.forget()
    assert chat.ask(None, "And why?").reused_tokens >= 60  # a conversation keeps its own, and offers it to others
    assert engine.ask(drawn, "What is this?", **SHORT).reused_tokens >= 60
    del chat
    engine.forget()
    assert engine.memory().kept == 0


def test_another_picture_is_no_common_beginning(engine, forgetful, golden_root):
    pictures = [np.full((200, 300, 3), shade, np.uint8) for shade in (10, 200)]
    for picture in pictures:
        answer = engine.ask(picture, "What is this?", **SHORT)
        prompt = engine.prompt([{"role": "user", "content": [picture, "What is this?"]}])
        assert answer.reused_tokens <= prompt.visual_positions[0]
        assert answer.tokens == forgetful.ask(picture, "What is this?", **SHORT).tokens


def test_a_conversation_reads_what_is_new(engine, forgetful, drawn):
    chat = engine.chat(**SHORT)
    first = chat.ask(drawn, "What is this?")
    second = chat.ask(None, "And why?")
    assert second.reused_tokens >= len(first.prompt_tokens) - 12  # but for what makes the assistant begin
    messages = [
        {"role": "user", "content": [drawn, "What is this?"]},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "And why?"},
    ]
    whole = forgetful.ask_messages(messages, **SHORT)
    assert (second.prompt_tokens, second.tokens) == (whole.prompt_tokens, whole.tokens)
    assert [message.role for message in chat.messages] == ["user", "assistant"] * 2


def test_a_fork_and_a_saved_conversation_go_on_alike(engine, drawn, tmp_path):
    chat = engine.chat(system="Be brief.", **SHORT)
    chat.ask([drawn, drawn], "What is this?")
    chat.save(tmp_path / "chat.mcv")
    fork = chat.fork()
    loaded = engine.load_chat(tmp_path / "chat.mcv", **SHORT)
    there = chat.ask(None, "Really?")
    assert fork.ask(None, "Are you sure about that?").reused_tokens >= there.reused_tokens
    again = loaded.ask(None, "Really?")
    assert again.tokens == there.tokens
    assert again.reused_tokens >= there.reused_tokens > 60
    assert list(tmp_path.iterdir()) == [tmp_path / "chat.mcv"]


def test_a_batch_answers_as_one_by_one(engine, forgetful, drawn):
    """Prompts and answers of different lengths, with and without pictures."""
    questions = ["Why?", "Describe the picture, please, in every detail that you can see.", "What is this?", "Who?"]
    requests = [
        Request(drawn if number % 3 else None, question * (1 + number % 2), options=Options(max_new_tokens=4 + 5 * number))
        for number, question in enumerate(questions * 2)
    ]
    alone = [forgetful.ask(one.images, one.prompt, options=one.options) for one in requests]
    together = engine.batch(requests)
    assert [answer.tokens for answer in together] == [answer.tokens for answer in alone]
    assert [answer.stop_reason for answer in together] == [answer.stop_reason for answer in alone]
    assert len({len(answer.tokens) for answer in together}) > 3


@pytest.mark.waits
def test_an_interrupted_turn_leaves_conversation_and_engine_usable(engine, forgetful, drawn):
    chat = engine.chat(**SHORT)
    cancel = threading.Event()
    seen = []

    def count(event):
        seen.append(event)
        if event.stage == "answer" and event.done == 3:
            cancel.set()

    answer = chat.ask(drawn, "What is this?", cancel=cancel, progress=count)
    assert (answer.stop_reason, len(answer.tokens)) == ("cancelled", 3)
    assert {event.stage for event in seen} >= {"prompt", "answer"}
    cancel.clear()
    again = chat.ask(None, "Go on.")
    assert again.reused_tokens >= 60
    early = engine.ask(drawn, "What is this?", timeout=1e-9, **SHORT)
    assert (early.stop_reason, early.tokens, early.text) == ("timeout", (), "")
    assert engine.ask(drawn, "What is this?", **SHORT).tokens == forgetful.ask(drawn, "What is this?", **SHORT).tokens


def test_a_turn_that_fails_changes_nothing(engine, drawn):
    chat = engine.chat(**SHORT)
    chat.ask(drawn, "What is this?")
    before = chat.messages
    with pytest.raises(OptionError):
        chat.ask(None, "x", max_new_tokens=0)
    assert chat.messages == before
    chat.reset()
    assert chat.messages == ()
    assert chat.ask(None, "Hello").reused_tokens < 60


def test_small_chunks_change_nothing(engine, forgetful, drawn):
    whole = forgetful.ask(drawn, "What is this?", **SHORT)
    assert forgetful.ask(drawn, "What is this?", prefill_chunk=7, **SHORT).tokens == whole.tokens


def test_memory_of_earlier_requests_is_bounded(bundle_of, family):
    limited = load(bundle_of(family), threads=1, memory_mb=12)
    for number in range(12):
        limited.ask(None, f"{number} " * 200, max_new_tokens=2)
        use = limited.memory()
        assert 0 < use.kept <= 3_000_000
        assert use.running == 0


@pytest.mark.parametrize("damage", ["cut", "flip", "magic", "bundle", "missing"])
def test_damaged_conversations_are_refused(engine_of, bundle_of, tmp_path, damage):
    engine = engine_of("minicpmv2_6")
    chat = engine.chat(**SHORT)
    chat.ask(None, "Hello")
    path = tmp_path / "chat.mcv"
    chat.save(path)
    data = bytearray(path.read_bytes())
    reason = "damaged"
    if damage == "cut":
        path.write_bytes(data[:-100])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "magic":
        path.write_bytes(b"hello")
        reason = "not a conversation"
    elif damage == "missing":
        path.unlink()
        reason = "is not there"
    else:
        engine, reason = engine_of("minicpmv4_5"), "another bundle"
    with pytest.raises(ChatFileError, match=reason) as caught:
        engine.load_chat(path)
    assert "\n" not in str(caught.value)


def test_a_conversation_that_cannot_be_written(engine_of, tmp_path):
    chat = engine_of("minicpmv2_6").chat()
    with pytest.raises(OutputError, match="cannot be written"):
        chat.save(tmp_path / "nowhere" / "chat.mcv")
    chat.save(tmp_path / "empty.mcv")
    assert engine_of("minicpmv2_6").load_chat(tmp_path / "empty.mcv").messages == ()


@pytest.mark.waits
def test_threads_share_what_was_read(engine, forgetful, drawn):
    questions = ["What is this?", "Why?", "Who made this?", "Describe it."] * 3
    wanted = [forgetful.ask(drawn, question, **SHORT).tokens for question in questions]
    found = [None] * len(questions)

    def work(start):
        for number in range(start, len(questions), 4):
            found[number] = engine.ask(drawn, questions[number], **SHORT).tokens

    threads = [threading.Thread(target=work, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


def test_state_of_an_engine_survives_it(bundle_of, tmp_path, family):
    folder, path = bundle_of(family), tmp_path / "state"
    questions = ["What is one?", "What is two, then?"]
    with load(folder, threads=1) as first:
        answers = [first.ask(None, question, max_new_tokens=4) for question in questions]
        known = [first.ask(None, question, max_new_tokens=4).reused_tokens for question in questions]
        assert first.save_state(path) == 2
    with load(folder, threads=1) as second:
        assert second.load_state(path) == 2
        again = [second.ask(None, question, max_new_tokens=4) for question in questions]
    assert [one.tokens for one in again] == [one.tokens for one in answers]
    assert [one.reused_tokens for one in again] == known
    assert min(known) > 10


def test_state_of_another_bundle_or_damaged(bundle_of, tmp_path, family):
    path = tmp_path / "state"
    with load(threads=1) as other:
        other.ask(None, "What is one?", max_new_tokens=2)
        other.save_state(path)
    with load(bundle_of(family), threads=1) as engine, pytest.raises(ChatFileError, match="another bundle"):
        engine.load_state(path)
    path.write_bytes(path.read_bytes()[:-100])
    with load(threads=1) as engine:
        with pytest.raises(ChatFileError, match="damaged"):
            engine.load_state(path)
        assert engine.memory().kept == 0
