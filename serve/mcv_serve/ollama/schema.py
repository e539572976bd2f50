"""Bodies of Ollama's routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mcv_serve.body import Body
from mcv_serve.openai.schema import Json, Text, Tool

Think = bool | Literal["low", "medium", "high"]
Format = Literal["", "json"] | Json
Keep = str | int | float


class OllamaCalled(Body):
    name: str
    arguments: Json = Field(default_factory=dict)
    index: int | None = None


class OllamaCall(Body):
    function: OllamaCalled
    id: str | None = None
    type: Literal["function"] | None = None


class OllamaMessage(Body):
    role: Literal["system", "user", "assistant", "tool"]
    content: Text | None = None
    images: list[str] | None = None
    thinking: str | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    name: str | None = None


class OllamaOptions(Body):
    """What changes an answer, and below it what sets a machine up, which is the server's own affair."""

    num_predict: Annotated[int, Field(ge=-2, le=1 << 20)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | list[str] | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    max_slice_nums: Annotated[int, Field(ge=1, le=1024)] | None = None
    downsample_mode: str | None = None
    use_image_id: bool | None = None
    repeat_guard: Annotated[int, Field(ge=0, le=1 << 16)] | None = None

    num_ctx: int | None = None
    num_keep: int | None = None
    num_gqa: int | None = None
    rope_frequency_base: float | None = None
    rope_frequency_scale: float | None = None
    logits_all: bool | None = None
    embedding_only: bool | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    num_thread: int | None = None
    numa: bool | None = None
    low_vram: bool | None = None
    use_mmap: bool | None = None
    use_mlock: bool | None = None
    vocab_only: bool | None = None
    f16_kv: bool | None = None
    penalize_newline: bool | None = None
    repeat_last_n: int | None = None
    typical_p: float | None = None
    tfs_z: float | None = None
    mirostat: Literal[0] | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None


class _Shared(Body):
    model: str | None = None
    stream: bool | None = None
    format: Format | None = None
    options: OllamaOptions | None = None
    keep_alive: Keep | None = None
    think: Think | None = None
    truncate: bool | None = None
    shift: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 20)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None


class OllamaChatBody(_Shared):
    """POST /api/chat"""

    messages: Annotated[list[OllamaMessage], Field(max_length=4096)] = Field(default_factory=list)
    tools: list[Tool] | None = None
    images: list[str] | None = None
    prompt: Annotated[list[Any], Field(max_length=0)] | Literal[""] | None = None


class OllamaGenerateBody(_Shared):
    """POST /api/generate"""

    prompt: Text | None = None
    system: Text | None = None
    images: list[str] | None = None
    raw: bool | None = None
    suffix: Literal[""] | None = None
    template: Literal[""] | None = None
    context: list[int] | None = None


class OllamaShowBody(Body):
    """POST /api/show"""

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None
    system: str | None = None
    template: str | None = None
    options: Json | None = None
