"""One row of a batch: what is asked in it, whatever the file it comes from.

What is null in a row is as if it were left out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from mcv_runtime.batch.answer_fields import error_line
from mcv_runtime.batch.remote import Place, RemoteFile, is_store_address, place_of
from mcv_runtime.documents.document import DPI, Document, is_document
from mcv_runtime.documents.page_numbers import PageNumbers
from mcv_runtime.errors import ImageError, OptionError, shown
from mcv_runtime.files import at_home
from mcv_runtime.pictures.images import MAX_PIXELS, is_address
from mcv_runtime.pictures.video import Video
from mcv_runtime.request.options import Options
from mcv_runtime.request.request import Request

ROW_BYTES = 16 << 20
"""The longest row that is read."""
_PATH_CHARACTERS = 4096
"""The longest path that a system takes."""
_OWN = frozenset({"id", "image", "images", "video", "prompt", "system", "pages", "dpi", "each_page"})
_OPTIONS = {field.name for field in dataclasses.fields(Options)} - {"cancel", "progress"}
"""What a file can name."""
FIELDS = _OWN | _OPTIONS

Located: TypeAlias = Callable[[str], Place]
"""The file that a row means; raises `OptionError` for what is no path of one."""
FILE_BYTES = 512 << 20
"""The largest file that is in memory whole: of an archive, or from a store."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A picture that is in the row itself."""

    data: bytes = field(repr=False)
    path: str | None = None
    """Where it was, for people."""


@dataclass(frozen=True, slots=True)
class Paging:
    """How documents are asked about: which pages, how fine those of PDFs are drawn, and whether one by one."""

    pages: PageNumbers = None
    dpi: float = DPI
    each_page: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a row does not say itself."""

    prompt: str
    system: str | None
    options: Options
    model: str
    """Identity of the bundle: other models give other answers."""
    paging: Paging = Paging()
    max_pixels: int = MAX_PIXELS
    fetch: tuple[RemoteFile, ...] = ()
    """Folders of stores, the files of which a row may name by their addresses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRow:
    """One row: a request, or what is wrong with it."""

    number: int
    """Its line, or its place in the folder, table or archive, from 1; that of a document, where it is one of its pages."""
    digest: str
    """Of all that determines the answer, apart from what is in the files that it names."""
    said: Mapping[str, Any] = field(default_factory=dict)
    """What of the row is repeated beside its answer: id, pictures and page."""
    request: Request | None = None
    """What is asked; pictures of a store are `RemoteFile`s, until `fetched` has read them."""
    error: str = ""
    """Why there is no request."""


def fetched(request: Request) -> Request:
    """The request with the bytes of those of its pictures that are in a store; raises `ImageError`."""

    def read(one: Any) -> Any:
        return one.read(FILE_BYTES, ImageError) if isinstance(one, RemoteFile) else one

    if request.messages is None:
        images = request.images if isinstance(request.images, list) else [request.images]
        return dataclasses.replace(request, images=list(map(read, images))) if any(map(_is_remote, images)) else request
    messages = [
        {**message, "content": list(map(read, content)) if isinstance(content := message["content"], list) else content}
        for message in request.messages
    ]
    return dataclasses.replace(request, messages=messages)


def _is_remote(one: object) -> bool:
    return isinstance(one, RemoteFile)


def rows_of(number: int, fields: Mapping[str, Any], located: Located, defaults: Defaults) -> Iterator[BatchRow]:
    """The row, or one for each page of its document; one with an error if it makes no sense."""
    try:
        yield from _rows(number, fields, located, defaults)
    except Exception as error:  # whatever it is, the other rows are not to blame
        yield refused(number, error_line(error), fields)


def refused(number: int, error: str, fields: Any = None) -> BatchRow:
    """A row that cannot be answered."""
    return BatchRow(number=number, digest="", error=error, said=_said(fields))


def digest_of(*asked: Any) -> str:
    """Equal for equal requests, of JSON values and `Encoded` pictures."""
    text = json.dumps(asked, sort_keys=True, default=lambda one: hashlib.sha256(one.data).hexdigest())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _rows(number: int, fields: Mapping[str, Any], located: Located, defaults: Defaults) -> Iterator[BatchRow]:
    for name in sorted(fields.keys() - FIELDS):
        raise OptionError(f"a row has no field {shown(name)}; options have the names of Options")
    fields = {name: value for name, value in fields.items() if value is not None}
    prompt, system = fields.get("prompt", defaults.prompt), fields.get("system", defaults.system)
    if not isinstance(prompt, str) or not isinstance(system, str | None):
        raise OptionError("prompt and system are texts")
    options = Options.of(defaults.options, {name: value for name, value in fields.items() if name in _OPTIONS})
    paging = _paging(fields, defaults.paging)
    seen = [_source(one, located) for name in ("image", "images") for one in _pictures(fields, name)]
    videos = [Video(local(located(path))) for path in _pictures(fields, "video", kinds=str)]
    asked = [
        fields,
        prompt,
        system,
        options.given(),
        defaults.model,
        *([] if paging == Paging() else [dataclasses.astuple(paging)]),
    ]

    def row(pictures: list[Any], page: int | None = None) -> BatchRow:
        said = _said(fields) if page is None else {**_said(fields), "page": page}
        request = Request(pictures, prompt, system, options)
        return BatchRow(number=number, digest=digest_of(*asked, page), request=request, said=said)

    if not paging.each_page:
        yield row([*(_paged(one, paging) for one in seen), *videos])
    elif len(seen) != 1 or videos:
        raise OptionError("with each_page, a row names one document and nothing else; leave out each_page, or the others")
    elif isinstance(document := _paged(seen[0], paging), Document):  # of a store, all of it is read now
        for page in document.open(defaults.max_pixels):
            yield row([page], page.number)
    else:
        yield row([document])


