"""Open ONNX Runtime sessions and feed them, changing nothing outside of them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import onnxruntime as ort

from mcv_runtime.bundle import Bundle
from mcv_runtime.errors import BundleCorruptError, OptionError
from mcv_runtime.manifest import GraphName, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Session(Protocol):
    """What is used of `onnxruntime.InferenceSession`."""

    def run(self, output_names: list[str] | None, input_feed: dict[str, Any]) -> Any: ...

    def io_binding(self) -> Any: ...

    def run_with_iobinding(self, iobinding: Any) -> None: ...


SessionFactory: TypeAlias = Callable[[Path, ort.SessionOptions], Session]
_QUIET = 3
"""ONNX Runtime's severity "error"."""


def physical_cores() -> int:
    """Physical cores that this process may run on; 0, which lets ONNX Runtime decide, where that is unknown."""
    if not hasattr(os, "sched_getaffinity"):
        return 0
    cores = set()
    for cpu in os.sched_getaffinity(0):
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def session_options(threads: int | None = None) -> ort.SessionOptions:
    """Options of one session: `threads` workers, by default one per physical core."""
    if threads is not None and threads < 1:
        raise OptionError(f"threads must be at least 1, not {threads}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = physical_cores() if threads is None else threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _QUIET
    return options


def cpu_session(path: Path, options: ort.SessionOptions) -> Session:
    """The default session factory."""
    session: Session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session


def open_session(path: Path, options: ort.SessionOptions, factory: SessionFactory) -> Session:
    """A session on a graph of the bundle; raises `BundleCorruptError` if ONNX Runtime refuses it."""
    try:
        return factory(path, options)
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BundleCorruptError(f"{path} cannot be opened: {reason}; build the bundle again") from error


class GraphSessions:
    """Opens each graph of a bundle once, when it is first asked for; threads may share it."""

    def __init__(self, bundle: Bundle, options: ort.SessionOptions, factory: SessionFactory) -> None:
        self._bundle, self._options, self._factory = bundle, options, factory
        self._opened: dict[GraphName, Session] = {}
        self._lock = threading.Lock()

    def __call__(self, name: GraphName) -> Session:
        with self._lock:
            if name not in self._opened:
                self._opened[name] = open_session(self._bundle.graph(name), self._options, self._factory)
            return self._opened[name]


def feed(wanted: Mapping[str, TensorSpec], values: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The inputs that a graph wants, from what the runtime has to offer, in the graph's element types."""
    for name in wanted.keys() - values.keys():
        raise BundleCorruptError(f"a graph wants the input {name!r}, which this runtime does not have; is the bundle newer?")
    return {name: np.asarray(values[name], dtype=spec.dtype, order="C") for name, spec in wanted.items()}
