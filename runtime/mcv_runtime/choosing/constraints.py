"""Answers of a given form: what a JSON schema, a regular expression or a list of choices leaves of the vocabulary.

The grammars are llguidance's, an optional dependency. Text is followed byte by byte, so tokens may break it anywhere. Control
tokens are never a part of it: text that looks like one is spelled out.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np

from mcv_runtime.errors import BundleCorruptError, OptionError, printable, shown
from mcv_runtime.files import parse_json
from mcv_runtime.panics import no_panics
from mcv_runtime.text.tokens import is_control

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from numpy.typing import NDArray

GrammarKind = Literal["json_schema", "regex", "choices"]
_SPACE = " ?"
"""Between the parts of a JSON text. A model that may indent spends tokens on it, and a small one gives spaces forever."""
MAX_GRAMMAR = 1 << 17
"""Characters of the longest grammar: 8,000 choices take 0.2 seconds, 4,000 properties 2."""
_KEPT = 16
_SILENT = 0


class Constraint(Protocol):
    """What may come next in one answer."""

    @property
    def done(self) -> bool:
        """Whether the answer is complete and nothing but a stop token could follow."""
        ...

    def mask(self, logits_V: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        """A copy of the logits in which what may not come next is -inf; stop tokens may where the answer is complete."""
        ...

    def advance(self, token: int) -> None:
        """Go on from `token`, which the last mask allowed."""
        ...

    def fork(self) -> Self:
        """Another constraint in the same state, for an answer with the same beginning."""
        ...


class Grammars:
    """Makes constraints for a bundle's tokenizer; threads may share it.

    What takes long, indexing the vocabulary and compiling a grammar, is done when it is first needed, and kept.
    """

    def __init__(self, tokenizer_json: str, stop_token_ids: Sequence[int]) -> None:
        self._tokenizer_json = tokenizer_json
        self._stop = sorted(stop_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: dict[str, LLMatcher] = {}
        self._lock, self._indexing = threading.Lock(), threading.Lock()

    def constraint(self, kind: GrammarKind, value: Any) -> Constraint:
        """The constraint of the option `kind` with that value; raises `OptionError` for a value that makes no sense."""
        make = {"json_schema": self.json_schema, "regex": self.regex, "choices": self.choices}
        return make[kind](value)

    def json_schema(self, schema: Mapping[str, Any] | str) -> Constraint:
        """JSON text of a schema, given as a mapping or as text; properties come in the schema's order."""
        try:
            text = schema if isinstance(schema, str) else json.dumps(dict(schema))
        except (TypeError, ValueError, RecursionError) as error:
            raise OptionError(f"json_schema is not JSON ({error})") from error
        parsed = parse_json(text, "json_schema", error=OptionError, max_bytes=MAX_GRAMMAR)
        if not isinstance(parsed, dict):
            raise OptionError(f"json_schema must be an object, not {shown(parsed)}")
        return self._constraint(
            "json_schema", lambda: _matchers().grammar_from_json_schema(parsed, {"whitespace_pattern": _SPACE})
        )

    def regex(self, pattern: str) -> Constraint:
        """Text that matches a regular expression from its beginning to its end (Rust's syntax: no look-around)."""
        if not isinstance(pattern, str) or not pattern:
            raise OptionError("regex must be a pattern, for example r'[0-9]+'")
        return self._constraint("regex", lambda: _matchers().grammar_from_regex(pattern))

    def choices(self, choices: Sequence[str]) -> Constraint:
        """One of several texts."""
        if isinstance(choices, str) or not choices or not all(isinstance(choice, str) and choice for choice in choices):
            raise OptionError("choices must be a list of texts, none of them empty")
        alternatives = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
        return self._constraint("choices", lambda: _matchers().grammar_from_lark(f"start: {alternatives}"))

    def _constraint(self, kind: GrammarKind, write: Callable[[], str]) -> Constraint:
        with no_panics(f"the making of {kind}", OptionError):
            try:
                grammar = write()
            except ValueError as error:
                raise OptionError(f"{kind} cannot be used: {_reason(str(error))}") from error
            if len(grammar) > MAX_GRAMMAR:
                raise OptionError(
                    f"{kind} is too long: {len(grammar):,} characters of grammar; at most {MAX_GRAMMAR:,} are read"
                )
            with self._lock:
                matcher = self._compiled.get(grammar)
            if matcher is None:  # two who ask for the same may both compile it; nobody waits for another's
                matcher = self._compile(kind, grammar)
            with self._lock:
                if grammar not in self._compiled and len(self._compiled) >= _KEPT:
                    del self._compiled[next(iter(self._compiled))]
                return _MatcherConstraint(self._compiled.setdefault(grammar, matcher).deep_copy())

    def _compile(self, kind: GrammarKind, grammar: str) -> LLMatcher:
        matcher = _matchers()(self._index(), grammar, log_level=_SILENT)
        if matcher.is_error():
            raise OptionError(f"{kind} cannot be used: {_reason(matcher.get_error())}")
        probe = matcher.deep_copy()
        probe.compute_bitmask()  # only this finds out that nothing can follow
        if probe.is_error() and "NoExtension" not in probe.get_error():
            raise OptionError(f"{kind} cannot be used: {_reason(probe.get_error())}")
        if probe.is_stopped() and not probe.is_accepting():
            raise OptionError(f"{kind} cannot be used: nothing fits it")
        return matcher

    def _index(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        with self._indexing:  # of the bundle, not of a request: as long for everybody
            if self._tokenizer is None:
                try:
                    with no_panics("it", ValueError):
                        self._tokenizer = LLTokenizer(_without_names(self._tokenizer_json), eos_token=self._stop)
                except (LookupError, TypeError, ValueError) as error:
                    raise BundleCorruptError(f"the bundle's tokenizer cannot be constrained: {_reason(str(error))}") from error
            return self._tokenizer


class _MatcherConstraint:
    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def done(self) -> bool:
        return self._matcher.is_stopped()

    def mask(self, logits_V: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
        with no_panics("the constraint", OptionError):
            packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(packed, bitorder="little")[: len(logits_V)].view(np.bool_)
        self._check()
        result = np.full_like(logits_V, -np.inf)  # also where a model has more logits than its tokenizer has tokens
        np.copyto(result[: len(allowed)], logits_V[: len(allowed)], where=allowed)
        return result

    def advance(self, token: int) -> None:
        with no_panics("the constraint", OptionError):
            self._matcher.consume_token(token)
        self._check()

    def fork(self) -> _MatcherConstraint:
        return _MatcherConstraint(self._matcher.deep_copy())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise OptionError(f"the constraint cannot be followed further: {_reason(self._matcher.get_error())}")


def _matchers() -> type[LLMatcher]:
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise OptionError("constrained answers need llguidance: pip install 'minicpmv-onnx[guided]'") from error
    return LLMatcher


def _without_names(tokenizer_json: str) -> str:
    """The tokenizer with names of control tokens that no text contains.

    For text that has to follow, llguidance allows the tokens that the tokenizer makes of it, which for a look-alike would be
    the control token; and that does not match as text.
    """
    settings = json.loads(tokenizer_json)
    model = settings["model"]
    named = {token["content"]: f"\ufdd0{token['id']}\ufdd0" for token in settings["added_tokens"] if is_control(token)}
    for token in settings["added_tokens"]:
        if token["content"] in named:
            token.update(content=named[token["content"]], special=True)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {named.get(token, token): number for token, number in model["vocab"].items()}
    else:
        model["vocab"] = [[named.get(token, token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = named.get(model["unk_token"], model["unk_token"])
    return json.dumps(settings)


def _reason(message: str) -> str:
    """The line of a message that says what is wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return printable((errors or lines or ["no reason given"])[0][:300])
