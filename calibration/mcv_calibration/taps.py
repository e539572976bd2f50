"""Where a graph's layers give out their results, so that they can be looked at without writing the graph anew."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn

from mcv_calibration.precisions import PRECISIONS, rounds_rows
from mcv_graphs.layers import Embedding, Linear
from mcv_runtime.sessions.graphs import Session, session_options

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HEAD = "lm_head"
_FOLDER = "session.model_external_initializers_file_folder_path"
"""Where ONNX Runtime looks for the weights of a graph that is given as bytes."""


@dataclass(frozen=True, slots=True)
class Tap:
    """The result of the layer at `path`, bias included; `after` are the layers whose results it is made of most directly."""

    path: str
    tensor: str
    precision: str
    width: int
    after: tuple[str, ...]


class Tapped(Protocol):
    """A graph, or the module that it was traced from, whose layers can be looked at."""

    def run(self, paths: Sequence[str], feeds: Sequence[Mapping[str, NDArray[Any]]]) -> Iterator[dict[str, NDArray[Any]]]:
        """The results of those of the layers that it has, feed by feed."""
        ...


def find_taps(model: onnx.ModelProto) -> dict[str, Tap]:
    """Every linear layer and embedding of a graph, in its order; their weights are named `PATH.weight` or `PATH.qweight`."""
    nodes = list(model.graph.node)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    makers = {name: node for node in nodes for name in node.output}
    weight_inputs = {operator: index for spec in PRECISIONS.values() for operator, index in spec.operators.items()}
    layers = {
        path: node
        for node in nodes
        if (path := _layer(node, weight_inputs)) and node.input[weight_inputs[node.op_type]] in shapes
    }
    ends = {path: _end(node, path, readers, makers) for path, node in layers.items()}
    made = {tensor: path for path, tensor in ends.items()}
    sources: dict[str, frozenset[str]] = {}
    before: dict[str, frozenset[str]] = {}
    for node in nodes:
        found = frozenset[str]().union(*(sources.get(name, frozenset()) for name in node.input))
        for name in node.output:
            path = made.get(name)
            if path is not None:
                before[path] = found
            sources[name] = found if path is None else frozenset([path])
    return {
        path: Tap(
            path,
            ends[path],
            _precision(node, makers),
            _width(node, shapes[node.input[weight_inputs[node.op_type]]]),
            tuple(sorted(before[path] - {path})),
        )
        for path, node in layers.items()
    }


def _layer(node: onnx.NodeProto, weight_inputs: Mapping[str, int]) -> str | None:
    index = weight_inputs.get(node.op_type)
    if index is None or len(node.input) <= index:
        return None
    path, _, leaf = node.input[index].rpartition(".")
    if not path or leaf not in ("weight", "qweight"):
        return None
    return _HEAD if node.op_type == "Gemm" else path  # the table of the embedding, read as the head's weight


def _end(
    node: onnx.NodeProto, path: str, readers: Mapping[str, Sequence[onnx.NodeProto]], makers: Mapping[str, onnx.NodeProto]
) -> str:
    """The name of the layer's result: that of the sum with its bias, if a node of its own adds that."""
    output = str(node.output[0])
    if rounds_rows(node, makers):
        while node.op_type != "Mul":  # after the shape of the layer's input is back
            node = readers[node.output[0]][0]
        output = str(node.output[0])
    following = readers.get(output, ())
    adds_bias = len(following) == 1 and following[0].op_type == "Add" and f"{path}.bias" in following[0].input
    return str(following[0].output[0]) if adds_bias else output


def _precision(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto]) -> str:
    return next(spec.name for spec in PRECISIONS.values() if node.op_type in spec.operators and spec.tells(node, makers))


def _width(node: onnx.NodeProto, shape: tuple[int, ...]) -> int:
    """Values in a row of the layer's result; `shape` is its weight's."""
    rows, columns = shape[:2]
    if node.op_type == "GatherBlockQuantized":
        return columns * 8 // _attribute(node, "bits", 4)
    return rows if node.op_type in ("MatMulNBits", "Gemm") else columns


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)


class TappedGraph:
    """A bundle's graph. Each run opens a copy with more outputs from memory; its weights stay where they are."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        self._model = onnx.load(path, load_external_data=False)
        self._folder, self._threads = path.parent, threads
        self.taps = find_taps(self._model)

    def run(self, paths: Sequence[str], feeds: Sequence[Mapping[str, NDArray[Any]]]) -> Iterator[dict[str, NDArray[Any]]]:
        paths = [path for path in paths if path in self.taps]
        tensors = [self.taps[path].tensor for path in paths]
        session = self._open(tensors)
        for feed in feeds:
            yield dict(zip(paths, session.run(tensors, dict(feed)), strict=True))

    def _open(self, tensors: Iterable[str]) -> Session:
        copy = onnx.ModelProto()
        copy.CopyFrom(self._model)
        present = {output.name for output in copy.graph.output}
        for name in tensors:
            if name not in present:
                copy.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
        options = session_options(self._threads)
        options.add_session_config_entry(_FOLDER, str(self._folder))
        session: Session = ort.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session


class TappedModule:
    """A module behind a session that runs it in torch."""

    def __init__(self, module: nn.Module, session: Session) -> None:
        self._module, self._session = module, session

    def run(self, paths: Sequence[str], feeds: Sequence[Mapping[str, NDArray[Any]]]) -> Iterator[dict[str, NDArray[Any]]]:
        for feed in feeds:
            seen: dict[str, NDArray[Any]] = {}
            with _hooks(self._module, paths, seen):
                self._session.run(None, dict(feed))
            yield seen


@contextmanager
def _hooks(module: nn.Module, paths: Sequence[str], seen: dict[str, NDArray[Any]]) -> Iterator[None]:
    def keep(path: str) -> Any:
        def hook(layer: nn.Module, inputs: object, output: Tensor) -> None:
            seen[path] = output.detach().to("cpu", torch.float32).numpy()

        return hook

    layers = {path: child for path, child in module.named_modules() if path in paths and isinstance(child, Linear | Embedding)}
    handles = [layer.register_forward_hook(keep(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
