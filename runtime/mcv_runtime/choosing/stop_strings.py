"""End an answer at a string, wherever tokens and pieces of text begin and end."""

from __future__ import annotations

from collections.abc import Sequence

from mcv_runtime.errors import OptionError


class StopStrings:
    """Lets text through up to the first stop string, which is not given out, nor what follows it.

    The first is the one that is complete first, and of several that end together the longest: what it is does not depend on
    how the text is cut into pieces. Only what may still become a stop string waits.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = (strings,) if isinstance(strings, str) else tuple(strings)
        if not all(isinstance(string, str) for string in self._strings):
            raise OptionError("a stop string is not a string")
        if not all(self._strings):
            raise OptionError("a stop string is empty; leave it out")
        self.reached = False
        """Whether there was a stop string; then nothing more is given out."""
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that may be given out now that `piece` was added."""
        if self.reached:
            return ""
        text = self._held + piece
        found = [(start + len(string), start) for string in self._strings if (start := text.find(string)) >= 0]
        if found:
            self.reached, self._held = True, ""
            return text[: min(found)[1]]
        given = len(text) - max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[given:]
        return text[:given]

    def finish(self) -> str:
        """What still waited, now that no more text comes."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, string: str) -> int:
    """How much of the end of `text` is the beginning of `string`, short of all of it."""
    longest = min(len(string) - 1, len(text))
    return next(size for size in range(longest, -1, -1) if text.endswith(string[:size]))
