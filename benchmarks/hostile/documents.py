"""Documents, and tables and archives of requests, with damaged bytes."""

from __future__ import annotations

import io
import itertools
import tarfile
from pathlib import Path
from random import Random

import pyarrow
import pypdfium2
from PIL import Image
from pyarrow import parquet

from hostile.guarded import Case, Draw
from hostile.media import damaged
from mcv_runtime import Document, McvError, Options
from mcv_runtime.batch.rows import Defaults
from mcv_runtime.batch.sources import batch_source

_MAX_PIXELS = 4_000_000
_FEW = 4
"""Pages or rows of each that are looked at."""
_DEFAULTS = Defaults(prompt="What?", system=None, options=Options(), model="demo")


def documents(scratch: Path) -> Draw:
    """Bytes of a document, changed where its header is or anywhere."""
    seeds = [("PDF", _pdf()), *((kind, _frames(kind)) for kind in ("TIFF", "GIF", "WEBP", "PNG"))]
    path = scratch / "document"

    def draw(dice: Random) -> Case:
        kind, data = dice.choice([seeds[0], dice.choice(seeds)])
        path.write_bytes(damaged(data, dice))
        return Case(kind, lambda: _drawn(path))

    return draw


def tables(scratch: Path) -> Draw:
    """Bytes of a table or an archive of requests."""
    seeds = [("rows.parquet", _parquet()), ("rows.tar", _tar("w")), ("rows.tar.gz", _tar("w:gz"))]

    def draw(dice: Random) -> Case:
        name, data = dice.choice(seeds)
        path = scratch / name
        path.write_bytes(damaged(data, dice))
        return Case(name, lambda: sum(1 for _ in itertools.islice(batch_source(path, _DEFAULTS).rows(), 1000)))

    return draw


def _drawn(path: Path) -> int:
    """Pages that can be drawn; the others are refused in a line."""
    found = 0
    refused: McvError | None = None
    for page in itertools.islice(Document(path, dpi=36).open(_MAX_PIXELS), _FEW):
        try:
            found += page.image(_MAX_PIXELS).size == page.size(_MAX_PIXELS)
        except McvError as error:
            refused = error
    if not found and refused is not None:
        raise refused
    return found


def _pdf() -> bytes:
    pdf = pypdfium2.PdfDocument.new()
    for number in range(3):
        page = pdf.new_page(200, 300)
        drawn = pypdfium2.PdfImage.new(pdf)
        drawn.set_bitmap(pypdfium2.PdfBitmap.from_pil(Image.effect_noise((40, 30), 50 + number).convert("RGB")))
        drawn.set_matrix(pypdfium2.PdfMatrix().scale(100, 100))
        page.insert_obj(drawn)
        page.gen_content()
    file = io.BytesIO()
    pdf.save(file)
    return file.getvalue()


def _frames(kind: str) -> bytes:
    frames = [Image.effect_noise((50, 40), 40 + at).convert("RGB") for at in range(3)]
    file = io.BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


def _parquet() -> bytes:
    file = io.BytesIO()
    pictures = [{"bytes": bytes([at]) * 50, "path": f"{at}.png"} for at in range(60)]
    parquet.write_table(
        pyarrow.table({"image": pictures, "id": list(range(60)), "prompt": ["What?"] * 60}), file, row_group_size=20
    )
    return file.getvalue()


def _tar(mode: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for at in range(20):
            for name, data in ((f"{at}.png", bytes([at]) * 700), (f"{at}.json", b'{"prompt": "What?"}')):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return file.getvalue()
