"""Text to token ids and back, exactly as the checkpoint's own tokenizer does it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

from mcv_runtime.errors import BundleCorruptError, PromptError, printable, shown
from mcv_runtime.panics import no_panics

_MOST_ID = 1 << 24
_MOST_PARTS, _MOST_GROWTH = 64, 64.0
"""Steps in which a tokenizer changes a text, and how many times as long they may make it; published ones: 8, and 1."""


class TextTokenizer:
    """A Hugging Face tokenizer that can tell control tokens from text that merely looks like them.

    Control tokens are the added tokens that are marked special, and those written `<...>`. A `guard` is a character that occurs
    nowhere else; `guard_text` puts it inside every look-alike in foreign text, and `encode` takes it out again.
    """

    def __init__(self, tokenizer_json: str) -> None:
        try:
            with no_panics("it", ValueError):
                settings = json.loads(tokenizer_json)
                _check_parts(settings)
                self._tokenizer = Tokenizer.from_str(tokenizer_json)
                added = settings.get("added_tokens") or []
                self._control = {token["content"]: token for token in added if is_control(token)}
                # the same tokenizer, blind to control tokens: encodes look-alikes as the text they are
                settings["added_tokens"] = [token for token in added if token["content"] not in self._control]
                self._blind = Tokenizer.from_str(json.dumps(settings))
                self._before, self._after = self._frame()
        except Exception as error:  # tokenizers raises bare Exception; a malformed file may raise anything
            reason = printable(" ".join(str(error).split())[:200]) or type(error).__name__
            raise BundleCorruptError(f"the bundle's tokenizer cannot be used: {reason}") from error
        longest_first = sorted(self._control, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) or r"(?!)"
        self._split = re.compile(f"({pattern})")
        self._look_alike = re.compile(f"(?=(?:{pattern}))(.)", re.DOTALL)

    def id_of(self, token: str) -> int:
        """Id of a control token; raises `BundleCorruptError` if the tokenizer has none of that name."""
        number = self._tokenizer.token_to_id(token)
        if number is None:
            raise BundleCorruptError(f"the manifest names the token {shown(token)}, which the tokenizer does not have")
        return int(number)

    @property
    def control(self) -> frozenset[str]:
        """The names of all control tokens."""
        return frozenset(self._control)

    def is_control(self, token: str) -> bool:
        """Whether there is a control token of that name."""
        return token in self._control

    def guard_text(self, text: str, guard: str, kept: Collection[str] = ()) -> str:
        """`text` with `guard` inside every look-alike of a control token, overlapping ones included; `kept` ones count.

        A guard stands on both sides of those, so that no other token can reach into them.
        """
        if kept:
            pieces = re.split(f"({'|'.join(map(re.escape, kept))})", text)
            return guard.join(piece if i % 2 else self.guard_text(piece, guard) for i, piece in enumerate(pieces))
        return self._look_alike.sub(lambda match: match[1] + guard, text)

    def encode(self, text: str, guard: str | None = None) -> list[int]:
        """Ids of `text`; where it holds `guard`, control tokens only where they stand unbroken, and the guards left out."""
        if guard is None or guard not in text:
            return self._ids(self._tokenizer, text, add_special_tokens=True)
        ids = list(self._before)
        pieces = self._split.split(text)  # text, token, text, token, ..., text
        for i, piece in enumerate(pieces):
            if i % 2:
                ids.append(self._control[piece]["id"])
                continue
            piece = piece.replace(guard, "")
            if i and self._control[pieces[i - 1]]["rstrip"]:
                piece = piece.lstrip()
            if i + 1 < len(pieces) and self._control[pieces[i + 1]]["lstrip"]:
                piece = piece.rstrip()
            ids += self._ids(self._blind, piece, add_special_tokens=False)
        return ids + self._after

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, control tokens included."""
        with no_panics("the bundle's tokenizer", BundleCorruptError):
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def is_byte(self, token: int) -> bool:
        """Whether a token is one raw byte (`<0xE4>`), whose meaning depends on the bytes after it."""
        return bool(re.fullmatch(r"<0x[0-9A-F]{2}>", self._tokenizer.id_to_token(token) or ""))

    def _ids(self, tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
        try:
            with no_panics("it", ValueError):
                return list(tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except Exception as error:  # a regular expression that gives up, a token that the vocabulary lacks
            reason = printable(" ".join(str(error).split())[:200])
            raise PromptError(f"the model's tokenizer cannot read the prompt: {reason}") from error

    def _frame(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer itself puts before and after any text (BOS, EOS)."""
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        framed = self._tokenizer.encode("a").ids
        start = next((i for i in range(len(framed)) if framed[i : i + len(bare)] == bare), None)
        if start is None:
            raise ValueError("it does not keep a text together")
        return framed[:start], framed[start + len(bare) :]


def _check_parts(settings: dict[str, Any]) -> None:
    """Raise `ValueError` for a tokenizer that would blow a text up, or tables with a place for every id."""
    vocab = settings["model"].get("vocab")
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    ids += [token["id"] for token in settings.get("added_tokens") or ()]
    if max(ids, default=0) > _MOST_ID:
        raise ValueError(f"it has the id {max(ids)}, and not at most {_MOST_ID:,}")
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        parts = list(_parts(settings.get(name)))
        growth = 1.0
        for part in parts:
            growth *= _growth(part)
        if len(parts) > _MOST_PARTS or growth > _MOST_GROWTH:
            raise ValueError(f"its {name} would make a text many times as long")


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(part, dict):
        return
    yield part
    for name in ("normalizers", "pretokenizers", "processors", "decoders"):
        for inner in part.get(name) or ():
            yield from _parts(inner)


def _growth(part: dict[str, Any]) -> float:
    """How many times as long a step makes a text at most."""
    kind = part.get("type")
    if kind == "Replace":
        pattern = part.get("pattern")
        known = pattern.get("String") if isinstance(pattern, dict) else None
        found = len(known) if isinstance(known, str) else 1  # a regular expression may find single characters
        content = len(str(part.get("content", "")))
        return max(1.0, content / found) if found else 1.0 + content
    if kind == "Prepend":
        return 1.0 + len(str(part.get("prepend", ""))) / 64
    if kind == "TemplateProcessing":
        return max(1.0, sum(isinstance(one, dict) and "Sequence" in one for one in part.get("single") or ()))
    return 1.0


def is_control(token: dict[str, object]) -> bool:
    """Whether one of a tokenizer's added tokens is a control token."""
    content = str(token["content"])
    # a guard must fit inside; one-character added tokens are ordinary text
    return len(content) > 1 and (bool(token["special"]) or bool(re.fullmatch(r"<[^\s<>]+>", content)))


class Detokenizer:
    """Streams text: give it ids one by one, get text that never ends inside a character."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._given = 0
        """Characters of the window's text that were given out."""

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is still open."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        if text.endswith("\N{REPLACEMENT CHARACTER}") or self._tokenizer.is_byte(token):  # a character may still be open
            return ""
        piece = text[self._given :]
        # one token stays as context: some decoders treat the first token of a text differently (leading space)
        self._window = self._window[-1:]
        self._given = len(self._tokenizer.decode(self._window))
        return piece

    def finish(self) -> str:
        """The rest, with replacement characters for what stayed incomplete."""
        piece = self._tokenizer.decode(self._window)[self._given :]
        self._window, self._given = [], 0
        return piece


class AnswerText:
    """The text of an answer while it is made: `hidden` ids left out, surrounding whitespace stripped."""

    def __init__(self, tokenizer: TextTokenizer, hidden: frozenset[int] = frozenset()) -> None:
        self.text = ""
        """All that was given out."""
        self._detokenizer = Detokenizer(tokenizer)
        self._hidden = hidden
        self._space = ""
        """Whitespace that waits for more text behind it."""

    def push(self, token: int) -> str:
        """The text that may be given out now."""
        return "" if token in self._hidden else self._trim(self._detokenizer.push(token))

    def finish(self) -> str:
        """The rest; then `text` is the whole answer."""
        return self._trim(self._detokenizer.finish())

    def _trim(self, piece: str) -> str:
        waiting = self._space + piece
        piece = waiting.rstrip()
        self._space = waiting[len(piece) :]
        piece = piece if self.text else piece.lstrip()
        self.text += piece
        return piece
