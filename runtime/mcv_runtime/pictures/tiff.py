"""Which of a TIFF file's pictures is meant, and a directory of it that holds nothing but what its pixels need."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from mcv_runtime.errors import ImageError
from mcv_runtime.pictures.metadata import Bare, orientation

_KIND, _OLD_KIND, _WIDTH, _HEIGHT, _PHOTOMETRIC, _ORIENTATION, _SUB = 254, 255, 256, 257, 262, 274, 330
_TILE_WIDTH, _TILE_HEIGHT, _XMP = 322, 323, 700
_STRIPS, _STRIP_SIZES, _TILES, _TILE_SIZES = 273, 279, 324, 325
_PIXEL_TAGS = frozenset(
    {256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332}
    | {334, 338, 339, 347, *range(512, 522), 529, 530, 531, 532}
)
"""Sizes, samples, compression, where strips and tiles are, and colours: TIFF 6.0, and what JPEG in TIFF adds."""
_RAW = (32803, 34892)
"""Photometric interpretations of cameras' sensors: colour filter array and linear raw (DNG specification)."""
_REDUCED, _MASK = 1, 4
_MOST_LOOKED_AT = 64
"""Directories among which the picture is looked for that a file stands for."""
_MOST_PAGES, _MOST_ENTRIES = 10_000, 4096
_MOST_ENTRIES_IN_ALL = 1 << 18
"""Of the pages of a document: each has about twenty."""
_SIZES = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
"""Types of whole numbers."""


@dataclass(frozen=True, slots=True)
class _Directory:
    """What one picture's directory says."""

    entries: dict[int, bytes]
    """By tag: all of the entry as it is in the file."""
    numbers: dict[int, tuple[int, ...]]
    """By tag, where the entry is of whole numbers."""
    following: int

    def number(self, tag: int, default: int = 0) -> int:
        return self.numbers.get(tag, (default,))[0]

    @property
    def is_picture(self) -> bool:
        """Not a thumbnail or a mask of another one."""
        return not self.number(_KIND) & (_REDUCED | _MASK) and self.number(_OLD_KIND) != 2


@dataclass(frozen=True, slots=True)
class _Layout:
    """How numbers are written: in the classic form, or in the one for large files."""

    data: bytes
    order: str
    big: bool

    def unpack(self, form: str, position: int) -> tuple[int, ...]:
        return struct.unpack_from(self.order + form, self.data, position)

    def directory(self, position: int) -> _Directory:
        width, count_form, entry_form, offset_form = (20, "Q", "HHQ", "Q") if self.big else (12, "H", "HHI", "I")
        (count,) = self.unpack(count_form, position)
        if count > _MOST_ENTRIES:
            raise struct.error
        start = position + struct.calcsize(self.order + count_form)
        entries, numbers = {}, {}
        for place in range(start, start + width * count, width):
            tag, kind, many = self.unpack(entry_form, place)
            entries[tag] = self.data[place : place + width]
            if kind in _SIZES and 1 <= many <= _MOST_LOOKED_AT:
                form = f"{many}{_SIZES[kind]}"
                value = place + width - struct.calcsize(offset_form)
                inline = struct.calcsize(self.order + form) <= struct.calcsize(offset_form)
                numbers[tag] = self.unpack(form, value if inline else self.unpack(offset_form, value)[0])
            elif tag == _XMP and many < len(self.data):
                (value,) = self.unpack(offset_form, place + width - struct.calcsize(offset_form))
                entries[tag] = self.data[value : value + many]
        return _Directory(entries, numbers, self.unpack(offset_form, start + width * count)[0])

    def has_pixels_of(self, directory: _Directory) -> bool:
        """Whether all that holds its pixels lies in the file; else what `rewritten` adds would be read in the place of them."""
        try:
            for offsets, sizes in ((_STRIPS, _STRIP_SIZES), (_TILES, _TILE_SIZES)):
                ends = map(sum, zip(self._all(directory, offsets), self._all(directory, sizes), strict=False))
                if max(ends, default=0) > len(self.data):
                    return False
        except (struct.error, OverflowError):
            return False
        return True

    def _all(self, directory: _Directory, tag: int) -> tuple[int, ...]:
        """An entry's whole numbers, also where there are many."""
        if tag in directory.numbers or tag not in directory.entries:
            return directory.numbers.get(tag, ())
        entry = directory.entries[tag]
        _, kind, many, place = struct.unpack(self.order + ("HHQQ" if self.big else "HHII"), entry)
        if kind not in _SIZES or many > len(self.data):
            return ()
        return self.unpack(f"{many}{_SIZES[kind]}", place)

    def rewritten(self, directory: _Directory) -> bytes:
        """The file with that directory alone, as far as it is about pixels, at the end."""
        kept = [entry for tag, entry in sorted(directory.entries.items()) if tag in _PIXEL_TAGS]
        padding = -len(self.data) % 8
        place = struct.pack(self.order + ("Q" if self.big else "I"), len(self.data) + padding)
        count = struct.pack(self.order + ("Q" if self.big else "H"), len(kept))
        head = self.data[:8] + place if self.big else self.data[:4] + place
        return b"".join([head, self.data[len(head) :], bytes(padding), count, *kept, bytes(8)])


