"""What a model writes, told apart as it comes: its thoughts, its answer, and calls of functions."""

from __future__ import annotations

from typing import Literal, NamedTuple

Channel = Literal["reasoning", "content", "call"]
THOUGHT, THOUGHT_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"


class Part(NamedTuple):
    """Text of one channel; of `call`, the whole inside of one call."""

    channel: Channel
    text: str


class Channels:
    """Told pieces of text, gives them out by channel; marks are left out, wherever pieces begin and end.

    `thinking`: the text begins inside a thought, as the prompt has opened one. `calls`: what stands between the marks of a
    call is one. White space around thoughts and before calls belongs to neither.
    """

    def __init__(self, *, thinking: bool = False, calls: bool = False) -> None:
        self._channel: Channel = "reasoning" if thinking else "content"
        self._may_think, self._calls = thinking, calls
        self._held = ""
        self._begun = False
        """Whether the present channel has given out anything."""

    def push(self, piece: str) -> list[Part]:
        """What may be given out now."""
        self._held += piece
        parts: list[Part] = []
        while (mark := self._next_mark()) is not None:
            before, _, self._held = self._held.partition(mark)
            if mark == CALL_END:
                parts.append(Part("call", before.strip()))
            else:
                self._give(before.rstrip(), parts)
            if mark != THOUGHT:
                self._channel = "call" if mark == CALL else "content"
            else:
                self._channel = "reasoning"
            self._begun = False
        if self._channel != "call":
            kept = self._open()
            ready = self._held[: len(self._held) - kept]
            self._held = self._held[len(ready) :]
            self._give(ready, parts)
        return parts

    def finish(self) -> list[Part]:
        """The rest; a call that was not ended counts as one."""
        parts: list[Part] = []
        if self._channel == "call":
            if self._held.strip():
                parts.append(Part("call", self._held.strip()))
        else:
            self._give(self._held.rstrip() if self._channel == "reasoning" else self._held, parts)
        self._held = ""
        return parts

    def _marks(self) -> tuple[str, ...]:
        if self._channel == "call":
            return (CALL_END,)
        marks = [THOUGHT_END] if self._channel == "reasoning" else []
        if self._channel == "reasoning" and not self._begun:
            marks.append(THOUGHT)
        if self._channel == "content" and self._calls:
            marks.append(CALL)
        return tuple(marks)

    def _next_mark(self) -> str | None:
        found = [(place, mark) for mark in self._marks() if (place := self._held.find(mark)) >= 0]
        return min(found)[1] if found else None

    def _open(self) -> int:
        """How much of the end may still become a mark, or be white space before one."""
        marks = self._marks()
        longest = 0
        for mark in marks:
            for size in range(min(len(mark) - 1, len(self._held)), 0, -1):
                if self._held.endswith(mark[:size]):
                    longest = max(longest, size)
                    break
        rest = self._held[: len(self._held) - longest]
        return longest + (len(rest) - len(rest.rstrip()) if marks else 0)

    def _give(self, text: str, parts: list[Part]) -> None:
        if not self._begun and self._channel != "call":
            text = text.lstrip()
        if text:
            self._begun = True
            parts.append(Part(self._channel, text))
