"""The service under load: what clients wait for, what is lost, and whether anybody gets another answer than alone.

python benchmarks/load.py benchmarks/results/load-tiny.json [--bundle BUNDLE] [--minutes 5] [--clients 1 4 16]
python benchmarks/load.py RESULT --bundle BUNDLE --llama-server LLAMA_SERVER --gguf FOLDER    # after each run, theirs

A server in a process of its own, clients in this one, over the loopback. Every client asks about a picture that it has drawn
for itself, several questions one after the other, and then takes the next picture. The answers are greedy, and each is compared
with the one that an engine in this process gives to that question alone, afterwards. Measured are the time to the first text,
the gaps between pieces of text, answers and tokens a second, and the server's memory (VmRSS) every second. llama.cpp's server
(`Q4_0.gguf` and `mmproj-F16.gguf` as `peers/race.py` makes them) is asked the same by as many clients, right after ours; what
it answers is not judged.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from full_size import _cpu
from PIL import Image, ImageDraw

from mcv_runtime import load

QUESTIONS = ("What does the text say?", "Describe the picture.", "Which colour is the text?", "How many circles are there?")

Command = Callable[[int], list[str]]
"""What starts a server at a port."""


@dataclass
class Heard:
    """One answer, as a client saw it."""

    picture: int
    question: str
    text: str = ""
    first: float = 0.0
    """Seconds to the first of the text."""
    whole: float = 0.0
    """Seconds to its end."""
    step: float = 0.0
    """Seconds between two of its tokens where they were made, on the average."""
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
    heard = Heard(picture, question, again=again)
    async with client.stream("POST", "/v1/chat/completions", json=body(picture, question, tokens)) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            if timings := chunk.get("timings"):
                heard.step = timings["predicted_ms"] / 1e3 / max(timings["predicted_n"] - 1, 1)
            if usage := chunk.get("usage"):
                heard.tokens, heard.prompt = usage["completion_tokens"], usage["prompt_tokens"]
                heard.known = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
            for piece in (choice["delta"].get("content") for choice in chunk["choices"]):
                if piece:
                    now = time.perf_counter()
                    if heard.text:
                        heard.gaps.append(now - last)
                    else:
                        heard.first = now - begun
                    heard.text, last = heard.text + piece, now
    heard.whole = time.perf_counter() - begun
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


def wrong(runs: list[list[Heard]], bundle: Path | None, tokens: int, threads: int) -> list[list[dict[str, Any]]]:
    """By run, answers that are not those of an engine that is asked alone."""
    alone: dict[tuple[int, str], str] = {}
    with load(bundle, threads=threads) as engine:
        for one in itertools.chain.from_iterable(runs):
            key = one.picture, one.question
            if key not in alone:
                alone[key] = engine.ask(drawn(one.picture), one.question, max_new_tokens=tokens).text
    return [
        [
            {"picture": one.picture, "question": one.question, "said": one.text, "alone": alone[one.picture, one.question]}
            for one in heard
            if one.text != alone[one.picture, one.question]
        ]
        for heard in runs
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


def ours(port: int, *, bundle: Path | None, threads: int, memory_mb: float | None = None) -> list[str]:
    """Without `memory_mb`, what is kept for later may grow to a quarter of the machine."""
    given = [*([] if bundle is None else [str(bundle)]), *([] if memory_mb is None else ["--memory-mb", str(memory_mb)])]
    return [sys.executable, "-m", "mcv_serve.command", *given, "--port", str(port), "--threads", str(threads)]


def llama(port: int, *, binary: Path, folder: Path, threads: int, count: int) -> list[str]:
    """With a slot of 2,048 tokens for each client."""
    files = ["--model", str(folder / "Q4_0.gguf"), "--mmproj", str(folder / "mmproj-F16.gguf")]
    slots = ["--parallel", str(count), "--ctx-size", str(2048 * count)]
    return [str(binary), *files, *slots, "--port", str(port), "--threads", str(threads), "--chat-template", "chatml"]


@contextmanager
def serving(command_of: Command) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The server in a process of its own, and its address, from when it says that it is well until it has ended."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command, address = command_of(port), f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            while server.poll() is None:
                try:
                    if httpx.get(f"{address}/health", trust_env=False).status_code == 200:
                        break
                except httpx.TransportError:
                    pass
                time.sleep(0.1)
            else:
                raise SystemExit(f"{command[0]} ended with {server.returncode}")
            yield server, address
        finally:
            server.terminate()


def run(command_of: Command, count: int, minutes: float, tokens: int) -> tuple[list[Heard], dict[str, Any]]:
    """One server and so many clients: what they heard, and its sums."""
    with serving(command_of) as (server, address):
        heard, lost, memory, seconds = asyncio.run(clients(address, count, minutes * 60, tokens, server.pid))
    return heard, {
        "clients": count,
        "seconds": round(seconds, 1),
        "answers": len(heard),
        "lost": lost,
        "work": work(heard),
        "answers_per_s": round(len(heard) / seconds, 3),
        "tokens_per_s": round(sum(one.tokens for one in heard) / seconds, 2),
        "first_text_ms": percentiles([one.first for one in heard if not one.again and one.text]),
        "first_text_known_picture_ms": percentiles([one.first for one in heard if one.again and one.text]),
        "step_ms": percentiles([one.step for one in heard]),
        "between_pieces_ms": percentiles([gap for one in heard for gap in one.gaps]),
        "answer_ms": percentiles([one.whole for one in heard if not one.again]),
        "answer_known_picture_ms": percentiles([one.whole for one in heard if one.again]),
        "rss_mb": {"first": round(memory[0] / 1e6, 1), "last": round(memory[-1] / 1e6, 1), "most": round(max(memory) / 1e6, 1)},
        "rss_growth_in_last_half": flat(memory),
        "exit_code": server.returncode,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--memory-mb", type=float, help="As mcv-serve's: to see memory when it is full.")
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's, to compare with.")
    parser.add_argument("--gguf", type=Path, help="The folder of its two files.")
    given = parser.parse_args()
    if (given.llama_server is None) != (given.gguf is None):
        parser.error("--llama-server and --gguf go together")
    runs, theirs, heards = [], [], []
    for count in given.clients:
        command = partial(ours, bundle=given.bundle, threads=given.threads, memory_mb=given.memory_mb)
        heard, found = run(command, count, given.minutes, given.tokens)
        heards.append(heard)
        runs.append(found)
        print(json.dumps(found), file=sys.stderr)
        if given.llama_server is not None:
            command = partial(llama, binary=given.llama_server, folder=given.gguf, threads=given.threads, count=count)
            theirs.append(run(command, count, given.minutes, given.tokens)[1])
            print(json.dumps({"llama-server": theirs[-1]}), file=sys.stderr)
    load_average = os.getloadavg()
    for found, false in zip(runs, wrong(heards, given.bundle, given.tokens, given.threads), strict=True):
        found |= {"wrong": len(false), "examples_of_wrong": false[:3]}
    base = runs[0]["tokens_per_s"] or 1.0
    result: dict[str, Any] = {
        "cpu": _cpu(),
        "load_average_at_end": load_average,
        "bundle": "models/tiny" if given.bundle is None else given.bundle.name,
        "memory_mb": given.memory_mb,
        "runs": runs,
        "tokens_per_s_against_first": {str(one["clients"]): round(one["tokens_per_s"] / base, 2) for one in runs},
    }
    if theirs:
        result["llama_server"] = theirs
        result["tokens_per_s_against_llama_server"] = {
            str(one["clients"]): round(one["tokens_per_s"] / their["tokens_per_s"], 2) if their["tokens_per_s"] else None
            for one, their in zip(runs, theirs, strict=True)
        }
    given.result.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
