"""This project in the race: bundles by `mcv-export build`, in the environment that runs the race."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import protocol

RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "block 32": {"graphs": {"decoder_with_past": {"block_size": 32, "method": "rtn"}}},
    "pictures fp32": {"graphs": {"*": {"precision": "fp32"}, "decoder_with_past": {"precision": "q4"}}},
}
"""Builds that take part, by what they are called; the last is what OpenVINO reads."""


def bundle(settings: dict[str, Any]) -> Path:
    return Path(settings["folder"]) / settings["variant"].replace(" ", "-")


def prepare(settings: dict[str, Any]) -> None:
    out = bundle(settings)
    if not (out / "mcv.json").exists():
        recipe = out.with_suffix(".recipe.json")
        recipe.write_text(json.dumps(RECIPES[settings["variant"]]), encoding="utf-8")
        command = [sys.executable, "-c", "from mcv_export.cli import main; main()", "build", settings["checkpoint"], str(out)]
        done = subprocess.run([*command, "--recipe", str(recipe), "--json"], stdout=subprocess.DEVNULL)
        if done.returncode:
            sys.exit(done.returncode)  # the command has said why
    kept = out.with_suffix(".slice.npz")
    if settings["variant"] == "pictures fp32" and not kept.exists():
        keep_slice(settings, kept)


def keep_slice(settings: dict[str, Any], out: Path) -> None:
    """Keep what one slice feeds to the graphs, for peers that run them without this project."""
    fed: dict[str, Any] = {}

    def recording(path: Path, options: Any) -> Any:
        from mcv_runtime.sessions.graphs import cpu_session

        session = cpu_session(path, options)

        class Recording:
            def run(self, names: Any, feed: dict[str, Any]) -> Any:
                fed.update(feed)
                return session.run(names, feed)

        return Recording()

    peer = Mcv(settings, recording)
    peer.look()
    np.savez(out, **fed)


class Mcv:
    def __init__(self, settings: dict[str, Any], towers: Any = None) -> None:
        from mcv_runtime.bundle.folder import Bundle
        from mcv_runtime.decoding.decoder import Decoder
        from mcv_runtime.pictures.picture import slice_picture
        from mcv_runtime.sessions.graphs import GraphSessions, cpu_session, session_options
        from mcv_runtime.sessions.providers import tower_session
        from mcv_runtime.vision.encoder import VisionEncoder
        from mcv_runtime.vision.picture_cache import PictureCache

        opened = Bundle.open(bundle(settings))
        manifest = opened.manifest
        towers = towers or tower_session(settings["provider"])
        sessions = GraphSessions(opened, session_options(settings["threads"]), cpu_session, towers)
        self._decoder = Decoder(sessions, manifest)
        self._encoder = VisionEncoder(sessions, manifest, cache=PictureCache(0), batch_slices=1)
        pixels = np.random.default_rng(0).integers(0, 255, (448, 448, 3), np.uint8)
        self._picture = slice_picture(pixels, manifest.image, max_slice_nums=1)
        self.vocabulary = manifest.text.vocab_size
        self._slots: Any = None

    def restart(self) -> None:
        if self._slots is not None:
            self._slots.close()
        self._slots = self._decoder.new_slots()
        self._row = self._decoder.new_row(self._slots, protocol.ROOM)

    def read(self, ids: list[int]) -> None:
        self._decoder.read(self._slots, self._row, ids)

    def step(self, token: int) -> None:
        self._decoder.step(self._slots, [self._row], [token])

    def look(self) -> None:
        self._encoder.encode([self._picture])


def cold(settings: dict[str, Any]) -> None:
    from mcv_runtime import load

    engine = load(bundle(settings), threads=settings["threads"], tuned=False, provider=settings["provider"])
    question = "Tell me more. " * 8 if settings["picture"] is None else "What is this?"
    engine.ask(settings["picture"], question, max_new_tokens=1)


if __name__ == "__main__":
    protocol.main(Mcv, prepare, cold)
