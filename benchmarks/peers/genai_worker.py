"""onnxruntime-genai in the race: the decoder by its own builder in int4, run by its own generator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_decoder
import numpy as np
import onnxruntime_genai as genai
import protocol
from shapes import Shape


def prepare(settings: dict[str, Any]) -> None:
    checkpoint = Path(settings["checkpoint"])
    shape, folder = Shape.of(checkpoint), Path(settings["folder"])
    if shape.decoder == "qwen3_5":
        raise RuntimeError("its builder takes this decoder only inside a Qwen3.5 picture model")
    out = folder / "int4"
    if (out / "genai_config.json").exists():
        return
    source = hf_decoder.save(shape, checkpoint, folder / "hf")
    part = folder / "int4.part"
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(part)]
    done = subprocess.run([*builder, "-p", "int4", "-e", "cpu", "-c", str(folder / "hub")], stdout=sys.stderr)
    if done.returncode:
        sys.exit(done.returncode)  # the builder has said why
    part.rename(out)


class GenAi:
    def __init__(self, settings: dict[str, Any]) -> None:
        config = genai.Config(str(Path(settings["folder"]) / "int4"))
        threads = {"session_options": {"intra_op_num_threads": settings["threads"]}}
        config.overlay(json.dumps({"model": {"decoder": threads}}))
        self._model = genai.Model(config)
        self.vocabulary = Shape.of(settings["checkpoint"]).vocab
        self._generator: Any = None

    def restart(self) -> None:
        params = genai.GeneratorParams(self._model)
        params.set_search_options(max_length=protocol.ROOM, do_sample=False)
        self._generator = genai.Generator(self._model, params)

    def read(self, ids: list[int]) -> None:
        self._generator.append_tokens(np.array([ids], np.int32))
        self._generator.get_logits()

    def step(self, token: int) -> None:
        self.read([token])


def cold(settings: dict[str, Any]) -> None:
    peer = GenAi(settings)
    peer.restart()
    peer.read(protocol.tokens(protocol.COLD_PROMPT, peer.vocabulary))


if __name__ == "__main__":
    protocol.main(GenAi, prepare, cold)
