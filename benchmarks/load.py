"""The service under load: what clients wait for, what is lost, and whether anybody gets another answer than alone.

python benchmarks/load.py benchmarks/results/load-tiny.json [--bundle BUNDLE] [--minutes 5] [--clients 1 4 16]

A server in a process of its own, clients in this one, over the loopback. Every client asks about a picture that it has drawn
for itself, several questions one after the other, and then takes the next picture. The answers are greedy, and each is compared
with the one that an engine in this process gives to that question alone, afterwards. Measured are the time to the first text,
the gaps between pieces of text, answers and tokens a second, and the server's memory (VmRSS) every second.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from full_size import _cpu
from PIL import Image, ImageDraw

from mcv_runtime import load

QUESTIONS = ("What does the text say?", "Describe the picture.", "Which colour is the text?", "How many circles are there?")


@dataclass
class Heard:
    """One answer, as a client saw it."""

    picture: int
    question: str
    text: str
    first: float
    """Seconds to the first of the text."""
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt: int = 0
    """Tokens, of which so many were known:"""
    known: int = 0
    again: bool = False
    """Whether the picture had been asked about before."""


def drawn(number: int) -> bytes:
    """The picture of that number: a word and a circle."""
    random = np.random.default_rng(number)
    image = Image.new("RGB", (112, 112), tuple(map(int, random.integers(200, 256, 3))))
    draw = ImageDraw.Draw(image)
    word = "".join(random.choice(list("ABCDEFGHIJKLMNOPRSTUVW"), 4))
    draw.text((12, 8), word, fill=tuple(map(int, random.integers(0, 120, 3))), font_size=20)
    x, y = map(int, random.integers(30, 70, 2))
    draw.ellipse((x, y + 10, x + 30, y + 40), fill=tuple(map(int, random.integers(0, 200, 3))))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def body(picture: int, question: str, tokens: int) -> dict[str, Any]:
    url = "data:image/png;base64," + base64.b64encode(drawn(picture)).decode()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": parts}], "stream": True, "max_tokens": tokens, "temperature": 0,
            "stream_options": {"include_usage": True}}  # fmt: skip


async def ask(client: httpx.AsyncClient, picture: int, question: str, tokens: int, again: bool) -> Heard:
    begun = last = time.perf_counter()
    heard = Heard(picture, question, "", 0.0, again=again)
    async with client.stream("POST", "/v1/chat/completions", json=body(picture, question, tokens)) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            if usage := chunk.get("usage"):
                heard.tokens, heard.prompt = usage["completion_tokens"], usage["prompt_tokens"]
                heard.known = usage["prompt_tokens_details"]["cached_tokens"]
            for piece in (choice["delta"].get("content") for choice in chunk["choices"]):
                if piece:
                    now = time.perf_counter()
                    if heard.text:
                        heard.gaps.append(now - last)
                    else:
                        heard.first = now - begun
                    heard.text, last = heard.text + piece, now
    return heard


async def clients(address: str, count: int, seconds: float, tokens: int, pid: int) -> tuple[list[Heard], int, list[int], float]:
    """What so many clients hear, how many answers were lost, the server's memory, and how long it took."""
    heard: list[Heard] = []
    lost, memory = 0, []
    begun = time.perf_counter()
    until = begun + seconds

    async def one(number: int, client: httpx.AsyncClient) -> None:
        nonlocal lost
        picture = 1_000_000 * number
        while time.perf_counter() < until:
            for at, question in enumerate(QUESTIONS):
                try:
                    heard.append(await ask(client, picture, question, tokens, at > 0))
                except Exception as error:
                    print(f"lost: {type(error).__name__}: {error}", file=sys.stderr)
                    lost += 1
                if time.perf_counter() >= until:
                    return
            picture += 1

    async def watch() -> None:
        while True:
            memory.append(rss(pid))
            await asyncio.sleep(1)

    async with httpx.AsyncClient(base_url=address, timeout=600, trust_env=False) as client:
        watching = asyncio.create_task(watch())
        await asyncio.gather(*(one(number, client) for number in range(count)))
        watching.cancel()
    return heard, lost, memory, time.perf_counter() - begun


