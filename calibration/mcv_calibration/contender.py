"""A bundle, or the checkpoint in its place, opened so that each graph's calls can be seen and repeated."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.manifest import GraphName, Manifest
from mcv_runtime.decoding.decoder import Decoder
from mcv_runtime.decoding.row import prompt_keys
from mcv_runtime.engine import Engine, load
from mcv_runtime.pictures.images import ImageSource
from mcv_runtime.pictures.picture import Picture
from mcv_runtime.sessions.graphs import Session, SessionFactory, cpu_session, session_options
from mcv_runtime.text.prompts import Prompt
from mcv_runtime.text.tokens import AnswerText, TextTokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

INT8_CACHE: GraphName = "decoder_with_past_kv8"
"""The decoder that keeps keys and values in 8 bits."""


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """What a graph was given, what it made of it (its first output), and how long that took."""

    graph: GraphName
    inputs: Mapping[str, NDArray[Any]]
    output: NDArray[Any]
    seconds: float


class WatchedSession:
    """A session that writes its calls down."""

    def __init__(self, graph: GraphName, session: Session, calls: list[Call]) -> None:
        self._graph, self._session, self._calls = graph, session, calls

    def run(self, output_names: list[str] | None, input_feed: dict[str, Any]) -> Any:
        started = time.perf_counter()
        result = self._session.run(output_names, input_feed)
        self._calls.append(Call(self._graph, input_feed, result[0], time.perf_counter() - started))
        return result

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_with_iobinding(self, iobinding: Any) -> None:
        self._session.run_with_iobinding(iobinding)


class Contender:
    """One side of a comparison. `timed`: its speed means something."""

    def __init__(
        self,
        folder: Path,
        *,
        name: str | None = None,
        threads: int | None = None,
        session_factory: SessionFactory = cpu_session,
        timed: bool = True,
    ) -> None:
        self._calls: list[Call] = []
        self._opened: dict[GraphName, WatchedSession] = {}
        self._factory, self._threads = session_factory, threads
        bundle = Bundle.open(folder)
        self._graphs = {bundle.graph(graph): graph for graph in bundle.manifest.graphs}
        self.answers: dict[bytes, tuple[int, ...]] = {}
        """Greedy answers that took long to find, by what identifies the question."""
        self.folder, self.name, self.timed = folder, name or folder.name, timed
        self.engine: Engine = load(folder, threads=threads, session_factory=self._open)

    @property
    def manifest(self) -> Manifest:
        return self.engine.bundle.manifest

    def encode(self, images: Sequence[ImageSource]) -> tuple[list[Picture], list[Call]]:
        """The pictures' visual tokens, and the calls of tower and compressor that made them."""
        self._calls.clear()
        pictures = [self.engine.encode_image(image) for image in images]
        calls = list(self._calls)
        self._calls.clear()
        return pictures, calls

    def run(self, graph: GraphName, inputs: Mapping[str, NDArray[Any]]) -> Call:
        """One graph on given inputs."""
        self._calls.clear()
        self._session(graph).run([next(iter(self.manifest.graphs[graph].outputs))], dict(inputs))
        return self._calls.pop()

    def decode_in_int8(self, prompt: Prompt, embeds: NDArray[np.float32], continuation: Sequence[int]) -> NDArray[np.float32]:
        """Logits [len(continuation), vocab] of what it expects in each token's place, from keys and values in 8 bits."""
        decoder = Decoder(self._session, self.manifest, INT8_CACHE)
        slots = decoder.new_slots()
        row = decoder.new_row(slots, len(prompt.ids) + len(continuation))
        found = [decoder.read(slots, row, prompt.ids, embeds, prompt.visual_positions, keys=prompt_keys(prompt))]
        if len(continuation) > 1:
            found.append(decoder.read(slots, row, continuation[:-1], wanted=range(len(continuation) - 1)))
        return np.concatenate(found)

    def text(self, tokens: Sequence[int]) -> str:
        """The answer that these tokens are, as the engine would give it."""
        manifest = self.manifest
        hidden = frozenset(manifest.generation.stop_token_ids).union(manifest.text.dropped_ids)
        text = AnswerText(TextTokenizer(self.engine.bundle.read_text(manifest.text.tokenizer)), hidden)
        for token in tokens:
            text.push(token)
        text.finish()
        return text.text

    def _session(self, graph: GraphName) -> WatchedSession:
        if graph not in self._opened:  # an engine may open its graphs when they are first needed
            self._open(self.engine.bundle.graph(graph), session_options(self._threads))
        return self._opened[graph]

    def _open(self, path: Path, options: ort.SessionOptions) -> Session:
        graph = self._graphs[path]
        return self._opened.setdefault(graph, WatchedSession(graph, self._factory(path, options), self._calls))
