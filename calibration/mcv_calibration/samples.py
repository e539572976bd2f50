"""What a model is calibrated with: pictures of the user's and questions about them, or a set drawn here."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from mcv_calibration.drawn import draw
from mcv_runtime.errors import ImageError, OptionError
from mcv_runtime.files import parse_json
from mcv_runtime.pictures.images import ImageSource, describe, open_picture

_T = TypeVar("_T")

QUESTIONS = (
    "Describe the picture in detail.",
    "图片里有什么？请详细描述。",
    "What is written here? Read all of it.",
    "请逐字读出图中的文字。",
    "How many objects are there, and what colours do they have?",
    "这张图的主要颜色和形状是什么？",
    "Summarise what the picture shows in one sentence.",
    "图中最重要的信息是什么？",
)
"""Asked in turn where no prompts are given."""
BESIDE = 8
"""Of the drawn ones, beside a user's: of most kinds, light and dark."""
NARROW = 32
"""Levels (of 255) that the values of a picture which shows something span, a few pixels left out."""
_FEW = 0.001
HELD_OUT = 4
"""Of a user's pictures every so many-th calibrates nothing, and measures."""
ENOUGH = 512
"""Next tokens that are compared where nobody said how many samples: of 300 that all agree, the share may still be 98.7 %."""
_DRAWN_AT_MOST = 64
_CALIBRATING, _MEASURING = 0, 1
"""Seeds of what is drawn here."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Pictures and a question about them; `answer` is the right one, if known. `overview`: pictures without finer detail."""

    images: tuple[ImageSource, ...]
    prompt: str
    answer: str | None = None
    overview: bool = False

    def digests(self) -> frozenset[str]:
        """One for each of its pictures, or for the question if it has none."""
        contents = [_content(image) for image in self.images] or [self.prompt.encode()]
        return frozenset(hashlib.sha256(content).hexdigest()[:16] for content in contents)


@dataclass(frozen=True, slots=True, eq=False)
class SampleSet:
    """Samples whose pictures can all be opened. `skipped` names what could not be used, with the reason.

    `enough`: next tokens after which a measurement leaves out the rest; None: all samples are used. `calibrated`: samples that
    are not among these because they calibrated what is measured.
    """

    samples: tuple[Sample, ...]
    skipped: tuple[str, ...]
    source: str
    enough: int | None = None
    calibrated: int = 0

    def parts(self) -> tuple[SampleSet, ...]:
        """A user's, and those drawn beside them."""
        both = (tuple(sample for sample in self.samples if sample.overview is drawn) for drawn in (False, True))
        return tuple(replace(self, samples=part) for part in both if part)

    def digests(self) -> frozenset[str]:
        """Of all pictures; a bundle remembers those that it was calibrated with."""
        return frozenset().union(*(sample.digests() for sample in self.samples))

    def content_hash(self) -> str:
        """Of the pictures' content and the texts; the same files in another folder have the same."""
        digest = hashlib.sha256()
        for sample in self.samples:
            texts = [sample.prompt, sample.answer]
            for content in (*(_content(image) for image in sample.images), json.dumps(texts).encode()):
                digest.update(hashlib.sha256(content).digest())
            digest.update(b"\0")
        return digest.hexdigest()

    def describe(self) -> str:
        """One line for a user."""
        text = f"{len(self.samples)} samples from {self.source}"
        return f"{text}, {len(self.skipped)} skipped ({'; '.join(self.skipped)})" if self.skipped else text


