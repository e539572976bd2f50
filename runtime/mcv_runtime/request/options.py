"""Options of a request: every one once, with its type, its meaning and its flag of `mcv-run`."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypedDict, TypeVar

from mcv_runtime.bundle.manifest import GenerationSpec, SmallImageUpsize
from mcv_runtime.choosing.constraints import GrammarKind
from mcv_runtime.choosing.repetition import LEAST_REPEAT_GUARD
from mcv_runtime.choosing.sampling import Sampling
from mcv_runtime.errors import OptionError
from mcv_runtime.progress import Progress
from mcv_runtime.request.option_types import check_names, check_types

MOST_ROWS = 256
"""Answers, or beams, that are decoded side by side: each has a row of its own."""
MOST_TOP_LOGPROBS = 256
"""Likeliest tokens of a place that are told."""
PICTURES, TOKENS, END, ASKING, MACHINE = "pictures", "tokens", "end", "asking", "machine"
"""Groups of options."""
PREFILL_CHUNK = 512
_SAMPLING = ("top_k", "top_p", "min_p", "seed")
_GUIDES: tuple[GrammarKind, ...] = ("json_schema", "regex", "choices")
Kind = TypeVar("Kind", bound="PictureOptions")


def _option(help: str, group: str, *flags: str, flag: bool = True) -> Any:  # noqa: A002 - the field's word
    """A field that is left out by default; `flags`: how `mcv-run` spells it besides its name; `flag`: whether it has one."""
    return dataclasses.field(default=None, metadata={"help": help, "group": group, "flags": flags, "flag": flag})


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureOptions:
    """How pictures and videos are looked at; what is left out (None) is as the bundle says."""

    max_slice_nums: int | None = _option("Most slices that a picture is cut into.", PICTURES)
    downsample_mode: str | None = _option(
        "Pixels behind a visual token: 16x is faster, 4x sees more, if the model has them.", PICTURES
    )
    small_image_upsize: SmallImageUpsize | None = _option("Whether small pictures are enlarged.", PICTURES)
    max_num_frames: int | None = _option("Most frames that are taken of a video.", PICTURES)
    stack_frames: int | None = _option("Frames of each second that are looked at.", PICTURES)

    def __post_init__(self) -> None:
        check_types(self)

    @classmethod
    def of(cls, options: PictureOptions | None, changes: Mapping[str, Any]) -> Self:
        """`options`, or the defaults, with `changes`; raises `OptionError` for names and values that make no sense."""
        if type(options) is cls and not changes:
            return options
        check_names(changes, cls)
        given = {} if options is None else options.given()
        check_names(given, cls)
        return cls(**{**given, **changes})

    def given(self) -> dict[str, Any]:
        """The options that were not left out, by name."""
        names = (field.name for field in dataclasses.fields(self))
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(PictureOptions):
    """All options of a request; what is left out (None) is as the bundle says. Without `temperature`, answers are greedy."""

    use_image_id: bool | None = _option("Number the pictures in the prompt.", PICTURES)
    thinking: bool | None = _option("Let the model think first, if it knows how.", ASKING)
    tools: Sequence[Mapping[str, Any]] | None = _option(
        "Functions that the model may call, for chat templates that know such.", ASKING, flag=False
    )
    raw: bool | None = _option("Take the prompt as it is, without the chat template.", ASKING, flag=False)
    grounding: bool | None = _option("Take <ref>, <box>, <quad> and <point> in a prompt for the model's own marks.", ASKING)
    temperature: float | None = _option("Draw tokens, the more freely the higher; else the likeliest.", TOKENS, "--temp")
    top_k: int | None = _option("Draw from so many likeliest tokens.", TOKENS)
    top_p: float | None = _option("Draw from the likeliest tokens that make up this probability.", TOKENS)
    min_p: float | None = _option("Draw from tokens this fraction as likely as the likeliest.", TOKENS)
    seed: int | None = _option("The same seed, the same answer.", TOKENS)
    repetition_penalty: float | None = _option("Above 1: repeat less.", TOKENS)
    presence_penalty: float | None = _option("Above 0: repeat less.", TOKENS)
    frequency_penalty: float | None = _option("Above 0: repeat less, the less the more often something was said.", TOKENS)
    logit_bias: Mapping[int, float] | None = _option("What is added to the logits of token ids.", TOKENS, flag=False)
    num_beams: int | None = _option("Beam search with so many beams.", TOKENS)
    length_penalty: float | None = _option("Of beam search; above 0: prefer longer answers.", TOKENS)
    early_stopping: bool | Literal["never"] | None = _option(
        "Of beam search: end with the first num_beams answers (True), or when no better is likely (False), possible ('never').",
        TOKENS,
        flag=False,
    )
    num_return_sequences: int | None = _option("So many answers, the best first.", TOKENS)
    prompt_lookup: bool | None = _option("Guess tokens from the prompt: the same answer, often sooner.", TOKENS)
    logprobs: bool | None = _option("With --json or --batch: the log-probability of every token.", TOKENS)
    top_logprobs: int | None = _option("With the log-probabilities: the likeliest tokens of each place.", TOKENS, flag=False)
    max_new_tokens: int | None = _option("Longest answer, in tokens; the memory for it is set aside.", END, "-n")
    stop: str | Sequence[str] | None = _option("End the answer before this text; may be repeated.", END)
    repeat_guard: int | None = _option("End an answer whose last so many tokens say one thing over and over.", END)
    stop_token_ids: Sequence[int] | None = _option("Ids that end an answer, besides the model's own.", END, flag=False)
    timeout: float | None = _option("Seconds after which an answer ends as far as it is.", END)
    cancel: threading.Event | None = _option("Ends the answer as far as it is, once set by any thread.", END, flag=False)
    json_schema: str | Mapping[str, Any] | None = _option(
        "Answer with JSON of this schema: a file, or the schema itself (needs llguidance).", END
    )
    regex: str | None = _option("Answer with text that matches (needs llguidance).", END)
    choices: Sequence[str] | None = _option("Answer with one of these; may be repeated (needs llguidance).", END, "--choice")
    prefill_chunk: int | None = _option("Most tokens of a prompt that are read at once.", MACHINE)
    progress: Progress | None = _option("Called with an `Event` in the thread that waits for the answer.", END, flag=False)


class PictureKeywords(TypedDict, total=False):
    """The fields of `PictureOptions` as keywords."""

    max_slice_nums: int | None
    downsample_mode: str | None
    small_image_upsize: SmallImageUpsize | None
    max_num_frames: int | None
    stack_frames: int | None


class Keywords(PictureKeywords, total=False):
    """The fields of `Options` as keywords: for type checkers and editors, which cannot take them from there."""

    use_image_id: bool | None
    thinking: bool | None
    tools: Sequence[Mapping[str, Any]] | None
    raw: bool | None
    grounding: bool | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None
    num_beams: int | None
    length_penalty: float | None
    early_stopping: bool | Literal["never"] | None
    num_return_sequences: int | None
    prompt_lookup: bool | None
    logprobs: bool | None
    top_logprobs: int | None
    max_new_tokens: int | None
    stop: str | Sequence[str] | None
    repeat_guard: int | None
    stop_token_ids: Sequence[int] | None
    timeout: float | None
    cancel: threading.Event | None
    json_schema: str | Mapping[str, Any] | None
    regex: str | None
    choices: Sequence[str] | None
    prefill_chunk: int | None
    progress: Progress | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How an answer is generated: a request's options over the bundle's defaults."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    stop: tuple[str, ...]
    sampling: Sampling
    """With a temperature of 0 the likeliest token is taken; its penalties hold in any case."""
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    num_return_sequences: int
    prompt_lookup: bool
    logprobs: bool
    top_logprobs: int
    grounding: bool
    guide: tuple[GrammarKind, Any] | None
    """The kind of constraint and what it is."""
    repeat_guard: int
    """0: none."""
    timeout: float | None
    prefill_chunk: int | None
    """None: as suits the machine."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "num_return_sequences", "prefill_chunk"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise OptionError(f"{name} must be at least 1, not {value}")
        for name in ("num_beams", "num_return_sequences"):
            if getattr(self, name) > MOST_ROWS:
                raise OptionError(f"{name} must be at most {MOST_ROWS}, not {getattr(self, name)}")
        if not all(self.stop):
            raise OptionError("a stop string is empty; leave it out")
        if self.timeout is not None and not self.timeout > 0:
            raise OptionError(f"timeout must be above 0 seconds, not {self.timeout}")
        if not -30 <= self.length_penalty <= 30:  # beyond, its power of a length is no float
            raise OptionError(f"length_penalty must be from -30 to 30, not {self.length_penalty}")
        if self.num_beams > 1 and self.sampled:
            raise OptionError("num_beams and temperature exclude each other; leave one out")
        for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
            if self.num_beams > 1 and getattr(self.sampling, name):
                raise OptionError(f"num_beams knows no {name}; use repetition_penalty")
        if not 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS:
            raise OptionError(f"top_logprobs must be from 0 to {MOST_TOP_LOGPROBS}, not {self.top_logprobs}")
        if self.top_logprobs and not self.logprobs:
            raise OptionError("top_logprobs needs logprobs")
        if self.repeat_guard and self.repeat_guard < LEAST_REPEAT_GUARD:
            raise OptionError(f"repeat_guard must be at least {LEAST_REPEAT_GUARD} tokens, or 0, not {self.repeat_guard}")
        if self.num_return_sequences > (math.inf if self.sampled else self.num_beams):
            raise OptionError("num_return_sequences needs a temperature, or at least as many num_beams")
        penalties = self.sampling.presence_penalty or self.sampling.frequency_penalty
        if self.prompt_lookup and (self.sampled or self.num_beams > 1 or self.guide or penalties):
            raise OptionError(
                "prompt_lookup gives the greedy answer; leave out temperature, num_beams, constraints and penalties"
            )

    @property
    def sampled(self) -> bool:
        return self.sampling.temperature > 0

    @classmethod
    def of(cls, options: Options, defaults: GenerationSpec) -> Settings:
        """Raises `OptionError` for values that make no sense."""
        given = options.given()
        temperature = given.get("temperature", 0.0)
        if not temperature > 0:
            for name in _SAMPLING:
                if name in given:
                    raise OptionError(f"{name} has no meaning without a temperature; give one, for example temperature=0.7")
        guides = [(name, given[name]) for name in _GUIDES if name in given]
        if len(guides) > 1:
            raise OptionError(f"{guides[0][0]} and {guides[1][0]} exclude each other; leave one out")
        stop = given.get("stop", ())
        return cls(
            max_new_tokens=given.get("max_new_tokens", defaults.max_new_tokens),
            stop_ids=frozenset(defaults.stop_token_ids).union(given.get("stop_token_ids", ())),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            sampling=Sampling(
                temperature=temperature,
                top_k=given.get("top_k", 0),
                top_p=given.get("top_p", 1.0),
                min_p=given.get("min_p", 0.0),
                repetition_penalty=given.get("repetition_penalty", defaults.repetition_penalty),
                presence_penalty=given.get("presence_penalty", 0.0),
                frequency_penalty=given.get("frequency_penalty", 0.0),
                logit_bias=given.get("logit_bias", {}),
                seed=given.get("seed"),
            ),
            num_beams=given.get("num_beams", 1),
            length_penalty=given.get("length_penalty", 1.0),
            early_stopping=given.get("early_stopping", False),
            num_return_sequences=given.get("num_return_sequences", 1),
            prompt_lookup=given.get("prompt_lookup", False),
            logprobs=given.get("logprobs", False),
            top_logprobs=given.get("top_logprobs", 0),
            grounding=given.get("grounding", False),
            guide=guides[0] if guides else None,
            repeat_guard=given.get("repeat_guard", 0),
            timeout=given.get("timeout"),
            prefill_chunk=given.get("prefill_chunk"),
        )
