"""Facts about an engine, for those who ask it: what it is and can do, and what it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Facts about an engine: its model, its limits, its abilities."""

    family: str
    model: str
    context_length: int
    """Tokens of prompt and answer together."""
    max_new_tokens: int
    """Tokens of an answer, unless a request says otherwise."""
    max_slice_nums: int
    downsample_modes: tuple[str, ...]
    video: bool
    thinking: bool
    tools: bool
    """Whether the chat template knows functions that may be called."""
    vocab_size: int
    """Token ids are below."""
    precisions: dict[str, str]
    """By graph."""
    provider: str
    threads: int
    """0: ONNX Runtime decides."""
    kv: Literal["float", "int8"]
    """What keys and values are kept in."""
    prefill_chunk: int
    """Most tokens of a prompt that are read at once, unless a request says otherwise."""
    tuned: bool
    """Whether `mcv-run tune` has measured this bundle on this machine, and what the caller left open is as it found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes that an engine holds besides the weights, or has set aside, by what they are for."""

    running: int
    """Keys, values and states of requests on their way, as long as they may get."""
    kept: int
    """Those of earlier requests and conversations, which may be forgotten."""
    pictures: int
    """Visual tokens of encoded pictures."""
    limit: int
    """Most bytes of all these and a batch of slices."""