def builtin_samples(count: int = 32, seed: int = _CALIBRATING) -> SampleSet:
    """A set drawn by this package: photo-like scenes, textures, pages, charts, tables; the same for the same seed."""
    _check(count)
    samples = tuple(
        Sample((draw(number, seed),), QUESTIONS[(number + number // len(QUESTIONS)) % len(QUESTIONS)], overview=True)
        for number in range(count)
    )
    return SampleSet(samples, (), "the built-in pictures")


def folder_samples(folder: Path, prompts: Path | None = None, count: int = 32) -> SampleSet:
    """At most `count` samples of a folder's pictures, those of its subfolders too, spread over all of them.

    `prompts` is a .txt file of questions, one a line, asked in turn, or a .jsonl file of rows `{"image": path, "prompt": text}`
    (`"images": [path, ...]` for several; `"answer": text` where it is known); paths start at that file or at the folder.
    Samples without a picture that shows anything are left out. Raises `OptionError` where there is nothing to take, and
    `ImageError` if no picture can be opened or none shows anything.
    """
    _check(count)
    if not folder.is_dir():
        raise OptionError(f"{folder} is not a folder; give one with pictures like those the model will see")
    rows = _rows(prompts, folder) if prompts is not None and prompts.suffix == ".jsonl" else None
    if rows is None:
        questions = itertools.cycle(QUESTIONS if prompts is None else _lines(prompts))
        found = [path for path in sorted(folder.rglob("*")) if _is_picture(path.relative_to(folder)) and path.is_file()]
        if not found:
            raise OptionError(f"{folder} holds no pictures; put some there that are like those the model will see")
        candidates: Iterator[Sample] = (Sample((path,), "") for path in _spread(found, count))
    else:
        candidates = iter(_spread(rows, count))
    samples: list[Sample] = []
    skipped: list[str] = []
    empty: list[str] = []
    for sample in candidates:
        if len(samples) == count:
            break
        try:
            shows = max(tuple(_shows_something(image) for image in sample.images))  # all are opened
        except ImageError as error:
            skipped.append(str(error).removeprefix(f"{folder}/"))
            continue
        if shows:
            samples.append(sample if rows is not None else Sample(sample.images, next(questions)))
        else:
            empty.append(f"{describe(sample.images[0])} spans no more than {NARROW} of 256 levels".removeprefix(f"{folder}/"))
    if empty and not samples:
        raise ImageError(
            f"no picture in {folder} spans more than {NARROW} of 256 levels, from which no ranges can be told; add real ones"
        )
    if not samples:
        raise ImageError(f"{folder} holds no picture that can be opened ({skipped[0]}); put others there")
    # Many that show nothing would bury the extremes of the others, and find nothing wrong with any bundle.
    return SampleSet(tuple(samples), (*skipped, *empty), str(folder))


def measuring_samples(count: int | None = None) -> SampleSet:
    """Drawn like the built-in ones, but others: what those calibrated is measured on these."""
    drawn = builtin_samples(_DRAWN_AT_MOST if count is None else count, _MEASURING)
    return replace(drawn, enough=ENOUGH if count is None else None)


def calibrating_part(samples: SampleSet) -> SampleSet:
    """Without every fourth picture, which stays for measuring; of fewer than four pictures all are taken."""
    held_out: set[str] = set()
    seen: set[str] = set()
    for digest in dict.fromkeys(digest for sample in samples.samples for digest in sorted(sample.digests())):
        seen.add(digest)
        if len(seen) % HELD_OUT == 0:
            held_out.add(digest)
    kept = tuple(sample for sample in samples.samples if not held_out & sample.digests())
    return replace(samples, samples=kept) if kept else samples


def unseen(samples: SampleSet, calibrated: Collection[str]) -> SampleSet:
    """Those of which no picture calibrated what is measured, by its digest; if there are none, others that are drawn here.

    Where the rest calibrated, some drawn ones too: of pictures all alike, those held out would find nothing wrong.
    """
    kept = tuple(sample for sample in samples.samples if sample.digests().isdisjoint(calibrated))
    if len(kept) == len(samples.samples):
        return samples
    if kept:
        held_out = replace(samples, samples=kept, calibrated=len(samples.samples) - len(kept))
        return with_drawn(held_out, _MEASURING)
    drawn = measuring_samples()
    source = f"{drawn.source}, as all of {samples.source} calibrated"
    return replace(drawn, source=source, skipped=samples.skipped, calibrated=len(samples.samples))


def with_drawn(samples: SampleSet, seed: int = _CALIBRATING) -> SampleSet:
    """A user's samples, and in turn some of those drawn here: what holds for pictures all alike, dark ones say, may hold for no
    others."""
    drawn = builtin_samples(BESIDE, seed)
    pairs = itertools.zip_longest(samples.samples, drawn.samples)
    mixed = tuple(sample for pair in pairs for sample in pair if sample is not None)
    return replace(samples, samples=mixed, source=f"{samples.source} and {drawn.source}")


def _check(count: int) -> None:
    if count < 1:
        raise OptionError(f"the number of samples must be at least 1, not {count}")


def _is_picture(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.suffix.lower() in Image.registered_extensions()


def _shows_something(image: ImageSource) -> bool:
    """Whether it is more than noise around one tone."""
    reached = np.cumsum(np.reshape(open_picture(image).histogram(), (3, 256)), axis=1)
    few = _FEW * reached[:, -1:]
    return bool(((reached < reached[:, -1:] - few).sum(1) - (reached <= few).sum(1) > NARROW).any())


def _spread(items: Sequence[_T], count: int) -> list[_T]:
    """`count` items at even distances, then the others in order, to take the places of those that cannot be used."""
    if len(items) <= count:
        return list(items)
    chosen = dict.fromkeys(number * len(items) // count for number in range(count))
    return [items[number] for number in (*chosen, *(n for n in range(len(items)) if n not in chosen))]


def _lines(prompts: Path) -> list[str]:
    lines = [line.strip() for line in _read(prompts).splitlines() if line.strip()]
    if not lines:
        raise OptionError(f"{prompts} holds no question; write one a line")
    return lines


def _rows(prompts: Path, folder: Path) -> list[Sample]:
    """One sample for each row of a .jsonl file."""
    samples = []
    for number, line in enumerate(_read(prompts).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, "the row", error=ValueError)
            names = row["images"] if "images" in row else [row["image"]]
            prompt, answer = row["prompt"], row.get("answer")
        except (ValueError, KeyError, TypeError, AttributeError):
            names, prompt, answer = None, None, None
        texts = isinstance(prompt, str) and isinstance(answer, str | None)
        if not texts or not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise OptionError(f'line {number} of {prompts} is not {{"image": path, "prompt": text}} (answer: text, if known)')
        samples.append(Sample(tuple(_locate(name, prompts, folder) for name in names), prompt, answer))
    if not samples:
        raise OptionError(f'{prompts} is empty; write rows {{"image": path, "prompt": text}}')
    return samples


def _locate(name: str, prompts: Path, folder: Path) -> Path:
    beside = prompts.parent / name
    return beside if beside.exists() else folder / name


def _read(prompts: Path) -> str:
    try:
        return prompts.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise OptionError(f"{prompts} cannot be read: {reason}; give a .txt or .jsonl file") from None


def _content(image: ImageSource) -> bytes:
    """What a picture's hash is taken of."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, Image.Image | np.ndarray):
        array = np.asarray(image)
        return f"{describe(image)} {array.shape} {array.dtype}".encode() + array.tobytes()
    return Path(image).read_bytes()
