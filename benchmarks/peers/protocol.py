"""What a peer's process is asked, and how it is timed: the same for all, by the standard library alone.

    python WORKER prepare SETTINGS     make the peer's files in `folder`, then end
    python WORKER serve SETTINGS       load, then answer lines of JSON: {"measure": "text"} -> {"prefill": seconds, ...}
    python WORKER cold SETTINGS        load, answer one question, and say so when the first token is there

`SETTINGS` is a JSON object: `checkpoint`, `folder`, `variant`, `provider`, `threads`, `picture` (or null).
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

PROMPT, CONTEXT, STEPS = 512, 1024, 16
"""Tokens: of the prompt that is timed, before the later steps, and of each sample of decoding."""
ROOM = CONTEXT + 64
"""Tokens that a peer's context has to hold."""
COLD_PROMPT = 32


class Peer(Protocol):
    """What a worker makes of `SETTINGS`; a measure that it cannot do is a method that it lacks."""

    vocabulary: int

    def restart(self) -> None:
        """Forget all tokens."""

    def read(self, ids: list[int]) -> None:
        """Read more tokens at once, up to the logits of what follows."""

    def step(self, token: int) -> None:
        """Read one more token, up to the logits of what follows."""

    def look(self) -> None:
        """Encode one slice of 448 x 448 pixels, up to its visual tokens."""


Step = Callable[[dict[str, Any]], object]


def main(make: Callable[[dict[str, Any]], Any], prepare: Step, cold: Step) -> None:
    """A worker: `make` loads a `Peer`, `prepare` writes its files, `cold` answers about `picture` up to the first token."""
    verb, settings = sys.argv[1], json.loads(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes to stderr
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    if verb == "prepare":
        prepare(settings)
        say({"prepared": True})
        return
    if verb == "cold":
        cold(settings)
        say({"first_token": True})
        return
    start = time.perf_counter()
    peer = make(settings)
    say({"load": time.perf_counter() - start})
    warm_up(peer)
    say({"warm": True})
    measures = {"text": text, "vision": vision}
    for line in sys.stdin:
        asked = json.loads(line)["measure"]
        say(peer.text() if asked == "text" and hasattr(peer, "text") else measures[asked](peer))


def tokens(count: int, vocabulary: int) -> list[int]:
    """The same drawn tokens for every peer of a vocabulary."""
    return random.Random(count).choices(range(300, vocabulary), k=count)  # behind what control tokens there may be


def warm_up(peer: Peer) -> None:
    """Run everything once, uncounted."""
    if hasattr(peer, "restart"):
        peer.restart()
        peer.read(tokens(COLD_PROMPT, peer.vocabulary))
        peer.step(tokens(1, peer.vocabulary)[0])
    if hasattr(peer, "look"):
        peer.look()


def text(peer: Peer) -> dict[str, float]:
    """Seconds: of a prompt of `PROMPT` tokens, and of a token behind none and behind `CONTEXT`."""
    ids = tokens(CONTEXT + STEPS + 1, peer.vocabulary)

    def step_s() -> float:
        peer.step(ids[-1])  # the first after a prompt may set up what the others use
        return _seconds(lambda: [peer.step(token) for token in ids[-STEPS:]]) / STEPS

    peer.restart()
    peer.read(ids[:1])
    decode_0 = step_s()
    peer.restart()
    prefill = _seconds(lambda: peer.read(ids[:PROMPT]))
    peer.read(ids[PROMPT:CONTEXT])
    return {"decode_0": decode_0, "prefill_512": prefill, "decode_1024": step_s()}


def vision(peer: Peer) -> dict[str, float]:
    """Seconds of one slice."""
    return {"slice": _seconds(peer.look)}


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
