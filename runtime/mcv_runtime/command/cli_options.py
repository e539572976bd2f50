"""The options of `mcv-run`, in the groups in which its help lists them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer
from typer.core import TyperCommand

from mcv_runtime.bundle.manifest import SmallImageUpsize
from mcv_runtime.errors import OptionError

_ASKING, _PICTURES, _TOKENS = "What to ask", "Pictures and videos", "How tokens are chosen"
_END, _MODES, _MACHINE = "Where and how an answer ends", "More than one question", "Model and machine"


def _option(*names: str, help: str, panel: str, metavar: str | None = None) -> Any:  # noqa: A002 - typer's name
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, show_default=False)


Prompt: TypeAlias = Annotated[str, _option("-p", "--prompt", help="What to ask.", panel=_ASKING)]
Images: TypeAlias = Annotated[
    list[Path] | None, _option("--image", help="A picture to ask about; may be repeated.", panel=_ASKING, metavar="<path>")
]
Videos: TypeAlias = Annotated[
    list[Path] | None,
    _option("--video", help="A video to ask about (needs PyAV); may be repeated.", panel=_ASKING, metavar="<path>"),
]
System: TypeAlias = Annotated[str | None, _option("--system", help="System prompt.", panel=_ASKING)]
Thinking: TypeAlias = Annotated[bool, _option("--thinking", help="Let the model think first, if it knows how.", panel=_ASKING)]
AsJson: TypeAlias = Annotated[
    bool, _option("--json", help="Print one JSON object with the answer and what it took.", panel=_ASKING)
]

ChatMode: TypeAlias = Annotated[
    bool, _option("--chat", help="Hold a conversation: one question a line; /help lists the commands.", panel=_MODES)
]
Batch: TypeAlias = Annotated[
    Path | None,
    _option(
        "--batch",
        help="Answer a file of requests, one JSON object a line, or ask --prompt about every picture of a folder.",
        panel=_MODES,
    ),
]
Out: TypeAlias = Annotated[
    Path | None,
    _option("--out", help="With --batch: where the answers go; what is there already is not asked again.", panel=_MODES),
]
BatchSize: TypeAlias = Annotated[
    int | None, _option("--batch-size", help="With --batch: how many requests are decoded together.", panel=_MODES)
]

MaxSliceNums: TypeAlias = Annotated[
    int | None, _option("--max-slice-nums", help="Most slices that a picture is cut into.", panel=_PICTURES)
]
UseImageId: TypeAlias = Annotated[
    bool | None,
    _option("--use-image-id/--no-use-image-id", help="Number the pictures in the prompt.", panel=_PICTURES),
]
DownsampleMode: TypeAlias = Annotated[
    str | None,
    _option(
        "--downsample-mode",
        help="Pixels behind a visual token: 16x is faster, 4x sees more, if the model has them.",
        panel=_PICTURES,
    ),
]
SmallUpsize: TypeAlias = Annotated[
    SmallImageUpsize | None, _option("--small-image-upsize", help="Whether small pictures are enlarged.", panel=_PICTURES)
]
MaxNumFrames: TypeAlias = Annotated[
    int | None, _option("--max-num-frames", help="Most frames that are taken of a video.", panel=_PICTURES)
]
StackFrames: TypeAlias = Annotated[
    int | None, _option("--stack-frames", help="Frames of each second that are looked at.", panel=_PICTURES)
]
MaxPixels: TypeAlias = Annotated[int, _option("--max-pixels", help="Refuse larger pictures.", panel=_PICTURES)]

Temperature: TypeAlias = Annotated[
    float | None,
    _option("--temperature", "--temp", help="Draw tokens, the more freely the higher; else the likeliest.", panel=_TOKENS),
]
TopK: TypeAlias = Annotated[int | None, _option("--top-k", help="Draw from so many likeliest tokens.", panel=_TOKENS)]
TopP: TypeAlias = Annotated[
    float | None, _option("--top-p", help="Draw from the likeliest tokens that make up this probability.", panel=_TOKENS)
]
MinP: TypeAlias = Annotated[
    float | None, _option("--min-p", help="Draw from tokens this fraction as likely as the likeliest.", panel=_TOKENS)
]
Seed: TypeAlias = Annotated[int | None, _option("--seed", help="The same seed, the same answer.", panel=_TOKENS)]
RepetitionPenalty: TypeAlias = Annotated[
    float | None, _option("--repetition-penalty", help="Above 1: repeat less.", panel=_TOKENS)
]
PresencePenalty: TypeAlias = Annotated[float | None, _option("--presence-penalty", help="Above 0: repeat less.", panel=_TOKENS)]
NumBeams: TypeAlias = Annotated[int | None, _option("--num-beams", help="Beam search with so many beams.", panel=_TOKENS)]
LengthPenalty: TypeAlias = Annotated[
    float | None, _option("--length-penalty", help="Of beam search; above 0: prefer longer answers.", panel=_TOKENS)
]
NumReturnSequences: TypeAlias = Annotated[
    int | None, _option("--num-return-sequences", help="So many answers, the best first.", panel=_TOKENS)
]
PromptLookup: TypeAlias = Annotated[
    bool, _option("--prompt-lookup", help="Guess tokens from the prompt: the same answer, often sooner.", panel=_TOKENS)
]
Logprobs: TypeAlias = Annotated[
    bool, _option("--logprobs", help="With --json or --batch: the log-probability of every token.", panel=_TOKENS)
]

MaxNewTokens: TypeAlias = Annotated[
    int | None, _option("-n", "--max-new-tokens", help="Longest answer, in tokens.", panel=_END)
]
Stop: TypeAlias = Annotated[
    list[str] | None, _option("--stop", help="End the answer before this text; may be repeated.", panel=_END, metavar="<str>")
]
Timeout: TypeAlias = Annotated[
    float | None, _option("--timeout", help="Seconds after which the answer ends as far as it is.", panel=_END)
]
JsonSchema: TypeAlias = Annotated[
    str | None, _option("--json-schema", help="Answer in JSON of this schema: a file, or the schema.", panel=_END)
]
Regex: TypeAlias = Annotated[str | None, _option("--regex", help="Answer in text of this pattern.", panel=_END)]
Choice: TypeAlias = Annotated[
    list[str] | None,
    _option("--choice", help="Answer with one of several texts; repeat it for each.", panel=_END, metavar="<str>"),
]

BundleFolder: TypeAlias = Annotated[
    Path | None, _option("-m", "--bundle", help="Folder of the model; else $MCV_BUNDLE, else the demo.", panel=_MACHINE)
]
Threads: TypeAlias = Annotated[
    int | None, _option("-t", "--threads", help="Threads; by default one per physical core.", panel=_MACHINE)
]
PrefillChunk: TypeAlias = Annotated[
    int | None,
    _option("--prefill-chunk", help="Tokens of a prompt read at once: fewer need less memory.", panel=_MACHINE),
]
ReuseMb: TypeAlias = Annotated[
    float | None, _option("--reuse-mb", help="Megabytes for what earlier questions have read; 0: none.", panel=_MACHINE)
]


VisionMemoryMb: TypeAlias = Annotated[
    float | None, _option("--vision-memory-mb", help="Megabytes for slices that are encoded together.", panel=_MACHINE)
]
CacheDir: TypeAlias = Annotated[
    Path | None, _option("--cache-dir", help="Folder for encoded pictures, so that later runs need not.", panel=_MACHINE)
]
CacheDirMb: TypeAlias = Annotated[float | None, _option("--cache-dir-mb", help="How large it may become.", panel=_MACHINE)]
LowMemory: TypeAlias = Annotated[
    bool, _option("--low-memory", help="Hold either the vision graphs or the decoder, never both.", panel=_MACHINE)
]
Kv: TypeAlias = Annotated[
    str | None,
    _option("--kv", help="int8: keep keys and values in a quarter of the memory, if the bundle can.", panel=_MACHINE),
]
Provider: TypeAlias = Annotated[
    str | None,
    _option("--provider", help="What of ONNX Runtime computes: cpu, cuda, openvino, ...", panel=_MACHINE),
]


class GroupedCommand(TyperCommand):
    """A command whose help lists its options by group, in plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or "Else", []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def read_schema(given: str | None) -> str | None:
    """The JSON schema itself, or what the file of that name holds."""
    if given is None or given.lstrip().startswith(("{", "[")):
        return given
    try:
        schema = Path(given).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise OptionError(f"the JSON schema {given} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{given} is not JSON: {error}") from None
    return schema
