"""A document and its pages: a PDF, a TIFF of several pages, an animated picture, or any other picture as its only page."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from mcv_runtime.documents.page_numbers import PageNumbers, check_page_numbers, chosen_pages
from mcv_runtime.documents.pdf import PdfLeaves, begins_as_pdf
from mcv_runtime.documents.picture_leaves import PictureLeaves
from mcv_runtime.errors import ImageError, OptionError, shown
from mcv_runtime.pictures.images import MAX_PIXELS, describe, open_local
from mcv_runtime.pictures.slicing import Size

DPI = 200.0
"""Of the pages of a PDF: as the published recipe for PDFs has it (MiniCPM-V CookBook, `pdf_parse.md`)."""
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MAX_DPI = 2400.0
MAX_PAGES = 100_000
"""What a file counts may be a lie; none that was printed has as many."""


class Leaves(Protocol):
    """An open file's pages, counted from 0; `name` is what to call the page in a message."""

    def __len__(self) -> int: ...

    def size(self, index: int, name: str, dpi: float, max_pixels: int) -> Size:
        """(width, height) in pixels, without drawing it; raises `ImageError`."""

    def page_size(self, index: int, name: str, max_pixels: int) -> Size:
        """(width, height) in what places on the page are told in: points of a PDF, else pixels."""

    def draw(self, index: int, name: str, dpi: float, max_pixels: int, check: Callable[[], None]) -> Image.Image:
        """The page as RGB; raises `ImageError`, and what `check` raises now and then."""


@dataclass(frozen=True, slots=True, eq=False)
class Document:
    """Pages to ask about, together in the place of one picture, or one by one as `open` gives them."""

    source: str | os.PathLike[str] | bytes
    pages: PageNumbers = None
    """`1-3,7`, `5-`, or numbers from 1; None: all."""
    dpi: float = DPI
    """Pixels an inch of a PDF's pages; pictures have their own."""

    def __post_init__(self) -> None:
        if not isinstance(self.source, str | os.PathLike | bytes):
            raise ImageError(f"{self.name} is no document: give a path or bytes")
        if isinstance(self.dpi, bool) or not isinstance(self.dpi, int | float) or not 1 <= self.dpi <= MAX_DPI:
            raise OptionError(f"dpi must be a number from 1 to {MAX_DPI:g}, not {shown(self.dpi)}")
        check_page_numbers(self.pages)

    @property
    def name(self) -> str:
        return describe(self.source)

    def open(self, max_pixels: int = MAX_PIXELS) -> Iterator[Page]:
        """The pages, none of which is looked at yet; raises `ImageError` for a file that is no document.

        A page is a picture to ask about. What is wrong with one is said when it is asked about, and the others are not to
        blame.
        """
        begins = _beginning(self.source)
        leaves: Leaves
        if begins_as_pdf(begins):
            leaves = PdfLeaves(self.source if isinstance(self.source, bytes) else open_local(self.source), self.name)
        else:
            leaves = PictureLeaves(self.source, max_pixels)
        if len(leaves) > MAX_PAGES:
            raise ImageError(f"{self.name} has {len(leaves):,} pages; at most {MAX_PAGES:,} are read")
        for number in chosen_pages(self.pages, len(leaves), self.name):
            yield Page(self, number, leaves)


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """One page of an open document: ask about it as about any other picture."""

    document: Document
    number: int
    """From 1."""
    leaves: Leaves

    @property
    def name(self) -> str:
        return f"{self.document.name}, page {self.number}"

    def size(self, max_pixels: int = MAX_PIXELS) -> Size:
        """(width, height) in pixels; raises `ImageError`."""
        return self.leaves.size(self.number - 1, self.name, self.document.dpi, max_pixels)

    def page_size(self, max_pixels: int = MAX_PIXELS) -> Size:
        """(width, height) in what places on it are told in: points of a PDF (a 72th of an inch), else pixels."""
        return self.leaves.page_size(self.number - 1, self.name, max_pixels)

    def image(self, max_pixels: int = MAX_PIXELS, check: Callable[[], None] = lambda: None) -> Image.Image:
        """The page as RGB; what `check` raises while it is drawn ends that."""
        return self.leaves.draw(self.number - 1, self.name, self.document.dpi, max_pixels, check)


def is_pdf(source: Any) -> bool:
    """Whether a path or bytes are those of a PDF; what cannot be read is none."""
    try:
        return isinstance(source, os.PathLike | bytes) and begins_as_pdf(_beginning(source))
    except ImageError:
        return False


def is_document(source: Any) -> bool:
    """Whether a path or bytes may have several pages that are meant one by one: those of a PDF or a TIFF."""
    try:
        return is_pdf(source) or _beginning(source)[:4] in _TIFF
    except ImageError:
        return False


def _beginning(source: str | os.PathLike[str] | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:64]
    with open_local(source) as file:
        return file.read(64)
