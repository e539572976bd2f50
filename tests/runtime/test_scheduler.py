"""Requests of all kinds on one engine: who comes, who goes, what they share, and what each of them is spared."""

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mcv_runtime import OptionError, Options, Request, RunError, load

DEMO = Path(__file__).parents[2] / "models" / "tiny" / "demo.png"
CAPTION, SAID = "Describe the picture.", "a red circle and the text HELLO"
TEXT = "What does the text say?"


@pytest.fixture
def engine():
    """The demonstration model, which knows nothing yet."""
    return load(threads=1)


def request(question=CAPTION, picture=DEMO, **options):
    return Request(picture, question, options=Options(**options))


def test_while_a_prompt_is_read_others_go_on(engine):
    """A long prompt is read in pieces, and after each one every running row gets its token."""
    order = []
    long = engine.submit(request("? " * 300, prefill_chunk=16, max_new_tokens=2, progress=lambda event: order.append(event)))
    running = engine.stream(DEMO, CAPTION, progress=lambda event: order.append("token"), stop_token_ids=[], max_new_tokens=40)
    next(running)
    tickets = [running, long]
    list(running)
    long.result()
    del tickets
    reading = [place for place, event in enumerate(order) if event != "token" and event.stage == "prompt"]
    pieces = sum(event != "token" and event.stage == "prompt" for event in order)
    assert pieces >= 600 // 16
    assert len(reading) == pieces
    answer = running.result()
    assert answer.text == SAID
    assert 0 < answer.timings.longest_gap < answer.timings.decode + long.result().timings.prefill


@pytest.mark.parametrize("token_s", [None, 1e-9, 1e9])
def test_how_fast_a_prompt_is_read_is_learnt_from_what_was_read(engine, token_s):
    """A first piece, or one during which the machine slept, does not decide how the rest is read."""
    engine.ask(None, "?", max_new_tokens=1)  # too short to tell
    engine._scheduler._pace.token_s = token_s
    read = []
    options = Options(max_new_tokens=1, progress=lambda event: event.stage == "prompt" and read.append(event.done))
    answer = engine.ask(None, "? " * 600, options=options)
    first, *others = np.diff([answer.reused_tokens, *read])
    assert first == {None: 64, 1e-9: 512, 1e9: 16}[token_s]
    assert max(others) > 64


def test_a_stream_may_be_read_by_any_thread(engine):
    """As a web framework does, which gives every step to whichever thread of its pool is free."""
    chat = engine.chat()
    stream, text = chat.stream(DEMO, CAPTION), ""
    with ThreadPoolExecutor(2) as pool:
        for _ in range(100):
            piece = pool.submit(next, stream, None).result()
            if piece is None:
                break
            text += piece
    assert text == SAID
    assert chat.ask(None, TEXT).text == "HELLO"
    stream = chat.stream(DEMO, CAPTION)
    next(stream)
    closing = threading.Thread(target=stream.close)
    closing.start()
    closing.join()
    assert chat.ask(None, TEXT).text == "HELLO"
    assert [message.role for message in chat.messages] == ["user", "assistant"] * 3


def test_a_question_inside_a_stream_comes_after_it(engine):
    chat = engine.chat()
    stream = chat.stream(DEMO, CAPTION)
    text = next(stream)
    inner = chat.ask(None, TEXT)
    assert inner.text == "HELLO"
    assert text + "".join(stream) == SAID
    said = [part for message in chat.messages for part in message.parts if isinstance(part, str)]
    assert said == [CAPTION, SAID, TEXT, "HELLO"]


def test_the_next_question_heeds_its_timeout_while_the_last_is_answered(engine):
    chat = engine.chat()
    stream = chat.stream(DEMO, CAPTION)
    next(stream)
    with engine._scheduler.work.exclusive(), ThreadPoolExecutor(1) as pool:  # nothing goes on meanwhile
        late = pool.submit(chat.ask, None, TEXT, timeout=0.01).result()
    assert (late.stop_reason, late.tokens) == ("timeout", ())
    assert "".join(stream)
    assert chat.ask(None, TEXT).text == "HELLO"


def test_a_forgotten_stream_frees_its_row(engine):
    """Also where it is collected while its thread is at work."""
    streams = [engine.stream(DEMO, CAPTION) for _ in range(4)]
    for stream in streams:
        next(stream)
    assert engine.memory().running
    cycle = [streams]
    cycle.append(cycle)
    del streams, stream, cycle
    gc.collect()
    assert engine.ask(DEMO, TEXT).text == "HELLO"
    assert engine.memory().running == 0
    assert sum(engine._scheduler.load) == 0