def _paging(fields: Mapping[str, Any], defaults: Paging) -> Paging:
    paging = dataclasses.replace(defaults, **{name: fields[name] for name in ("pages", "dpi", "each_page") if name in fields})
    if not isinstance(paging.each_page, bool):
        raise OptionError("each_page is true or false")
    return paging


def _paged(source: Place | bytes, paging: Paging) -> Place | bytes | Document:
    """A file of which pages are named, or that may have several, as a document; pictures stay as they are."""
    if isinstance(source, RemoteFile):
        if paging == Paging():
            return source
        source = source.read(FILE_BYTES, ImageError)
    in_pages = paging.pages is not None or (paging != Paging() and is_document(source))
    return Document(source, paging.pages, paging.dpi) if in_pages else source


def _source(picture: str | Encoded, located: Located) -> Place | bytes:
    return picture.data if isinstance(picture, Encoded) else located(picture)


def local(place: Place) -> Path:
    """The place, if it is on this machine; raises `OptionError`."""
    if isinstance(place, RemoteFile):
        raise OptionError(f"{place} is not on this machine; a video is read from a file that is")
    return place


def _pictures(fields: Mapping[str, Any], name: str, kinds: Any = str | Encoded) -> list[Any]:
    given = fields.get(name, [])
    pictures = [picture for picture in given if picture is not None] if isinstance(given, list) else [given]
    if not all(isinstance(picture, kinds) and picture for picture in pictures):
        raise OptionError(f"{name} is the path of a file, or a list of such")
    return pictures


def files_beside(folder: Place, fetch: Sequence[RemoteFile] = ()) -> Located:
    """Files by their paths from a folder, or from the root or a home; by their addresses if they are in one of `fetch`."""

    def located(text: str) -> Place:
        if is_store_address(text) and len(text) <= _PATH_CHARACTERS:
            found = place_of(text)
            if isinstance(found, RemoteFile) and any(map(found.is_within, fetch)):
                return found
            raise OptionError(f"{shown(text)} is not fetched; allow it with --fetch and the folder that it is in")
        if is_address(text) or len(text) > _PATH_CHARACTERS:
            raise OptionError(f"{_cut(text)} is no path of a file; save what it stands for, and name that file")
        if isinstance(folder, RemoteFile):
            return folder.joined(text)
        path = folder / at_home(text)
        _require_plain(path)
        return path

    return located


def _require_plain(path: Path) -> None:
    """Raise `OptionError` for a pipe, a device, or what a system tells of its processes: a row may be a stranger's.

    What `mcv-run` itself is given on its command line, a pipe for example, is its user's own.
    """
    try:
        status = path.stat()
    except (OSError, ValueError):  # not there, or no name: said when it is opened
        return
    if not is_plain(path, status.st_mode):
        raise OptionError(f"{shown(str(path))} is not a plain file; a row names pictures and videos that are saved as files")


def is_plain(path: Path, mode: int) -> bool:
    """Whether it is a file, and not what a system tells of itself under the name of one."""
    spelled = os.path.normpath(path), os.path.realpath(path)
    return stat.S_ISREG(mode) and not any(re.match(r"/proc/|/dev/(fd/|[^/]+$)", name) for name in spelled)


def _said(fields: Any) -> dict[str, Any]:
    if not isinstance(fields, Mapping):
        return {}
    said = {name: fields[name] for name in ("custom_id", "id", "image", "images", "video") if fields.get(name) is not None}
    said = {name: value if name in ("custom_id", "id") else _cut(value) for name, value in said.items()}
    return {name: value for name, value in said.items() if value not in (None, [])}


def _cut(value: Any) -> Any:
    """A path, or several; of what is long and no path, the beginning."""
    if isinstance(value, list):
        return [cut for one in value if (cut := _cut(one)) is not None]
    if isinstance(value, Encoded):
        return None if value.path is None else _cut(value.path)
    if not isinstance(value, str):
        return None
    is_content = len(value) > 80 and is_address(value) and not is_store_address(value)
    return f"{value[:80]}..." if is_content or len(value) > _PATH_CHARACTERS else value
