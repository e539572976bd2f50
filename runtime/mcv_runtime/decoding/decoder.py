"""Run the decoder's graph on rows of its memory: a piece of a prompt for one row, or a token for each of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mcv_runtime.bundle.manifest import GraphName, Manifest
from mcv_runtime.decoding.arena import RESULT, ArenaFactory, HostArena
from mcv_runtime.decoding.row import Row
from mcv_runtime.decoding.slots import Slots
from mcv_runtime.errors import OptionError
from mcv_runtime.pictures.picture import Picture
from mcv_runtime.sessions.graphs import Session, feed

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Decoder:
    """A decoder graph, by default `decoder_with_past`, and how it is fed; the rows are in `Slots`, one thread at a time."""

    def __init__(
        self, session: Callable[[GraphName], Session], manifest: Manifest, graph: GraphName = "decoder_with_past"
    ) -> None:
        """`session` gives the graph's session, as it is at the moment."""
        self._session, self._graph = session, graph
        inputs = manifest.graphs[graph].inputs
        # the same tensors for every decoder graph, but not of the same type
        self._entries = tuple(replace(entry, dtype=inputs[entry.input].dtype) for entry in manifest.cache)
        self._hidden, self.vocabulary = manifest.hidden_size, manifest.text.vocab_size
        self._context = manifest.text.context_length
        self._axes = 4 if manifest.text.positions == "canvas" else 1
        cached = {entry.input for entry in manifest.cache}
        self._fed = {name: spec for name, spec in inputs.items() if name not in cached}

    def new_slots(self, limit: int = 1 << 62, keep_limit: int = 0, arena: ArenaFactory = HostArena) -> Slots:
        """A memory for rows of this decoder, of up to `limit` bytes, `keep_limit` of them for rows that nobody uses."""
        return Slots(self._entries, self._context, self._axes, limit=limit, keep_limit=keep_limit, arena=arena)

    def new_row(self, slots: Slots, tokens: int) -> Row:
        """A row of its own that holds nothing yet, with room for so many tokens."""
        row = slots.admit(np.empty((self._axes, 0), np.int64), tokens, 1)
        if row is None:
            raise OptionError(f"there is no room for {tokens:,} tokens")
        return row

    def visual_tokens(self, pictures: Sequence[Picture]) -> NDArray[np.float32]:
        """Visual tokens of all pictures, [visual, hidden]."""
        return np.concatenate([np.empty((0, self._hidden), np.float32), *(picture.embeds for picture in pictures)])

    def read(
        self,
        slots: Slots,
        row: Row,
        ids: Sequence[int] | NDArray[np.int64],
        vision_embeds: NDArray[np.float32] | None = None,
        vision_positions: NDArray[np.int64] | None = None,
        *,
        keys: NDArray[np.int64] | None = None,
        wanted: Sequence[int] = (-1,),
    ) -> NDArray[np.float32]:
        """Read more tokens of one row; logits [wanted, vocab] of what follows those at the places `wanted`.

        The embeddings at the ascending `vision_positions` are replaced by `vision_embeds` [visual, hidden]. `keys` are what the
        tokens are remembered by (`prompt_keys`), with their positions where those are not one after the other; None: by ids,
        behind the tokens before them.
        """
        assert row.slot is not None
        given = np.asarray(ids, np.int64)
        if keys is None:
            keys = self._following(row, given)
        positions = keys[1:] if len(keys) > 1 else np.arange(row.length, row.length + len(given))
        logits = self._run(
            slots,
            [row],
            given[None],
            positions[..., None, :],
            np.empty((0, self._hidden), np.float32) if vision_embeds is None else vision_embeds,
            np.empty(0, np.int64) if vision_positions is None else vision_positions,
            [place % len(given) for place in wanted],
        )
        slots.ran(row, keys)
        return logits

    def step(self, slots: Slots, rows: Sequence[Row], tokens: Sequence[int]) -> NDArray[np.float32]:
        """Read one more token of each row; logits [rows, vocab] of what follows. The rows are a group of `Slots.ranges`."""
        positions = np.array([[row.next_position] for row in rows], np.int64)
        ids = np.array(tokens, np.int64)[:, None]
        none = np.empty((0, self._hidden), np.float32), np.empty(0, np.int64)
        logits = self._run(slots, rows, ids, positions, *none, range(len(rows)))
        for row, token in zip(rows, ids, strict=True):
            slots.ran(row, self._following(row, token))
        return logits

    def _following(self, row: Row, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Keys of text behind what a row holds."""
        places = row.next_position + np.arange(len(ids))
        return np.vstack([ids, *[places] * (self._axes - 1)])

    def _run(
        self,
        slots: Slots,
        rows: Sequence[Row],
        ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        vision_embeds: NDArray[np.float32],
        vision_positions: NDArray[np.int64],
        logit_positions: Sequence[int],
    ) -> NDArray[np.float32]:
        """ids [rows, T], positions [rows, T] or [3, rows, T]; where it raises, rows may be broken."""
        totals = np.array([row.length for row in rows], np.int64) + ids.shape[1]
        total, capacity = int(totals.max()), slots.arena.capacity
        if total > capacity:
            raise OptionError(f"a row holds {capacity} tokens, {total} are needed")
        values = {
            "input_ids": ids,
            "vision_embeds": vision_embeds,
            "vision_positions": vision_positions,
            "position_ids": self._position_ids(positions),
            "logit_positions": np.array(logit_positions, np.int64),
            "seqlens_k": totals - 1,
            "total_sequence_length": np.full([1] * len(self._fed["total_sequence_length"].shape), total),
        }
        session, first = self._session(self._graph), rows[0].slot
        assert first is not None
        slots.runs(rows)
        binding = slots.arena.binding(session, first, first + len(rows))
        for name, value in feed(self._fed, values).items():
            binding.bind_cpu_input(name, value)
        binding.bind_output(RESULT, "cpu")  # anew: else the next run writes into the last result, whatever its shape
        session.run_with_iobinding(binding)
        outputs = binding.get_outputs_as_ortvaluevector()  # owns the memory of the array below, so that is copied
        logits: NDArray[np.float32] = outputs[0].numpy().copy()
        return logits

    def _position_ids(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """[rows, T], or [axes, rows, T] where the graph wants it: text has the same position on every axis."""
        axes = self._fed["position_ids"].shape[:-2] if "position_ids" in self._fed else ()
        return np.broadcast_to(positions, (*axes, *positions.shape[-2:]))  # type: ignore[arg-type]
