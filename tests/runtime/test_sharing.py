"""What goes wrong for one of those who share an engine, or is in short supply, and what the others notice of it."""

import asyncio
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from mcv_runtime import OptionError, Options, PromptError, Request, RunError, load
from mcv_runtime.decoding.ticket import Ticket
from mcv_runtime.progress import Event

DEMO = Path(__file__).parents[2] / "models" / "tiny" / "demo.png"
CAPTION, SAID = "Describe the picture.", "a red circle and the text HELLO"


@pytest.fixture(scope="module")
def hybrid(bundle_of):
    return bundle_of("minicpmv4_6")


def tight(bundle, tokens, rows=1.0, *, more=0, reuse=True):
    """An engine whose memory is for so many rows of so many tokens, and the states of `more`."""
    slots = load(bundle, threads=1)._scheduler.slots
    return load(bundle, threads=1, memory_mb=(rows * slots.need(tokens) + more * slots.need(0)) / 1e6 / (5 / 8), reuse=reuse)


def texts(answer):
    return [one.tokens for one in (answer, *answer.alternatives)]


# Interrupts


class Interrupted(ort.InferenceSession):
    """Ends a run of one token with what Ctrl-C raises, once; `whole`: only one row runs at a time."""

    left, whole = -1, True

    def run_with_iobinding(self, binding, run_options=None):
        super().run_with_iobinding(binding, run_options)
        logits = binding.get_outputs()[0].numpy()
        if len(logits) > 1 and not type(self).whole:
            raise ValueError("one by one")
        type(self).left -= 1
        if not type(self).left:
            raise KeyboardInterrupt


@pytest.mark.parametrize("whole", [True, False], ids=["together", "one by one"])
@pytest.mark.parametrize("options", [{"num_beams": 4, "num_return_sequences": 4}, {"prompt_lookup": True}, {}])
def test_what_was_interrupted_goes_on_as_if_nothing_had_been(hybrid, options, whole):
    """A token that was read is not read again, and beams that were put in order stay so."""
    Interrupted.left, Interrupted.whole = -1, whole
    engine = load(hybrid, session_options=ort.SessionOptions(), session_factory=Interrupted, reuse=False)
    requests = [
        Request(None, "one two three, what is this", options=Options(max_new_tokens=12, **options)),
        Request(None, "hi", options=Options(max_new_tokens=12)),
        Request(np.full((40, 40, 3), 200, np.uint8), "hi", options=Options(max_new_tokens=12)),
    ]
    wanted = [texts(engine.submit(request).result()) for request in requests]
    interrupted = 0
    for after in range(1, 15):
        tickets = [engine.submit(request) for request in requests]
        Interrupted.left = after
        try:
            tickets[0].result()
        except KeyboardInterrupt:
            interrupted += 1
        Interrupted.left = -1
        assert [texts(ticket.result()) for ticket in tickets] == wanted
    assert interrupted > 5


def test_an_interrupt_behind_the_prompt_loses_nothing(hybrid, monkeypatch):
    engine = load(hybrid, threads=1)
    slots, wanted = engine._scheduler.slots, load(hybrid, threads=1).ask(None, "Hi", max_new_tokens=4)
    checkpoint = slots.checkpoint

    def interrupted(row):
        if row.length == len(wanted.prompt_tokens):
            monkeypatch.setattr(slots, "checkpoint", checkpoint)
            raise KeyboardInterrupt
        checkpoint(row)

    monkeypatch.setattr(slots, "checkpoint", interrupted)
    ticket = engine.stream(None, "Hi", max_new_tokens=4)
    with pytest.raises(KeyboardInterrupt):
        ticket.result()
    assert ticket.result().tokens == wanted.tokens


# Memory


@pytest.mark.parametrize("states", [3, 6, 10])
def test_memory_stays_within_its_limit_with_states_to_go_back_to(hybrid, states):
    """Rows that begin with another one's tokens, several of one request, and conversations, where all is tight."""
    engine = tight(hybrid, 600, more=states - 1)
    slots, turn, beyond = engine._scheduler.slots, engine._scheduler._turn, []

    def watched():
        worked = turn()
        if slots.nbytes > slots.limit:
            beyond.append(slots.nbytes - slots.limit)
        return worked

    engine._scheduler.work._turn = watched
    brief = Options(max_new_tokens=4, max_slice_nums=1)
    chat = engine.chat(options=brief)
    chat.ask(DEMO, "Hi")
    other = chat.fork()
    chat.ask(None, "more")
    other.ask(None, "less", num_beams=2)
    third = other.fork()
    several = Options(max_new_tokens=4, max_slice_nums=1, temperature=1.0, num_return_sequences=2, seed=1)
    engine.batch([Request(None, "x y", options=Options(max_new_tokens=3, num_beams=3)), Request(DEMO, "Hi", options=several)])
    third.ask(None, "q", temperature=1.0, num_return_sequences=3, seed=1)
    assert beyond == []


