"""The options of `mcv-run`, in the groups in which its help lists them."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from mcv_runtime.bundle import folder as bundles
from mcv_runtime.errors import OptionError
from mcv_runtime.files import at_home
from mcv_runtime.request import options
from mcv_runtime.request.options import Options

_ASKING, _PICTURES, _MODES, MACHINE = "What to ask", "Pictures and videos", "More than one question", "Model and machine"
PagesAs = Literal["text", "markdown", "json"]
_EITHER_WAY = "use_image_id"
"""The option that can be switched off as well as on; the others are off unless they are named."""
_PANELS = {
    options.ASKING: _ASKING,
    options.PICTURES: _PICTURES,
    options.TOKENS: "How tokens are chosen",
    options.END: "Where and how an answer ends",
    options.MACHINE: MACHINE,
}


def _option(*names: str, help: str, panel: str, metavar: str | None = None) -> Any:  # noqa: A002 - typer's name
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, show_default=False)


Prompt: TypeAlias = Annotated[str, _option("-p", "--prompt", help="What to ask.", panel=_ASKING)]
Images: TypeAlias = Annotated[
    list[Path] | None,
    _option(
        "--image",
        help="A picture, or a document such as a PDF, to ask about; may be repeated.",
        panel=_ASKING,
        metavar="<path>",
    ),
]
Pages: TypeAlias = Annotated[
    str | None,
    _option("--pages", help="Of the documents given by --image, such as 1-3,7 or 5-; else all of a PDF.", panel=_ASKING),
]
Dpi: TypeAlias = Annotated[float | None, _option("--dpi", help="Pixels an inch of a PDF's pages (200).", panel=_PICTURES)]
EachPage: TypeAlias = Annotated[
    bool, _option("--each-page", help="Ask about every page of a document on its own, not about all together.", panel=_ASKING)
]
To: TypeAlias = Annotated[
    PagesAs | None,
    _option(
        "--to",
        help="Read every page out, asked as published: text, markdown, or json (markdown in JSON, a page a line).",
        panel=_ASKING,
    ),
]
Videos: TypeAlias = Annotated[
    list[Path] | None,
    _option("--video", help="A video to ask about (needs PyAV); may be repeated.", panel=_ASKING, metavar="<path>"),
]
System: TypeAlias = Annotated[str | None, _option("--system", help="System prompt.", panel=_ASKING)]
AsJson: TypeAlias = Annotated[
    bool, _option("--json", help="Print one JSON object with the answer and what it took.", panel=_ASKING)
]

ChatMode: TypeAlias = Annotated[
    bool, _option("--chat", help="Hold a conversation: one question a line; /help lists the commands.", panel=_MODES)
]
Batch: TypeAlias = Annotated[
    str | None,
    _option(
        "--batch",
        help="Answer requests: lines of JSON, a Parquet file, a tar archive; or ask --prompt about every picture of a folder."
        " Also s3://, gs:// or hf://.",
        panel=_MODES,
        metavar="<path>",
    ),
]
Out: TypeAlias = Annotated[
    str | None,
    _option(
        "--out",
        help="With --batch: where the answers go (.parquet: as a table); what is there already is not asked again.",
        panel=_MODES,
        metavar="<path>",
    ),
]
Fetch: TypeAlias = Annotated[
    list[str] | None,
    _option(
        "--fetch",
        help="With --batch: let rows name pictures of this folder of a store, such as s3://bucket/scans; may be repeated.",
        panel=_MODES,
        metavar="<address>",
    ),
]
BatchSize: TypeAlias = Annotated[
    int | None, _option("--batch-size", help="With --batch: how many requests are decoded together.", panel=_MODES)
]

ComputeEngine: TypeAlias = Annotated[
    Literal["here", "ray"],
    _option("--engine", help="With --batch: who computes; ray: workers of a Ray cluster, --threads CPUs each.", panel=_MODES),
]
Address: TypeAlias = Annotated[
    str | None,
    _option("--address", help="Of the Ray cluster (auto: this machine's); else one is started here for as long.", panel=_MODES),
]
Workers: TypeAlias = Annotated[
    int | None, _option("--workers", help="How many of Ray's workers; else as many as it has CPUs for.", panel=_MODES)
]

MaxPixels: TypeAlias = Annotated[int, _option("--max-pixels", help="Refuse larger pictures.", panel=_PICTURES)]

BundleFolder: TypeAlias = Annotated[
    Path | None, _option("-m", "--bundle", help="Folder of the model; else $MCV_BUNDLE, else the demo.", panel=MACHINE)
]
Threads: TypeAlias = Annotated[
    int | None, _option("-t", "--threads", help="Threads; by default one per physical core.", panel=MACHINE)
]
MemoryMb: TypeAlias = Annotated[
    float | None,
    _option("--memory-mb", help="Most megabytes to hold besides the weights; else a quarter of the machine's.", panel=MACHINE),
]
NoReuse: TypeAlias = Annotated[bool, _option("--no-reuse", help="Keep nothing of earlier questions.", panel=MACHINE)]
CacheDir: TypeAlias = Annotated[
    Path | None, _option("--cache-dir", help="Folder for encoded pictures, so that later runs need not.", panel=MACHINE)
]
CacheDirMb: TypeAlias = Annotated[float | None, _option("--cache-dir-mb", help="How large it may become.", panel=MACHINE)]
LowMemory: TypeAlias = Annotated[
    bool, _option("--low-memory", help="Hold either the vision graphs or the decoder, never both.", panel=MACHINE)
]
Kv: TypeAlias = Annotated[
    str | None,
    _option("--kv", help="int8: keep keys and values in a quarter of the memory, if the bundle can.", panel=MACHINE),
]
Provider: TypeAlias = Annotated[
    str | None,
    _option("--provider", help="What computes: cpu, cuda, ... of ONNX Runtime; openvino: pictures.", panel=MACHINE),
]


def chosen_bundle(named: Path | None) -> Path:
    """The bundle that was named on the command line, or that of `$MCV_BUNDLE`, or the demo."""
    chosen = named or os.environ.get("MCV_BUNDLE")
    return at_home(chosen) if chosen else bundles.DEFAULT


def request_parameters() -> Iterator[inspect.Parameter]:
    """A parameter for every field of `Options` that has a flag; typer makes an option of each."""
    hints = get_type_hints(Options)
    for field in dataclasses.fields(Options):
        if not field.metadata["flag"]:
            continue
        kind, name = _kind(hints[field.name]), field.name.replace("_", "-")
        flags = [flag for flag in field.metadata["flags"] if flag != "--choice"]
        long = "--choice" if "--choice" in field.metadata["flags"] else f"--{name}"
        if field.name == _EITHER_WAY:
            long = f"--{name}/--no-{name}"
        listed = get_origin(kind) is list
        option = typer.Option(
            *flags,
            long,
            help=field.metadata["help"],
            rich_help_panel=_PANELS[field.metadata["group"]],
            metavar="<str>" if listed else None,
            show_default=False,
        )
        switch = kind is bool and field.name != _EITHER_WAY
        annotation: Any = Annotated[kind if switch else kind | None, option]
        default = False if switch else None
        yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def request_options(values: Mapping[str, Any]) -> Options:
    """Those that were said on the command line."""
    given = {name: value for name, value in values.items() if value is not None and value != []}
    given = {name: value for name, value in given.items() if value is not False or name == _EITHER_WAY}
    if "json_schema" in given:
        given["json_schema"] = read_schema(given["json_schema"])
    return Options.of(None, given)


def _kind(hint: Any) -> Any:
    """What a command line can give of a type: of several, the first."""
    kind = next(one for one in get_args(hint) if one is not NoneType)
    if str in get_args(hint) and any(get_origin(one) is Sequence for one in get_args(hint)):
        return list[str]
    return list[str] if get_origin(kind) is Sequence else kind


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
