"""Who comes first, who waits, who is refused, and what becomes of those who leave."""

import asyncio
import json
import socket
import threading
import time
from dataclasses import replace

import pytest
from tiny_server import ANSWER, DEMO, LONG, Gate, about_demo, endless, text_chat

from mcv_serve.asked import Asked, Turn
from mcv_serve.errors import ApiError
from mcv_serve.service import Service
from mcv_serve.settings import Settings

pytestmark = pytest.mark.waits
CHAT = "/v1/chat/completions"


def until(found, wanted):
    """Ask until the answer is what is wanted."""
    while not wanted(value := found()):
        time.sleep(0.005)
    return value


def slots(client):
    return client.get("/slots").json()


def said(lines):
    """The text of a stream, from here on."""
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


class Asking(threading.Thread):
    """A chat in a thread of its own."""

    def __init__(self, running, body, headers=None):
        super().__init__()
        self._running, self._body, self._headers = running, body, headers

    def run(self):
        with self._running.client() as client:
            self.response = client.post(CHAT, json=self._body, headers=self._headers)

    def answer(self):
        self.join()
        return self.response.json()


def test_a_client_that_leaves_frees_its_row_at_the_next_token(running, client, engine):
    with Gate(engine) as gate:
        with client.stream("POST", CHAT, json=endless(stream=True)) as response:
            lines = response.iter_lines()
            gate.let(4)
            while '"content":"a' not in next(lines):
                pass
            for _ in range(5):
                gate.reached.acquire()  # the fifth step waits
        until(lambda: slots(client), lambda found: not found)
        begun = gate.steps
        gate.let(1)
        with Gate(engine):
            pass
        until(engine.memory, lambda memory: memory.running == 0)
        assert gate.steps == begun == 5


def test_a_client_that_leaves_before_its_answer_is_given_up_too(running, client, engine):
    with Gate(engine) as gate:
        asking = Asking(running, text_chat("Say hello", max_tokens=3))
        with running.client() as other:
            request = other.build_request("POST", CHAT, json=endless())
            leaving = threading.Thread(target=lambda: _send_and_leave(running, request))
            leaving.start()
            gate.reached.acquire()
            until(lambda: slots(client), lambda found: len(found) == 1)
            leaving.join()
            gate.let(1)
            until(lambda: slots(client), lambda found: not found)
        asking.start()
        gate.open()
        assert asking.answer()["choices"][0]["finish_reason"] in ("stop", "length")
    until(engine.memory, lambda memory: memory.running == 0)


def _send_and_leave(running, request):
    host, port = running.socket.getsockname()
    with socket.create_connection((host, port)) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(request.content)}\r\n\r\n"
        connection.sendall(head.encode() + request.content)
        with running.client() as client:
            until(lambda: slots(client), lambda found: found and found[0]["state"] != "queued")


def test_equal_requests_in_flight_are_computed_once(serving, engine):
    with serving() as running, running.client() as client, Gate(engine) as gate:
        body = endless()
        first, second = Asking(running, body), Asking(running, body | {"user": "another", "stream": False})
        other = Asking(running, body | {"temperature": 1.0})
        first.start()
        gate.reached.acquire()
        second.start()
        until(lambda: slots(client), lambda found: [one["listeners"] for one in found] == [2])
        other.start()
        until(lambda: slots(client), lambda found: len(found) == 2)  # one that draws is not the same as another
        gate.open()
        texts = [asking.answer()["choices"][0]["message"]["content"] for asking in (first, second)]
        assert texts == [LONG] * 2
        other.join()
        assert "mcv_requests_joined_total 1.0" in client.get("/metrics").text


def test_one_of_two_equal_ones_may_leave(serving, engine):
    with serving() as running, running.client() as client, Gate(engine) as gate:
        staying = Asking(running, endless())
        staying.start()
        gate.reached.acquire()
        with running.client() as other, other.stream("POST", CHAT, json=endless(stream=True)):
            until(lambda: slots(client), lambda found: found[0]["listeners"] == 2)
        until(lambda: slots(client), lambda found: found[0]["listeners"] == 1)
        gate.open()
        assert staying.answer()["choices"][0]["message"]["content"] == LONG


def test_queue_overflow_says_when_to_come_back(serving, engine):
    with serving(concurrent=1, queue=1) as running, running.client() as client, Gate(engine) as gate:
        first = Asking(running, endless())
        first.start()
        gate.reached.acquire()
        second = Asking(running, text_chat("One", max_tokens=2))
        second.start()
        until(lambda: slots(client), lambda found: [one["state"] for one in found] == ["answering", "queued"])
        refused = client.post(CHAT, json=text_chat("Two", max_tokens=2))
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
        ollama = client.post("/api/chat", json={"messages": [{"role": "user", "content": "Two"}]})
        assert ollama.status_code == 429 and isinstance(ollama.json()["error"], str)
        for path in ("/health", "/ready", "/metrics", "/v1/models"):
            assert client.get(path).status_code == 200
        assert "vllm:num_requests_waiting" in client.get("/metrics").text
        gate.open()
        assert first.answer()["choices"][0]["message"]["content"] == LONG
        assert second.answer()["choices"]