def bare_tiff(data: bytes, name: str, max_pixels: int, page: int | None = None) -> Bare:
    """The first picture that is no thumbnail, or a later one. Raw photographs are refused: only their thumbnail could be read.

    `page`: which picture that is no thumbnail, from 0, where the file is read as a document.
    """
    try:
        layout = _layout(data)
        pages, inner, _ = _directories(layout, _MOST_LOOKED_AT if page is None else _MOST_PAGES)
    except (struct.error, OverflowError):
        raise ImageError(f"{name} cannot be decoded: the TIFF file is cut off or damaged") from None
    if data[8:10] == b"CR" or any(one.number(_PHOTOMETRIC) in _RAW for one in (*pages, *inner)):
        raise ImageError(f"{name} is a camera's raw photo, which is not supported; save it as JPEG, PNG or TIFF")
    whole = [one for one in pages if one.is_picture]
    if page and page >= len(whole):
        raise ImageError(f"{name} cannot be decoded: the TIFF file is cut off or damaged behind page {max(len(whole), 1):,}")
    # cameras keep the photo behind its thumbnail; a file of thumbnails alone is read as what it is
    chosen = next(iter((*whole[page or 0 :], *(one for one in inner if one.is_picture))), pages[0])
    if chosen.number(_TILE_WIDTH) * chosen.number(_TILE_HEIGHT) > max(max_pixels, 1 << 20):
        raise ImageError(f"{name} is too large: one of its tiles alone has more than {max_pixels:,} pixels")
    if not layout.has_pixels_of(chosen):
        raise ImageError(f"{name} cannot be decoded: the TIFF file is cut off or damaged")
    turned = chosen.number(_ORIENTATION)
    if turned not in range(1, 9):
        turned = orientation(b"", chosen.entries.get(_XMP, b""))
    return Bare(layout.rewritten(chosen), turned, "pages" if len(whole) > 1 and page is None else "")


def count_pages(data: bytes) -> int:
    """How many pages a TIFF has that `bare_tiff` has read: its pictures that are no thumbnails, or else one.

    Where it is cut off or damaged behind some, there is one more, which cannot be read: nobody takes those for all.
    """
    pages, _, is_cut = _directories(_layout(data), _MOST_PAGES)
    return max(sum(page.is_picture for page in pages), 1) + is_cut


def _layout(data: bytes) -> _Layout:
    return _Layout(data, "<" if data[:2] == b"II" else ">", data[2:4] in (b"+\0", b"\0+"))


def _directories(layout: _Layout, most: int) -> tuple[list[_Directory], list[_Directory], bool]:
    """The pages, the pictures inside pages (cameras put the photo there), and whether a damaged directory ended the chain."""
    (first,) = layout.unpack("Q", 8) if layout.big else layout.unpack("I", 4)
    pages = [layout.directory(first)]
    following = list(_following(layout, pages[0].following, {first}, most))
    pages += [page for page in following if page is not None]
    offsets = [offset for page in pages for offset in page.numbers.get(_SUB, ())][:_MOST_LOOKED_AT]
    return pages, [directory for offset in offsets for directory in _inner(layout, offset)], None in following


def _following(layout: _Layout, offset: int, seen: set[int], most: int) -> Iterator[_Directory | None]:
    """A damaged directory, told as None, ends the chain: the first is what counts."""
    entries = 0
    while offset and offset not in seen and len(seen) < most and entries < _MOST_ENTRIES_IN_ALL:
        seen.add(offset)
        try:
            page = layout.directory(offset)
        except (struct.error, OverflowError):
            yield None
            return
        yield page
        entries += len(page.entries)
        offset = page.following


def _inner(layout: _Layout, offset: int) -> Iterator[_Directory]:
    try:
        yield layout.directory(offset)
    except struct.error:
        return