@pytest.mark.parametrize("family", ["minicpmv2_6", "minicpmv4_6"])
def test_a_progress_that_raises_leaves_memory_and_conversation_whole(family, bundle_of, tmp_path):
    """While a stop string holds text back, too."""
    engine = load(bundle_of(family), threads=1)
    chat = engine.chat(max_new_tokens=12)
    chat.ask(None, "Hello")

    class Enough(Exception):  # noqa: N818
        pass

    def stop(event):
        if event.stage == "answer" and event.done == 3:
            raise Enough

    with pytest.raises(Enough):
        chat.ask(None, "Go on.", stop="\U0010ffff" * 9, progress=stop)
    assert [message.role for message in chat.messages] == ["user", "assistant"]
    fork = chat.fork()
    chat.save(tmp_path / "chat.mcv")
    loaded = engine.load_chat(tmp_path / "chat.mcv", max_new_tokens=12)
    wanted = load(bundle_of(family), threads=1, reuse=False).chat(max_new_tokens=12)
    wanted.ask(None, "Hello")
    wanted = wanted.ask(None, "Really?").tokens
    assert [one.ask(None, "Really?").tokens for one in (chat, fork, loaded)] == [wanted] * 3


def test_a_batch_is_as_asking_one_by_one(engine):
    """A deadline counts a request's own time, a callback that raises ends its own request."""

    def broken(event):
        raise ZeroDivisionError

    slow = [request("? " * 900, picture=None, max_new_tokens=1, prefill_chunk=8) for _ in range(3)]
    tickets = list(engine.submit_all([*slow, request(TEXT, timeout=60), request(progress=broken), request(), *slow]))
    answers = [ticket.result() for ticket in tickets[:4] + tickets[5:]]
    assert [(answers[3].text, answers[3].stop_reason), answers[4].text] == [("HELLO", "stop"), SAID]
    with pytest.raises(ZeroDivisionError):
        tickets[4].result()
    with pytest.raises(OptionError, match="top_p"):
        engine.batch([request(), request(top_p=0.5), request(TEXT)])


def test_own_time_stands_still_while_others_are_worked_for():
    from mcv_runtime.request.patience import Patience

    now = [0.0]
    usual, own = (Patience(5, None, own_time=patient, clock=lambda: now[0]) for patient in (False, True))
    own.hold()
    now[0] = 100.0
    assert (usual.ending, own.ending) == ("timeout", None)
    own.resume()
    now[0] = 104.0
    own.pause(3)
    now[0] = 107.9
    assert own.ending is None
    now[0] = 108.1
    assert own.ending == "timeout"


@pytest.mark.parametrize(
    "options", [{"num_beams": 3, "num_return_sequences": 2}, {"prompt_lookup": True}, {"temperature": 1.0}]
)
def test_who_is_cancelled_or_late_gets_what_there_is(engine, options):
    cancel = threading.Event()

    def count(event):
        if event.stage == "answer" and event.done >= 4:
            cancel.set()

    answer = engine.ask(DEMO, CAPTION, cancel=cancel, progress=count, logprobs=True, **options)
    assert answer.stop_reason == "cancelled"
    assert len(answer.tokens) >= 4
    assert len(answer.logprobs) == len(answer.tokens)
    assert answer.text
    late = engine.ask(DEMO, CAPTION, timeout=1e-9, **options)
    assert (late.stop_reason, late.tokens) == ("timeout", ())


def test_log_probabilities_cost_no_run(engine, monkeypatch):
    decoder = engine._scheduler.decoder
    runs = []
    run = decoder._run
    monkeypatch.setattr(decoder, "_run", lambda *arguments: runs.append(1) or run(*arguments))
    for options in ({"num_beams": 3}, {"prompt_lookup": True}, {}):
        engine.ask(DEMO, CAPTION, **options)
        counts = []
        for logprobs in (False, True):
            runs.clear()
            engine.ask(DEMO, CAPTION, logprobs=logprobs, **options)
            counts.append(len(runs))
        assert counts[0] == counts[1] > 1


