"""Real documents, and many pages: each is answered or refused in a line, and memory stays flat.

    python benchmarks/documents.py --out benchmarks/results/documents.json
    python benchmarks/documents.py --folder /usr/share/doc --part files

`files`: OCRmyPDF's test files (from its source package, which pip downloads) or those of a folder, page by page, with the demo
model. Pages are counted and ordered as `pdftotext` has them, where that is there: the words of a page that pdftotext finds are
looked for in what PDFium finds on the same page. `memory`: a PDF of 1,000 pages, each asked about.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pypdfium2
from PIL import Image

import mcv_runtime
from mcv_runtime import Document, Engine, McvError, Options, Request
from mcv_runtime.documents.document import is_pdf

OPTIONS = Options(max_new_tokens=2, max_slice_nums=4)
SUFFIXES = {".pdf", ".png", ".jpg", ".jpeg", ".tif", ".tiff", ".gif", ".webp", ".bmp", ".jp2"}
PAGES = 1000
MOST_PAGES = 30
"""Of each file that are compared with pdftotext's: the first ones."""


def downloaded(scratch: Path) -> Path:
    """OCRmyPDF's test files."""
    get = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "ocrmypdf"]
    subprocess.run([*get, "--dest", str(scratch), "ocrmypdf"], check=True)
    with tarfile.open(next(scratch.glob("ocrmypdf*.tar.gz"))) as archive:
        archive.extractall(scratch, filter="data")
    return next(scratch.glob("ocrmypdf*/tests/resources"))


def ask_files(engine: Engine, folder: Path, most: int) -> dict[str, Any]:
    told, wrong = {}, []
    for path in sorted(one for one in folder.rglob("*") if one.is_file() and one.suffix.lower() in SUFFIXES):
        began = time.monotonic()
        answered, refused, pages = 0, {}, 0
        try:
            for page in Document(path).open():
                pages += 1
                if pages > most:
                    break
                try:
                    answered += engine.ask(page, "What does the text say?", options=OPTIONS).stop_reason in ("stop", "length")
                except McvError as error:
                    refused[f"page {page.number}"] = str(error)
        except McvError as error:
            refused["file"] = str(error)
        differing = order(path) if is_pdf(path) and "file" not in refused else []
        wrong += [f"{path.name}: {one}" for one in differing]
        told[str(path.relative_to(folder))] = {
            "answered": answered, "refused": {name: line.replace(f"{folder}/", "") for name, line in refused.items()},
            "seconds": round(time.monotonic() - began, 2),
        }  # fmt: skip
        print(path.name, answered, refused, flush=True)
    lines = [line for one in told.values() for line in one["refused"].values()]
    return {
        "files": len(told),
        "pages answered": sum(one["answered"] for one in told.values()),
        "refused": len(lines),
        "refusals of several lines": sum("\n" in line for line in lines),
        "compared with pdftotext": shutil.which("pdftotext") is not None,
        "pages in another order than pdftotext's": wrong,
        "each": told,
    }


def order(path: Path) -> list[str]:
    """Pages on which pdftotext finds other words than we do, if it reads the file at all; by the first hundred of each page."""
    if shutil.which("pdftotext") is None:
        return []
    done = subprocess.run(["pdftotext", "-q", str(path), "-"], capture_output=True)
    theirs = done.stdout.decode(errors="replace").split("\f")[:-1]
    if done.returncode:
        return []
    with pypdfium2.PdfDocument(path) as pdf:
        if len(pdf) != len(theirs):
            return [f"{len(pdf)} pages, {len(theirs)} by pdftotext"]
        ours = [pdf[at].get_textpage().get_text_bounded().split() for at in range(min(len(pdf), MOST_PAGES))]
    found = zip(ours, (page.split() for page in theirs), strict=False)
    return [
        f"page {at}" for at, (a, b) in enumerate(found, 1) if len(b) > 20 and len({*b[:100]} & {*a}) < 0.5 * len({*b[:100]})
    ]


def thousand_pages(path: Path) -> None:
    """As many pages, each of its own noise, as scans have it."""
    pdf = pypdfium2.PdfDocument.new()
    for number in range(PAGES):
        page = pdf.new_page(612, 792)
        noise = Image.effect_noise((170, 220), 40 + number % 60).convert("RGB")
        drawn = pypdfium2.PdfImage.new(pdf)
        drawn.set_bitmap(pypdfium2.PdfBitmap.from_pil(noise))
        drawn.set_matrix(pypdfium2.PdfMatrix().scale(612, 792))
        page.insert_obj(drawn)
        page.gen_content()
        page.close()
    pdf.save(path)


def ask_many(engine: Engine, scratch: Path) -> dict[str, Any]:
    path = scratch / "thousand.pdf"
    thousand_pages(path)
    options = Options(max_new_tokens=2, max_slice_nums=1)
    requests: Iterator[Request] = (Request(page, "What?", options=options) for page in Document(path).open())
    megabytes, began = [], time.monotonic()
    for number, ticket in enumerate(engine.submit_all(requests, ahead=4), 1):
        ticket.result()
        if number % 100 == 0:
            megabytes.append(round(resident() / 1e6, 1))
            print(number, megabytes[-1], flush=True)
    return {
        "pages": PAGES,
        "file MB": round(path.stat().st_size / 1e6, 1),
        "resident MB after each 100 pages": megabytes,
        "peak MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, 1),
        "seconds": round(time.monotonic() - began),
    }


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("files", "memory"), help="This alone; the other stays in --out as it is.")
    parser.add_argument("--folder", type=Path, help="Files to ask about, instead of OCRmyPDF's.")
    parser.add_argument("--pages", type=int, default=MOST_PAGES, help="Of each file, the first ones are asked about.")
    parser.add_argument("--out", type=Path)
    wanted = parser.parse_args()
    warnings.filterwarnings("ignore", module="PIL")
    told = json.loads(wanted.out.read_text(encoding="utf-8")) if wanted.out is not None and wanted.out.exists() else {}
    with tempfile.TemporaryDirectory() as scratch, mcv_runtime.load(threads=1, reuse=False, memory_mb=300) as engine:
        if wanted.part != "memory":
            told["files"] = ask_files(engine, wanted.folder or downloaded(Path(scratch)), wanted.pages)
        if wanted.part != "files":
            told["memory"] = ask_many(engine, Path(scratch))
    if wanted.out is not None:
        wanted.out.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
