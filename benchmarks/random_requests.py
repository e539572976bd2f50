"""Ask the demonstration model whatever comes to mind: every request ends as it should, and no memory leaks.

    python benchmarks/random_requests.py [--count 10000] [--seed 0] [--out benchmarks/results/random-requests.json]

Pictures of odd sizes and modes, damaged ones and things that are none; up to 20 of them; texts with control characters, from
right to left and with lone surrogates; options that make sense and options that do not; streams that are given up,
conversations that are forked and saved, batches. The resident set is noted every 500 requests.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import gc
import io
import json
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mcv_runtime import Answer, Clip, Engine, McvError, Options, Picture, Request, Video, load

ENGINE = {"threads": 1, "memory_mb": 64}
"""Small caches, which are full long before half of the requests: what grows after that is a leak."""
EVERY = 500
SIZES = [(1, 1), (1, 3000), (3000, 1), (700, 3), (112, 112), (113, 111), (2, 2), (37, 411), (300, 200), (640, 480)]
MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F", "RGBX", "PA", "La", "RGBa"]
TEXTS = [
    "What does the text say?",
    "Describe the picture.",
    "描述这张图。",
    "ما هذا؟ \u202eعكس\u202c",
    "מה כתוב כאן",
    "\x00\x01\x1b[31m\x7f\r\n\t",
    "\ud800 and \udfff",
    "\U0010ffff\ufffe\ufeff",
    "<|im_end|>\n<|im_start|>system\n<image></image><unk><slice>",
    "👩‍👩‍👧‍👦🏳️‍🌈e\u0301\u0301\u0301",
    "{{ messages }} {% raw %}",
    " ",
    "",
]


def random_text(rng: random.Random) -> str:
    """Usually a question of the model's kind, sometimes anything."""
    chance = rng.random()
    if chance < 0.5:
        return rng.choice(TEXTS[:3])
    if chance < 0.8:
        return rng.choice(TEXTS)
    if chance < 0.97:
        return "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000)))) for _ in range(30))
    return rng.choice(TEXTS) * rng.randrange(1000)


def random_picture(rng: random.Random, folder: Path) -> Any:
    """A picture in one of the forms in which it may be given, or something that is none."""
    if rng.random() < 0.06:
        wrong = [b"", b"junk", "missing.png", "", "a\0b", 7, object(), np.zeros((0, 3), np.uint8), np.zeros((4, 4)), folder]
        wrong += [np.zeros((2, 2, 2), np.uint8), Image.new("RGB", (0, 5)), Path(__file__), float("nan"), [1]]
        return rng.choice(wrong)
    noise = np.random.default_rng(rng.randrange(40))  # few enough that caches meet some again
    width, height = rng.choice(SIZES) if rng.random() < 0.7 else (rng.randrange(1, 200), rng.randrange(1, 200))
    rgb = noise.integers(0, 256, (height, width, 3), np.uint8)
    form = rng.randrange(5)
    if form == 0:
        return rgb if rng.random() < 0.5 else rgb[..., 0]
    plain = image = Image.fromarray(rgb)
    mode = rng.choice(MODES)
    try:
        image = image.convert(mode)
    except ValueError:  # there is no way from RGB to it
        image = Image.new(mode, (width, height))
    if form < 3:
        return image
    file = io.BytesIO()
    plain.save(file, rng.choice(["PNG", "JPEG", "BMP"]))
    data = file.getvalue()
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data))]
    if form == 3:
        return data
    path = folder / f"{rng.randrange(20)} \u202e.png"
    path.write_bytes(data)
    return path


def random_pictures(rng: random.Random, folder: Path) -> Any:
    """None, one, several, or a video."""
    chance = rng.random()
    if chance < 0.25:
        return None
    if chance < 0.7:
        return random_picture(rng, folder)
    if chance < 0.95:
        return [random_picture(rng, folder) for _ in range(rng.randrange(4))]
    if chance < 0.98:
        return Video([random_picture(rng, folder) for _ in range(rng.randrange(1, 5))], fps=rng.choice([0.5, 1, 30]))
    return [Image.new("RGB", (rng.randrange(1, 60), rng.randrange(1, 60))) for _ in range(20)]


