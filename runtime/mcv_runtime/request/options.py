"""What a request may change, checked before anything is computed."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

from mcv_runtime.bundle.manifest import GenerationSpec, SmallImageUpsize
from mcv_runtime.choosing.constraints import GrammarKind
from mcv_runtime.choosing.sampling import Sampling
from mcv_runtime.errors import OptionError
from mcv_runtime.progress import Progress
from mcv_runtime.request.option_types import check_types

PREFILL_CHUNK = 512
"""Tokens of a prompt that are read at once: bounds the memory of the activations, not what is computed."""
MOST_ROWS = 256
"""Answers, or beams, that are decoded side by side: each has a cache of its own."""
_SAMPLING = ("top_k", "top_p", "min_p", "seed")
_GUIDES: tuple[GrammarKind, ...] = ("json_schema", "regex", "choices")


class Options(TypedDict, total=False):
    """What one request may change; what is left out is as the bundle says.

    Without `temperature` an answer is greedy. `num_beams` above 1 searches; `num_return_sequences` asks for several answers.
    `stop` and `stop_token_ids` end an answer besides the model's own stop tokens. After `timeout` seconds, or when `cancel` is
    set from another thread, the answer ends as far as it is. `prompt_lookup` guesses tokens from the prompt, the result is the
    greedy one. One of `json_schema`, `regex` and `choices` constrains the answer (needs the extra `guided`).
    """

    max_new_tokens: int
    repetition_penalty: float
    presence_penalty: float
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    num_return_sequences: int
    prompt_lookup: bool
    logprobs: bool
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    timeout: float | None
    cancel: threading.Event | None
    progress: Progress | None
    json_schema: str | Mapping[str, Any] | None
    regex: str | None
    choices: Sequence[str] | None
    prefill_chunk: int
    max_slice_nums: int | None
    use_image_id: bool | None
    thinking: bool
    downsample_mode: str | None
    small_image_upsize: SmallImageUpsize | None
    max_num_frames: int | None
    stack_frames: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How an answer is generated: the request's options over the bundle's defaults."""

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
    guide: tuple[GrammarKind, Any] | None
    """The kind of constraint and what it is."""
    timeout: float | None
    cancel: threading.Event | None
    progress: Progress | None
    prefill_chunk: int

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "num_return_sequences", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("num_beams", "num_return_sequences"):
            if getattr(self, name) > MOST_ROWS:
                raise OptionError(f"{name} must be at most {MOST_ROWS}, not {getattr(self, name)}")
        if not all(self.stop):
            raise OptionError("a stop string is empty; leave it out")
        if self.timeout is not None and not self.timeout > 0:
            raise OptionError(f"timeout must be above 0 seconds, not {self.timeout}")
        if not math.isfinite(self.length_penalty):
            raise OptionError(f"length_penalty must be a number, not {self.length_penalty}")
        if self.num_beams > 1 and self.sampled:
            raise OptionError("num_beams and temperature exclude each other; leave one out")
        if self.num_beams > 1 and self.sampling.presence_penalty:
            raise OptionError("num_beams knows no presence_penalty; use repetition_penalty")
        if self.num_return_sequences > (math.inf if self.sampled else self.num_beams):
            raise OptionError("num_return_sequences needs a temperature, or at least as many num_beams")
        if self.prompt_lookup and (self.sampled or self.num_beams > 1 or self.guide or self.sampling.presence_penalty):
            raise OptionError(
                "prompt_lookup gives the greedy answer; leave out temperature, num_beams, constraints and penalties"
            )

    @property
    def sampled(self) -> bool:
        return self.sampling.temperature > 0

    @classmethod
    def of(cls, options: Options, defaults: GenerationSpec) -> Settings:
        """Raises `OptionError` for names and values that make no sense."""
        check_types(options, Options)
        temperature = options.get("temperature", 0.0)
        if not temperature > 0:
            for name in _SAMPLING:
                if options.get(name) is not None:
                    raise OptionError(f"{name} has no meaning without a temperature; give one, for example temperature=0.7")
        guides = [(name, options[name]) for name in _GUIDES if options.get(name) is not None]
        if len(guides) > 1:
            raise OptionError(f"{guides[0][0]} and {guides[1][0]} exclude each other; leave one out")
        stop = options.get("stop", ())
        return cls(
            max_new_tokens=options.get("max_new_tokens", defaults.max_new_tokens),
            stop_ids=frozenset(defaults.stop_token_ids).union(options.get("stop_token_ids", ())),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            sampling=Sampling(
                temperature=temperature,
                top_k=options.get("top_k", 0),
                top_p=options.get("top_p", 1.0),
                min_p=options.get("min_p", 0.0),
                repetition_penalty=options.get("repetition_penalty", defaults.repetition_penalty),
                presence_penalty=options.get("presence_penalty", 0.0),
                seed=options.get("seed"),
            ),
            num_beams=options.get("num_beams", 1),
            length_penalty=options.get("length_penalty", 1.0),
            early_stopping=options.get("early_stopping", False),
            num_return_sequences=options.get("num_return_sequences", 1),
            prompt_lookup=options.get("prompt_lookup", False),
            logprobs=options.get("logprobs", False),
            guide=guides[0] if guides else None,
            timeout=options.get("timeout"),
            cancel=options.get("cancel"),
            progress=options.get("progress"),
            prefill_chunk=options.get("prefill_chunk", PREFILL_CHUNK),
        )
