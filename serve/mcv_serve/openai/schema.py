"""Bodies of OpenAI's chat and completions, with what vLLM, llama-server and the published models add to them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mcv_serve.body import Body

Fraction = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Count = Annotated[int, Field(ge=1, le=1 << 20)]
Text = Annotated[str, Field(max_length=1 << 24)]
Json = dict[str, Any]


class ImageUrl(Body):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class VideoUrl(Body):
    url: str
    fps: Annotated[float, Field(gt=0, le=1000)] | None = None


class TextPart(Body):
    type: Literal["text", "input_text", "output_text", "refusal"]
    text: Text | None = None
    refusal: Text | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class ImagePart(Body):
    type: Literal["image_url", "input_image"]
    image_url: ImageUrl | str
    detail: Literal["auto", "low", "high"] | None = None
    file_id: None = None


class VideoPart(Body):
    type: Literal["video_url", "input_video", "video"]
    video_url: VideoUrl | str | None = None
    video: Annotated[list[str], Field(min_length=1, max_length=4096)] | str | None = None
    fps: Annotated[float, Field(gt=0, le=1000)] | None = None


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class CalledFunction(Body):
    name: Annotated[str, Field(min_length=1)]
    arguments: str | Json = "{}"


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: CalledFunction


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class Function(Body):
    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"] = "function"
    function: NamedFunction


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: Annotated[Json | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Annotated[Json | None, Field(alias="schema")] = None


class StructuredOutputs(Body):
    """As vLLM has it: one of these."""

    json_: Annotated[Json | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    json_object: bool | None = None


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class TemplateArguments(Body):
    enable_thinking: bool | None = None


class Sampling(Body):
    """What all bodies share."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Fraction | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Fraction | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: str | Annotated[list[str], Field(max_length=64)] | None = None
    stop_token_ids: list[int] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Bias] | None = None
    repeat_guard: Annotated[int, Field(ge=0, le=1 << 16)] | None = None

    guided_json: Json | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None
    response_format: ResponseFormat | None = None

    max_slice_nums: Annotated[int, Field(ge=1, le=1024)] | None = None
    downsample_mode: str | None = None
    use_image_id: bool | None = None
    max_num_frames: Annotated[int, Field(ge=1, le=16384)] | None = None
    stack_frames: Annotated[int, Field(ge=1, le=64)] | None = None

    # these change no answer here, and clients send them
    user: str | None = None
    metadata: Json | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    cache_prompt: bool | None = None
    timings_per_token: bool | None = None
    return_progress: bool | None = None


class ChatBody(Sampling):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=512)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    functions: None = None
    function_call: None = None
    chat_template_kwargs: TemplateArguments | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    enable_thinking: bool | None = None
    include_reasoning: bool | None = None
    modalities: list[Literal["text"]] | None = None
    prompt: Annotated[list[Any], Field(max_length=0)] | None = None
    images: Annotated[list[str], Field(max_length=0)] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class CompletionBody(Sampling):
    """POST /v1/completions"""

    prompt: Text | Annotated[list[Text | int], Field(min_length=1)]
    images: list[str] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class TokenizeBody(Body):
    """POST /tokenize"""

    model: str | None = None
    prompt: Text | None = None
    content: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: Literal[True] | None = None
    add_generation_prompt: Literal[True] | None = None
    return_token_strs: bool | None = None
    with_pieces: Literal[False] | None = None


class DetokenizeBody(Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: Annotated[list[int], Field(max_length=1 << 20)]