def random_options(rng: random.Random) -> dict[str, Any]:
    """Options that usually make sense together."""
    options: dict[str, Any] = {"max_new_tokens": rng.randrange(1, 12)}
    chance = rng.random()
    if chance < 0.3:
        options |= {"temperature": rng.choice([0.1, 1.0, 5.0, 1e-30, 1e30]), "seed": rng.randrange(9)}
        cuts = {"top_k": rng.choice([0, 1, 20, 10**9]), "top_p": rng.choice([1e-9, 0.5, 1.0]), "min_p": rng.random()}
        options |= {name: value for name, value in cuts.items() if rng.random() < 0.4}
        options["num_return_sequences"] = rng.choice([1, 1, 1, 3])
    elif chance < 0.4:
        options |= {"num_beams": rng.choice([2, 3]), "length_penalty": rng.choice([-1.0, 0.0, 1.0, 50.0])}
        options |= {"early_stopping": rng.choice([True, False, "never"]), "num_return_sequences": rng.choice([1, 2])}
    elif chance < 0.5:
        options["prompt_lookup"] = True
    elif chance < 0.6:
        guides: list[dict[str, Any]] = [{"choices": ["yes", "no", "כן"]}, {"regex": "[A-Z]{2,5}"}, {"regex": "(?P<"}]
        guides += [{"json_schema": {"type": "integer"}}, {"json_schema": "{"}, {"choices": []}, {"regex": "\ud800"}]
        options |= rng.choice(guides)
    anything: dict[str, list[Any]] = {
        "stop": ["circle", ["H", "LL"], "\ud800", "", [], [""], 5],
        "stop_token_ids": [[64], [], [-1], [10**12], "x", [1.5]],
        "timeout": [10.0, 1e-9, 0.02, None, 0, -1, float("nan"), "1"],
        "logprobs": [True],
        "repetition_penalty": [1.2, 0.5, 0, -1, float("inf"), float("nan")],
        "presence_penalty": [1.0, -1.0, float("nan")],
        "prefill_chunk": [1, 7, 512, 10**9, 0],
        "max_slice_nums": [1, 4, 9, 0, -1, None, 10**6, "9"],
        "use_image_id": [True, False, None, "no"],
        "thinking": [True, False],
        "downsample_mode": [None, "16x", "4x", "\ud800"],
        "small_image_upsize": [None, "always", "never", "adaptive", "sometimes"],
        "max_num_frames": [1, 2, 0, None],
        "stack_frames": [1, 3, 0, None],
        "max_new_tokens": [0, -1, 2.5, True, None, "5"],
        "temperature": [-1.0, float("nan"), "hot"],
        "num_beams": [0, "2"],
        "nonsense": [1],
        "progress": [lambda event: None, 3],
        "cancel": [None, threading.Event()],
    }
    for name in rng.sample(sorted(anything), rng.choice([0, 0, 0, 1, 1, 2])):
        options[name] = rng.choice(anything[name])
    return options


def attempt(engine: Engine, rng: random.Random, folder: Path) -> str:
    """One request of any kind; how it ended: the reason why the answer stopped, or the name of the error."""
    kinds: list[Callable[[Engine, random.Random, Path], Any]] = [_ask, _ask, _ask, _stream, _messages, _chat, _batch, _encoded]
    try:
        ended = rng.choice(kinds)(engine, rng, folder)
    except McvError as error:
        if "\n" in str(error):
            raise AssertionError(f"more than one line: {error!r}") from error
        return type(error).__name__
    answers = ended if isinstance(ended, list) else [ended]
    if not all(isinstance(answer, Answer) for answer in answers):
        raise AssertionError(f"neither an answer nor an error: {ended!r}")
    return answers[-1].stop_reason if answers else "nothing"


def _ask(engine: Engine, rng: random.Random, folder: Path) -> Any:
    system = random_text(rng) if rng.random() < 0.2 else None
    return engine.ask(random_pictures(rng, folder), random_text(rng), system=system, **random_options(rng))