def test_clients_take_turns_in_the_queue(serving, engine):
    with serving(concurrent=1, queue=9, api_keys=("one", "two")) as running, Gate(engine) as gate:
        keys = [{"authorization": f"Bearer {key}"} for key in ("one", "two")]
        every = []
        for at, key in enumerate((0, 0, 0, 0, 1)):
            every.append(Asking(running, text_chat(f"Hello {at}", max_tokens=2), keys[key]))
            every[-1].start()
            if not at:
                gate.reached.acquire()
            until(lambda: list(running.service.answering.values()), lambda found, many=at + 1: len(found) == many)
        found = list(running.service.answering.values())
        gate.open()
        for asking in every:
            assert asking.answer()["choices"]
        # the one that ran, then one of each client, then what is left of the first's
        assert sorted(range(5), key=lambda at: found[at].admitted) == [0, 1, 4, 2, 3]


def test_deadline_ends_an_answer_as_far_as_it_is(running, client, engine):
    with Gate(engine) as gate:
        asking = Asking(running, endless())
        asking.start()
        gate.reached.acquire()
        (job,) = engine._scheduler._active
        assert job.patience._deadline is not None
        job.patience._deadline = 0.0  # long ago
        gate.let(1)
        (choice,) = asking.answer()["choices"]
        assert choice["finish_reason"] == "length" and choice["finish_details"] == {"type": "timeout"}
        assert 0 < len(choice["message"]["content"]) <= 4 and LONG.startswith(choice["message"]["content"])
        until(lambda: slots(client), lambda found: not found)


def test_deadline_of_one_that_waits(serving, engine):
    with serving(concurrent=1) as running, running.client() as client, Gate(engine) as gate:
        first = Asking(running, endless())
        first.start()
        gate.reached.acquire()
        running.service.settings = replace(running.service.settings, deadline_s=0.05)
        late = client.post(CHAT, json=text_chat("Two", max_tokens=2))
        assert late.status_code == 503 and late.json()["error"]["code"] == "deadline_exceeded"
        assert int(late.headers["retry-after"]) >= 1
        gate.open()
        assert first.answer()["choices"][0]["message"]["content"] == LONG


def test_streams_say_something_while_nothing_happens(serving, engine):
    with serving(keep_alive_s=0.05) as running, running.client() as client, Gate(engine) as gate:
        response = client.send(client.build_request("POST", CHAT, json=endless(stream=True)), stream=True)
        lines = response.iter_lines()
        before = []
        while (line := next(lines)) != ": keep-alive":
            before.append(line)
        gate.open()
        assert said(before) + said(lines) == LONG


def test_streams_say_something_while_a_request_waits(serving, engine):
    with serving(keep_alive_s=0.05, concurrent=1) as running, running.client() as client, Gate(engine) as gate:
        first = Asking(running, endless())
        first.start()
        gate.reached.acquire()
        with client.stream("POST", CHAT, json=about_demo(stream=True)) as response:
            lines = response.iter_lines()
            while next(lines) != ": keep-alive":
                pass
            gate.open()
            assert said(lines) == ANSWER
        first.join()


def test_an_error_after_the_stream_began_is_its_last_line(serving, engine):
    with serving(keep_alive_s=0.05, concurrent=1) as running, running.client() as client, Gate(engine) as gate:
        first = Asking(running, endless())
        first.start()
        gate.reached.acquire()
        body = about_demo(url="data:image/png;base64,AAAA", stream=True)
        with client.stream("POST", CHAT, json=body) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            while next(lines) != ": keep-alive":
                pass
            gate.open()
            last = [line for line in lines if line.startswith("data: ")]
        assert json.loads(last[-2][6:])["error"]["code"] == "invalid_image" and last[-1] == "data: [DONE]"
        first.join()


def test_answers_beside_others_are_those_of_one_by_one(running, engine):
    questions = ["What does the text say?", "Describe the picture.", "Which colour is the text?", "What shape is it?"] * 4
    alone = [engine.ask(DEMO, question).text for question in questions]
    asking = [Asking(running, about_demo(question)) for question in questions]
    for one in asking:
        one.start()
    assert [one.answer()["choices"][0]["message"]["content"] for one in asking] == alone


def test_what_waits_is_bounded_in_memory_too(serving, engine):
    with serving(queue_mb=0.001) as running, running.client() as client, Gate(engine) as gate:
        first = Asking(running, about_demo())  # one alone is always taken
        first.start()
        gate.reached.acquire()
        refused = client.post(CHAT, json=about_demo("Describe the picture."))
        assert refused.status_code == 429 and refused.headers["retry-after"]
        gate.open()
        assert first.answer()["choices"][0]["message"]["content"] == ANSWER
        until(lambda: slots(client), lambda found: not found)
        assert client.post(CHAT, json=about_demo()).status_code == 200


def test_a_computation_that_never_began_leaves_nothing(engine):
    async def leave_at_once():
        service = Service(engine, Settings())
        answering = service.listen(Asked(turns=(Turn("user", ("Hello",)),), options={}, kind="chat"), "me", "key")
        service.leave(answering)
        with pytest.raises(ApiError):
            await answering.finished()
        while service.answering:
            await asyncio.sleep(0)
        assert (service._held, service._same, service.admission.running) == (0, {}, 0)
        service._pool.shutdown()
        service.stepping.shutdown()

    asyncio.run(leave_at_once())
