"""Run the tower and what compresses its output on slices of one size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from mcv_runtime.bundle.manifest import GraphName, GraphSpec, Manifest
from mcv_runtime.errors import BundleCorruptError
from mcv_runtime.pictures.patches import patch_slice
from mcv_runtime.sessions.graphs import Session, feed
from mcv_runtime.vision.patch_order import nested_order
from mcv_runtime.vision.slice_batches import Cell

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Tower:
    """From pixels to visual tokens; holds no state, so threads may share it.

    `sessions` opens a graph when it is first needed: most requests use one downsample mode.
    """

    def __init__(self, sessions: Callable[[GraphName], Session], manifest: Manifest) -> None:
        self._sessions = sessions
        self._image = manifest.image
        self._graphs = manifest.graphs
        self._compressor = manifest.compressor
        self._hidden = manifest.hidden_size

    def graph(self, mode: str | None) -> GraphSpec:
        """The tower's graph of a downsample mode."""
        return self._graphs[self._graph_name(mode)]

    def encode(self, cells: Sequence[Cell], batch: int, longest: int) -> NDArray[np.float32]:
        """Visual tokens [cells, tokens, hidden] of cells of one size, mode and moment, `batch` slices in a run of the tower.

        `longest`: patches of the request's longest slice. Only a batch's pixels are in memory as floats.
        """
        first = cells[0]
        pieces = [piece for cell in cells for piece in cell.frames]
        looks = [self.look(pieces[start : start + batch], first.mode, longest) for start in range(0, len(pieces), batch)]
        offered = dict(looks[0])
        hidden = np.concatenate([one["vision_hidden"] for one in looks]) if len(looks) > 1 else offered["vision_hidden"]
        frames = len(first.frames)
        offered["vision_hidden"] = hidden.reshape(len(cells), -1, *hidden.shape[2:])  # a cell's frames one after the other
        positions = offered["patch_positions"]
        offered["patch_positions"] = np.tile(positions, (frames, 1))
        offered["patch_times"] = np.repeat(first.times, len(positions))
        embeds = self._run(self._compressor, "vision_embeds", offered)
        if embeds.shape != (len(cells), first.tokens, self._hidden):
            shape = "x".join(map(str, embeds.shape))
            raise BundleCorruptError(
                f"the graph {self._compressor} gave {shape} values instead of {len(cells)}x{first.tokens}x{self._hidden}"
            )
        return embeds

    def look(self, pieces: Sequence[Image.Image], mode: str | None, longest: int) -> dict[str, NDArray[Any]]:
        """What the tower makes of slices of one size, `vision_hidden` [slices, patches, ...], and where their patches are."""
        patched = [patch_slice(piece, self._image, longest) for piece in pieces]
        first = patched[0]
        offered: dict[str, NDArray[Any]] = {
            "pixel_values": np.stack([one.pixel_values for one in patched]),
            "position_ids": np.stack([one.position_ids for one in patched]),
            "row_weights": first.row_weights,
            "column_weights": first.column_weights,
        }
        del patched
        if mode is not None:
            order = nested_order(first.rows, first.columns, self._image.downsample[mode].merge)
            offered |= {name: offered[name][:, order] for name in ("pixel_values", "position_ids")}
        hidden = self._run(self._graph_name(mode), "vision_hidden", offered)
        return {"vision_hidden": hidden[:, : first.rows * first.columns], "patch_positions": first.patch_positions}

    def _graph_name(self, mode: str | None) -> GraphName:
        return "vision_encoder" if mode is None else self._image.downsample[mode].graph

    def _run(self, graph: GraphName, output: str, offered: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        (result,) = self._sessions(graph).run([output], feed(self._graphs[graph].inputs, offered))
        array: NDArray[np.float32] = result
        return array
