"""What a decoder remembers of a sequence: keys and values in one buffer per tensor, allocated once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from mcv_runtime.manifest import CacheEntry
from mcv_runtime.sessions import Session

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESULT = "logits"


class KVCache:
    """Room for `capacity` tokens of one sequence; nothing is copied between steps.

    What grows is bound both as past and as present: GroupQueryAttention writes a step's keys and values behind the old ones.
    A state of fixed size has two buffers that swap their roles with each step, as a graph may not overwrite what it reads.
    """

    def __init__(self, session: Session, entries: Sequence[CacheEntry], capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        """Tokens seen so far."""
        self.shift = 0
        """What a new token's position is ahead of its index."""
        self._session = session
        self._turn = 0
        turns = 1 if all(entry.grows for entry in entries) else 2
        self._bindings: list[Any] = [session.io_binding() for _ in range(turns)]  # used in turn
        for binding in self._bindings:
            binding.bind_output(RESULT, "cpu")  # first, so that it is output 0
        axes = {"batch": 1, "cache_length": capacity}
        self._buffers: dict[str, list[Any]] = {}
        for entry in entries:
            shape = [axes[axis] if isinstance(axis, str) else axis for axis in entry.shape]
            buffers = [_zeros(shape, entry.dtype) for _ in range(1 if entry.grows else 2)]
            for binding in self._bindings:
                binding.bind_ortvalue_input(entry.input, buffers[0])
                binding.bind_ortvalue_output(entry.output, buffers[-1])
                buffers.reverse()
            self._buffers[entry.input] = buffers

    def advance(self, tokens: int, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """Run the decoder on the next `tokens` tokens and return its logits [rows, vocab]."""
        binding = self._bindings[self._turn % len(self._bindings)]
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output(RESULT, "cpu")  # anew: else the next run writes into the last result, whatever its shape
        self._session.run_with_iobinding(binding)
        self.length += tokens
        self._turn += 1
        outputs = binding.get_outputs_as_ortvaluevector()  # owns the memory of the array below, so that is copied
        logits: NDArray[np.float32] = outputs[0].numpy().copy()
        return logits

    def tensor(self, name: str) -> NDArray[Any]:
        """A copy of what the next step reads as its input `name`."""
        buffers = self._buffers[name]
        value: NDArray[Any] = buffers[self._turn % len(buffers)].numpy().copy()
        return value


def _zeros(shape: Sequence[int], dtype: str) -> Any:
    # allocated by ONNX Runtime: a value made from a numpy array would only borrow its memory
    buffer = ort.OrtValue.ortvalue_from_shape_and_type(list(shape), np.dtype(dtype).type, "cpu")
    buffer.update_inplace(np.zeros(shape, dtype))
    return buffer