def rss(pid: int) -> int:
    """Bytes of a process in memory."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) * 1024  # type: ignore[index]


def percentiles(values: list[float]) -> dict[str, float]:
    """In milliseconds."""
    if not values:
        return {}
    return {f"p{p}": round(float(np.percentile(values, p)) * 1e3, 2) for p in (50, 95, 99)}


def flat(memory: list[int]) -> float:
    """How much more memory the last quarter of the time took than the one before it: a fraction."""
    half = memory[len(memory) // 2 :]
    earlier, later = half[: len(half) // 2], half[len(half) // 2 :]
    return round(float(np.mean(later) / np.mean(earlier)) - 1, 4) if earlier and later else 0.0


def wrong(heard: list[Heard], bundle: Path | None, tokens: int, threads: int) -> list[dict[str, Any]]:
    """Answers that are not those of an engine that is asked alone."""
    alone: dict[tuple[int, str], str] = {}
    with load(bundle, threads=threads) as engine:
        for one in heard:
            key = one.picture, one.question
            if key not in alone:
                alone[key] = engine.ask(drawn(one.picture), one.question, max_new_tokens=tokens).text
    return [
        {"picture": one.picture, "question": one.question, "said": one.text, "alone": alone[one.picture, one.question]}
        for one in heard
        if one.text != alone[one.picture, one.question]
    ]


def _middle(tokens: list[int]) -> int:
    return round(float(np.median(tokens))) if tokens else 0


def work(heard: list[Heard]) -> dict[str, Any]:
    """What was asked, in medians: for a simulation of the same."""
    new, again = ([one for one in heard if one.again == known] for known in (False, True))
    return {
        "slices": 1,  # as small as the pictures are
        "prompt": _middle([one.prompt for one in new]),
        "prompt_again": _middle([one.prompt for one in again]),
        "known_again": _middle([one.known for one in again]),
        "questions": len(QUESTIONS),
        "lengths": dict(sorted(Counter(one.tokens for one in heard).items())),
    }


def run(bundle: Path | None, count: int, minutes: float, tokens: int, threads: int) -> dict[str, Any]:
    """One server and so many clients."""
    named = [] if bundle is None else [str(bundle)]
    command = [sys.executable, "-m", "mcv_serve.command", *named, "--port", "0", "--threads", str(threads)]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        address = ""
        for line in server.stderr:
            if found := re.search(r"running on (http://\S+)", line):
                address = found[1]
            if "is ready" in line:
                break
        heard, lost, memory, seconds = asyncio.run(clients(address, count, minutes * 60, tokens, server.pid))
    finally:
        server.terminate()
        code = server.wait()
    false = wrong(heard, bundle, tokens, threads)
    return {
        "clients": count,
        "seconds": round(seconds, 1),
        "answers": len(heard),
        "lost": lost,
        "wrong": len(false),
        "examples_of_wrong": false[:3],
        "work": work(heard),
        "answers_per_s": round(len(heard) / seconds, 3),
        "tokens_per_s": round(sum(one.tokens for one in heard) / seconds, 2),
        "first_text_ms": percentiles([one.first for one in heard if not one.again and one.text]),
        "first_text_known_picture_ms": percentiles([one.first for one in heard if one.again and one.text]),
        "between_pieces_ms": percentiles([gap for one in heard for gap in one.gaps]),
        "rss_mb": {"first": round(memory[0] / 1e6, 1), "last": round(memory[-1] / 1e6, 1), "most": round(max(memory) / 1e6, 1)},
        "rss_growth_in_last_half": flat(memory),
        "exit_code": code,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    runs = []
    for count in given.clients:
        runs.append(run(given.bundle, count, given.minutes, given.tokens, given.threads))
        print(json.dumps(runs[-1]), file=sys.stderr)
    base = runs[0]["tokens_per_s"] or 1.0
    result = {
        "cpu": _cpu(),
        "load_average_at_end": os.getloadavg(),
        "bundle": "models/tiny" if given.bundle is None else given.bundle.name,
        "runs": runs,
        "tokens_per_s_against_first": {str(one["clients"]): round(one["tokens_per_s"] / base, 2) for one in runs},
    }
    given.result.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