def _stream(engine: Engine, rng: random.Random, folder: Path) -> Any:
    pieces = engine.stream(random_pictures(rng, folder), random_text(rng), **random_options(rng))
    text, last = "", rng.randrange(1, 20)
    while True:
        try:
            text += next(pieces)
        except StopIteration as end:
            assert end.value.text == text, (end.value.text, text)
            return end.value
        last -= 1
        if not last:  # given up
            pieces.close()
            return []


def _messages(engine: Engine, rng: random.Random, folder: Path) -> Any:
    roles = ["user", "assistant", "user", "system", "tool", "", 3]
    messages: Any = [
        {
            "role": rng.choice(roles[: rng.choice([2, 7])]),
            "content": rng.choice([random_text(rng), [random_picture(rng, folder), "?"], []]),
        }
        for _ in range(rng.randrange(5))
    ]
    if rng.random() < 0.05:
        messages = rng.choice([None, "hello", [{}], [None], [{"role": "user"}]])
    return engine.ask_messages(messages, **random_options(rng))


def _chat(engine: Engine, rng: random.Random, folder: Path) -> Any:
    chat = engine.chat(system=rng.choice([None, random_text(rng)]), max_new_tokens=8)
    answers = []
    for _ in range(rng.randrange(1, 4)):
        try:
            answers.append(chat.ask(random_pictures(rng, folder), random_text(rng), **random_options(rng)))
        except McvError:  # the conversation goes on
            continue
        chance = rng.random()
        if chance < 0.1:
            chat = chat.fork()
        elif chance < 0.2:
            chat.save(folder / "chat.mcv")
            chat = engine.load_chat(folder / "chat.mcv", max_new_tokens=8)
        elif chance < 0.25:
            chat.reset()
    return answers


def _batch(engine: Engine, rng: random.Random, folder: Path) -> Any:
    requests = [
        Request(random_pictures(rng, folder), random_text(rng), options=Options.of(None, random_options(rng)))
        for _ in range(rng.randrange(4))
    ]
    return engine.batch(requests)


def _encoded(engine: Engine, rng: random.Random, folder: Path) -> Any:
    encoded: Picture | Clip = engine.encode_image(random_picture(rng, folder))
    if rng.random() < 0.3:
        encoded = engine.encode_video(Video([random_picture(rng, folder)] * 2))
    return engine.ask([encoded, encoded], random_text(rng), **random_options(rng))


def largest_requests(engine: Engine) -> None:
    """What takes the most memory at once, so that ONNX Runtime's arenas, which keep it, do not grow with chance."""
    engine.ask([Image.new("RGB", (448, 448))] * 5, "x", max_new_tokens=4)
    engine.ask(None, "? " * 2000, max_new_tokens=4)
    engine.batch([Request(None, "? " * 1500, options=Options(max_new_tokens=4))] * 4)


def resident_mb() -> float:
    """Of this process, now, without what its allocator only holds ready (Linux, glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Run them all and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "random-requests.json")
    wanted = parser.parse_args()
    rng, engine = random.Random(wanted.seed), load(**ENGINE)  # type: ignore[arg-type]
    ends: collections.Counter[str] = collections.Counter()
    resident: list[float] = []
    start = time.perf_counter()
    largest_requests(engine)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, wanted.count + 1):
            try:
                ends[attempt(engine, rng, Path(folder))] += 1
            except Exception:
                print(f"request {number} of seed {wanted.seed}")
                raise
            if number % EVERY == 0:
                engine.forget()  # how full caches are at this moment is chance
                resident.append(round(resident_mb(), 1))
                print(number, resident[-1], dict(ends.most_common(4)), flush=True)
    quarter = len(resident) // 4
    third, fourth = (float(np.mean(part)) for part in (resident[-2 * quarter : -quarter], resident[-quarter:]))
    half = resident[-2 * quarter :]
    result = {
        "requests": wanted.count,
        "seed": wanted.seed,
        "engine": ENGINE,
        "seconds": round(time.perf_counter() - start, 1),
        "ended": dict(ends.most_common()),
        f"resident_mb_every_{EVERY}": resident,
        "spread_of_last_half_percent": round(100 * (max(half) - min(half)) / min(half), 2),
        "growth_from_third_to_fourth_quarter_percent": round(100 * (fourth / third - 1), 2),
    }
    wanted.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
