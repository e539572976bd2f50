"""Draw the pages of a PDF with PDFium, through pypdfium2, an extra.

A PDF may hold scripts, forms and links to elsewhere. Nothing of it is run or fetched: forms are drawn as they were filled in,
and only by a PDFium without V8 and XFA, as it comes with pypdfium2. PDFium is no code for threads: one page at a time is at it.
"""

from __future__ import annotations

import io
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from PIL import Image

from mcv_runtime.errors import ImageError, McvError, ResourceError
from mcv_runtime.pictures.slicing import Size

_POINTS = 72
"""An inch."""
_PASSWORD, _SECURITY = 4, 5
"""FPDF_ERR_PASSWORD and FPDF_ERR_SECURITY."""
_LOCK = threading.Lock()
_gone: deque[Any] = deque()
"""Documents that nobody has any more, to be closed by whoever holds the lock."""


def begins_as_pdf(begins: bytes) -> bool:
    """Whether the first bytes of a file, at best 64, are those of a PDF."""
    return begins.lstrip(b"\0\t\n\r\f \xef\xbb\xbf").startswith(b"%PDF-")


class PdfLeaves:
    """An open PDF."""

    def __init__(self, file: BinaryIO | bytes, name: str) -> None:
        """Raises `ImageError` for one that cannot be opened."""
        self._pdfium: Any = _imported()
        self._file = io.BytesIO(file) if isinstance(file, bytes) else file
        with _alone():
            self._pdfium.raw.FPDF_LoadMemDocument64(b"", 0, None)  # its error, not an earlier one, for a file without pages
            try:
                self._pdf = self._pdfium.PdfDocument(self._file)
            except self._pdfium.PdfiumError as error:
                self._file.close()
                raise ImageError(f"{name} {_refusal(getattr(error, 'err_code', None))}") from None
            if not self._pdfium.PDFIUM_INFO.flags:
                with suppress(self._pdfium.PdfiumError):  # forms that are damaged are not drawn
                    self._pdf.init_forms()
            self._count = len(self._pdf)

    def __len__(self) -> int:
        return self._count

    def size(self, index: int, name: str, dpi: float, max_pixels: int) -> Size:
        with self._opened(index, name) as page:
            return _pixels(page.get_size(), name, dpi, max_pixels)

    def page_size(self, index: int, name: str, max_pixels: int) -> Size:
        return self.size(index, name, _POINTS, max_pixels)

    def draw(self, index: int, name: str, dpi: float, max_pixels: int, check: Callable[[], None]) -> Image.Image:
        pdfium, raw = self._pdfium, self._pdfium.raw
        with self._opened(index, name) as page:
            size = _pixels(page.get_size(), name, dpi, max_pixels)
            bitmap = pdfium.PdfBitmap.new_native(*size, raw.FPDFBitmap_BGR)
            try:
                bitmap.fill_rect((255, 255, 255, 255), 0, 0, *size)
                pause = raw.IFSDK_PAUSE(version=1)
                pdfium.internal.set_callback(pause, "NeedToPauseNow", lambda _: True)
                drawn = bitmap, page, 0, 0, *size, 0, raw.FPDF_ANNOT
                try:
                    state = raw.FPDF_RenderPageBitmap_Start(*drawn, pause)
                    while state == raw.FPDF_RENDER_TOBECONTINUED:  # so often that a page of millions of lines can be left
                        check()
                        state = raw.FPDF_RenderPage_Continue(page, pause)
                finally:
                    raw.FPDF_RenderPage_Close(page)
                if state != raw.FPDF_RENDER_DONE:
                    raise ImageError(f"{name} cannot be drawn: the PDF is damaged there")
                if self._pdf.formenv:
                    raw.FPDF_FFLDraw(self._pdf.formenv, *drawn)
                image: Image.Image = bitmap.to_pil()
                return image if image.mode == "RGB" else image.convert("RGB")
            finally:
                bitmap.close()

    @contextmanager
    def _opened(self, index: int, name: str) -> Iterator[Any]:
        with _alone():
            try:
                page = self._pdf[index]
            except Exception:
                raise ImageError(f"{name} cannot be read: the PDF is damaged there") from None
            try:
                yield page
            except McvError:
                raise
            except MemoryError as error:
                raise ResourceError(f"there is not enough memory for {name}; lower dpi or max_pixels") from error
            except self._pdfium.PdfiumError as error:
                raise ImageError(f"{name} cannot be drawn: {error}") from None
            finally:
                page.close()

    def __del__(self) -> None:
        if (pdf := getattr(self, "_pdf", None)) is not None:  # closed here, it might be in the middle of another's drawing
            _gone.append((pdf, self._file))
            if _LOCK.acquire(blocking=False):
                try:
                    _close_gone()
                finally:
                    _LOCK.release()


@contextmanager
def _alone() -> Iterator[None]:
    with _LOCK:
        try:
            yield
        finally:
            _close_gone()


def _close_gone() -> None:
    while _gone:
        pdf, file = _gone.popleft()
        pdf.close()
        file.close()


def _imported() -> Any:
    try:
        import pypdfium2
    except ImportError:
        raise ImageError("reading a PDF needs pypdfium2; install it with `pip install minicpmv-onnx[pdf]`") from None
    return pypdfium2


def _refusal(code: int | None) -> str:
    if code == _PASSWORD:
        return "is encrypted with a password; save it without one"
    if code == _SECURITY:
        return "is encrypted in a way that is not supported; save it without"
    return "cannot be read: the PDF is empty, cut off or damaged"


def _pixels(points: tuple[float, float], name: str, dpi: float, max_pixels: int) -> Size:
    width, height = (math.ceil(side * dpi / _POINTS) for side in points)
    if width * height > max_pixels:
        raise ImageError(
            f"{name} is too large: {width} x {height} is more than {max_pixels:,} pixels; lower dpi or raise max_pixels"
        )
    return max(width, 1), max(height, 1)