def test_nothing_is_forgotten_for_who_cannot_begin_anyway(hybrid):
    engine = tight(hybrid, 200, 2)
    slots = engine._scheduler.slots
    engine.ask(None, "Hi", max_new_tokens=2)
    running = engine.stream(None, "one two", max_new_tokens=100)
    next(running)
    kept = engine.memory().kept
    assert kept > 0
    large = engine.submit(
        Request(None, "ho", options=Options(max_new_tokens=(slots.limit - slots.need(0)) // slots._token_bytes - 40))
    )
    for _ in range(10):
        next(running)
    assert engine._scheduler.load == (1, 1, 0)
    assert engine.memory().kept == kept
    running.close()
    assert large.result().tokens


def test_rows_that_cannot_be_brought_together_run_one_by_one(monkeypatch):
    """Where there is no memory to move one, nobody hears of it."""
    engine = load(threads=1)

    def full(arena, rows, running):
        raise MemoryError

    monkeypatch.setattr("mcv_runtime.decoding.slots.side_by_side", full)
    assert [answer.text for answer in engine.batch([Request(DEMO, CAPTION)] * 3)] == [SAID] * 3


def test_who_needs_much_memory_is_not_passed_by_forever(hybrid):
    """Small requests that always overlap leave no room; those that come later wait for the large one."""
    engine = tight(hybrid, 100, 2.5, reuse=False)
    slots = engine._scheduler.slots

    def small():
        ticket = engine.submit(Request(None, "hi", options=Options(max_new_tokens=40)))
        tickets.append(ticket)
        return ticket

    tickets = []
    first, second = small(), small()
    next(first)
    for _ in range(10):
        next(first)
    room = (slots.limit - slots.need(0)) // slots._token_bytes
    large = engine.submit(Request(None, "ho", options=Options(max_new_tokens=room - 40)))
    for _ in range(8):
        first.result()
        first, second = second, small()
        if large.done:
            break
        engine._scheduler.work.wait(lambda: bool(second._job.pieces) or second._job.done)  # noqa: B023
    assert large.done


def test_time_of_its_own_stands_still_for_who_waits_for_memory(hybrid):
    engine = tight(hybrid, 400, 1.5)
    slots = engine._scheduler.slots
    wide = slots.limit // slots._token_bytes // 2
    requests = [Request(None, f"{n}", options=Options(max_new_tokens=min(wide, 400), timeout=1e9)) for n in range(2)]
    first, second = (engine.submit(one, own_time=True) for one in requests)
    next(first)
    deadline = second._job.patience._deadline
    answer = first.result()
    assert not second._job.rows  # there was no room beside the first one
    assert second._job.patience._deadline >= deadline + answer.timings.decode / 2


# Coroutines


def test_a_loop_without_an_executor_leaves_others_be():
    engine = load(threads=1)

    async def asked():
        return (await engine.submit(Request(DEMO, CAPTION))).text

    loop = asyncio.new_event_loop()
    loop.run_until_complete(loop.shutdown_default_executor())
    with pytest.raises(RuntimeError, match="shutdown"):
        loop.run_until_complete(asked())
    loop.close()
    assert asyncio.run(asked()) == SAID


@pytest.mark.waits
def test_an_executor_that_ends_before_it_has_begun():
    engine = load(threads=1)
    loop, executor, free = asyncio.new_event_loop(), ThreadPoolExecutor(1), threading.Event()
    loop.set_default_executor(executor)

    async def asked():
        return (await engine.submit(Request(DEMO, CAPTION))).text

    async def ended():
        busy = loop.run_in_executor(None, free.wait)
        waiting = asyncio.ensure_future(asked())
        while not engine._scheduler.work._awaited:
            await asyncio.sleep(0)
        executor.shutdown(wait=False, cancel_futures=True)
        free.set()
        await busy
        with pytest.raises(RuntimeError, match="shutdown"):
            await waiting

    loop.run_until_complete(ended())
    loop.close()
    assert asyncio.run(asked()) == SAID


def test_everybody_who_waits_is_woken():
    job = load(threads=1).submit(Request(DEMO, CAPTION))._job
    woken = []

    def leave():
        woken.append("one")
        job.wakers.remove(leave)

    job.wakers += [leave, lambda: woken.append("other")]
    job.wake()
    assert woken == ["one", "other"]


def test_what_is_reported_after_a_callback_has_raised_is_dropped():
    """By a thread that was about to, while another one called it."""

    def bad(event):
        raise ZeroDivisionError

    ticket = load(threads=1).stream(DEMO, CAPTION, progress=bad)
    with pytest.raises(ZeroDivisionError):
        ticket.result()
    ticket._job.events.append(Event("answer", 1, 0))
    Ticket._tell(ticket)
    assert not ticket._job.events
    with pytest.raises(ZeroDivisionError):
        ticket.result()


# Conversations


def test_a_conversation_can_be_looked_at_while_a_question_is_prepared():
    """Somebody else's code runs there: here the event that cancels."""
    seen = []
    chat = load(threads=1).chat()

    class Cancel(threading.Event):
        def is_set(self):
            seen.append(chat.messages)
            return super().is_set()

    assert chat.ask(DEMO, CAPTION, cancel=Cancel()).text == SAID
    assert seen


# The engine


def test_closing_lets_go_of_sessions_and_memory():
    sessions = []

    def opened(path, options):
        session = ort.InferenceSession(path, options)
        sessions.append(weakref.ref(session))
        return session

    engine = load(session_options=ort.SessionOptions(), session_factory=opened)
    engine.ask(DEMO, CAPTION, max_new_tokens=2)
    engine.close()
    gc.collect()
    assert [session() for session in sessions] == [None] * 3
    assert (engine.memory().running, engine.memory().kept, engine.memory().pictures) == (0, 0, 0)
    with pytest.raises(RunError, match="closed"):
        engine.encode_image(DEMO)


@pytest.mark.parametrize("wrong", [None, "x", 5, {"prompt": "x"}])
def test_what_is_no_request(wrong):
    engine = load(threads=1)
    brief = Request(DEMO, CAPTION, options=Options(max_new_tokens=1))
    first, second, third = engine.submit_all([brief, wrong, brief])
    assert first.result().tokens == third.result().tokens
    for call in (second.result, lambda: engine.submit(wrong), lambda: engine.batch([wrong])):
        with pytest.raises(OptionError, match=rf"a request is a Request\(...\), not {type(wrong).__name__}"):
            call()


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2, "length_penalty": 1e300},
        {"num_beams": 2, "length_penalty": -1e300},
        {"repetition_penalty": 1e300},
        {"repetition_penalty": 1e-320},
        {"presence_penalty": 1e308},
    ],
)
def test_numbers_that_cannot_be_reckoned_with(options):
    (name,) = options.keys() - {"num_beams"}
    with pytest.raises(OptionError, match=f"^{name} must be from .* to .*, not "):
        load(threads=1).submit(Request(DEMO, CAPTION, options=Options(**options)))


@pytest.mark.parametrize("wrong", [5, None, b"x", ["x"]])
def test_a_prompt_is_a_text(wrong):
    engine = load(threads=1)
    with pytest.raises(PromptError, match=f"is a text, not {type(wrong).__name__}"):
        engine.ask(DEMO, wrong)
    with pytest.raises(PromptError, match="is a text, not int"):
        engine.ask(DEMO, CAPTION, system=5)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("bundle", 5),
        ("threads", "2"),
        ("threads", 2.5),
        ("threads", True),
        ("memory_mb", "12"),
        ("max_rows", "4"),
        ("max_rows", 2.5),
        ("max_rows", float("nan")),
        ("max_pixels", "x"),
        ("batch_slices", "x"),
        ("batch_slices", 2.5),
        ("cache_dir", 5),
        ("cache_dir_mb", "x"),
        ("low_memory", "no"),
        ("reuse", "no"),
        ("kv", 3),
        ("provider", 5),
        ("session_factory", 5),
        ("session_options", 5),
    ],
)
def test_arguments_of_another_type_are_named(name, wrong):
    with pytest.raises(OptionError, match=f"^{name} must be .*, not "):
        load(**{name: wrong})
