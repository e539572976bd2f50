"""How models are asked to read a page out: the published prompts.

Source: OpenBMB's MiniCPM-V CookBook, `inference/minicpm-v4_5_ocr.md` (text) and `inference/minicpm-v4_5_pdf_parse.md`
(markdown); those for 4.0 are the same. `model.chat` of the published code answers with at most 2,048 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

ReadingForm = Literal["text", "markdown"]
PROMPTS: Final[Mapping[ReadingForm, str]] = {
    "text": "What is the text in the picture?",
    "markdown": """\
You are an OCR assistant. Your task is to identify and extract all visible text from the image provided. \
Preserve the original formatting as closely as possible, including:

- Line breaks and paragraphs  \n\
- Headings and subheadings  \n\
- Any tables, lists, bullet points, or numbered items  \n\
- Special characters, spacing, and alignment  \n\

Output strictly the extracted text in Markdown format, reflecting the layout and structure of the original image. \
Do not add commentary, interpretation, or summarization—only return the raw text content with its formatting.""",
}
LONGEST_PAGE: Final = 2048
"""Tokens of a page that is read out."""
PAGE_REPEAT_GUARD: Final = 256
"""Tokens that end a page that is read out if they say one thing over and over: more than a table has of empty rows."""


def read_as(form: ReadingForm) -> str:
    """The published prompt to read a page out as `text` or as `markdown`."""
    return PROMPTS[form]