class Damaged:
    """A decoder's session that gives NaN as often as it is told to, or fails for more than one row."""

    def __init__(self, kind):
        self.kind, self.left = kind, 0

    def __call__(self, path, options):
        from mcv_runtime.sessions.graphs import cpu_session

        session, mine = cpu_session(path, options), self
        if not path.name.startswith("decoder"):
            return session

        class Binding:
            def __init__(self):
                self.inner = session.io_binding()
                self.rows = 0

            def __getattr__(self, name):
                return getattr(self.inner, name)

            def bind_cpu_input(self, name, value):
                self.rows = len(value) if name == "input_ids" else self.rows
                self.inner.bind_cpu_input(name, value)

            def get_outputs_as_ortvaluevector(self):
                logits = self.inner.get_outputs_as_ortvaluevector()[0]
                array = logits.numpy().copy()
                if mine.kind == "nan" and mine.left and array.size:
                    mine.left -= 1
                    array[0, 3] = np.nan
                return [type("Value", (), {"numpy": lambda self: array})()]

        class Session:
            def io_binding(self):
                return Binding()

            def run_with_iobinding(self, binding):
                if mine.kind == "rows" and binding.rows > 1:
                    raise RuntimeError("Failed to allocate memory for requested buffer")
                session.run_with_iobinding(binding.inner)

        return Session()


def test_nothing_is_answered_from_numbers_that_are_none():
    damaged = Damaged("nan")
    engine = load(threads=1, session_factory=damaged)
    for options in ({}, {"temperature": 1.0}, {"num_beams": 2}, {"prompt_lookup": True}):
        damaged.left = 1
        with pytest.raises(RunError, match="the decoder gave numbers that are none"):
            engine.ask(DEMO, CAPTION, **options)
        assert engine.ask(DEMO, CAPTION).text == SAID
    first, second = engine.submit(request()), engine.submit(request(TEXT))
    next(first)
    damaged.left = 1
    ended = []
    for ticket in (first, second):
        try:
            ended.append(ticket.result().text)
        except RunError:
            ended.append("damaged")
    assert sorted(ended) in (["HELLO", "damaged"], [SAID, "damaged"])  # one request, and no other


def test_rows_that_cannot_run_together_run_one_by_one():
    engine = load(threads=1, session_factory=Damaged("rows"))
    assert [answer.text for answer in engine.batch([request(), request(TEXT), request()])] == [SAID, "HELLO", SAID]


@pytest.mark.waits
def test_coroutines(engine):
    async def streamed():
        return "".join([piece async for piece in engine.stream(DEMO, CAPTION)])

    async def given_up():
        ticket = engine.submit(request())
        with engine._scheduler.work.exclusive():  # nothing goes on before it is given up
            task = asyncio.ensure_future(ticket._finished())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        return ticket

    async def all_of_them():
        tickets = [engine.submit(request(TEXT if number % 2 else CAPTION)) for number in range(8)]
        texts = [answer.text for answer in await asyncio.gather(*tickets)]
        return [*texts, await streamed()], await given_up()

    texts, ticket = asyncio.run(all_of_them())
    assert texts == [SAID, "HELLO"] * 4 + [SAID]
    assert ticket.result().stop_reason == "cancelled"
    assert sum(engine._scheduler.load) == 0


@pytest.mark.waits
def test_a_coroutine_that_is_cancelled_leaves_the_answer_to_others(engine):
    async def asked():
        ticket = engine.submit(request())
        with engine._scheduler.work.exclusive():
            first, second = (asyncio.ensure_future(ticket._finished()) for _ in range(2))
            await asyncio.sleep(0)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
        return (await second).text

    assert asyncio.run(asked()) == SAID


def test_a_callback_may_ask_the_same_engine(engine):
    found = []

    def ask(event):
        if event.stage == "answer" and event.done == 2:
            found.append(engine.ask(DEMO, TEXT).text)

    assert engine.ask(DEMO, CAPTION, progress=ask).text == SAID
    assert found == ["HELLO"]


def test_requests_of_messages(engine):
    messages = [{"role": "user", "content": [DEMO, TEXT]}, {"role": "assistant", "content": "HELLO"}]
    asked = [*messages, {"role": "user", "content": "What colour is the circle?"}]
    assert engine.submit(Request(messages=asked)).result().text == "red"
    with pytest.raises(OptionError, match="leave one of them out"):
        Request(DEMO, TEXT, messages=asked)
    make = partial(Request, DEMO, TEXT, options={"seed": 1})
    with pytest.raises(OptionError, match="options are Options"):
        make()
