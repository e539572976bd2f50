"""Open ONNX Runtime sessions and feed them, changing nothing outside of them.

ONNX Runtime is imported when it is first needed: it asks then whether it may keep records of its use (README, "Embed it").
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.manifest import GraphName, TensorSpec
from mcv_runtime.errors import BundleCorruptError, McvError, OptionError, ResourceError, RunError, printable, shown
from mcv_runtime.sessions.cores import default_threads

if TYPE_CHECKING:
    import onnxruntime as ort
    from numpy.typing import NDArray


class Session(Protocol):
    """What is used of `onnxruntime.InferenceSession`."""

    def run(self, output_names: list[str] | None, input_feed: dict[str, Any]) -> Any: ...

    def io_binding(self) -> Any: ...

    def run_with_iobinding(self, iobinding: Any) -> None: ...


SessionFactory: TypeAlias = "Callable[[Path, ort.SessionOptions], Session]"
MOST_THREADS = 1024
_QUIET = 3
"""ONNX Runtime's severity "error"."""
_LONGEST = 240
"""Characters of what ONNX Runtime says, which repeats a stranger's names at any length."""


def session_options(threads: int | None = None) -> ort.SessionOptions:
    """Options of one session: `threads` workers, by default as many as `default_threads` says.

    They spin within a run only. On two virtual cores (0.8B, q4) that decoded 24 tokens a second, like workers that always
    spin and more than workers that never do (22), and took no processor time when idle. Where other programs keep all cores
    busy, never is better (7.5 against 4): pass options with `session.intra_op.allow_spinning` = "0" there.
    """
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise OptionError(f"threads must be 1 to {MOST_THREADS:,}, not {threads}")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = default_threads() if threads is None else threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _QUIET
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def cpu_session(path: Path, options: ort.SessionOptions) -> Session:
    """The default session factory."""
    import onnxruntime as ort

    session: Session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session


def open_session(path: Path, options: ort.SessionOptions, factory: SessionFactory) -> Session:
    """A session on a graph of the bundle; raises `BundleCorruptError` if ONNX Runtime refuses it."""
    try:
        return factory(path, options)
    except McvError:
        raise
    except Exception as error:  # ONNX Runtime's own exceptions have no common base
        if _is_out_of_memory(error):
            raise ResourceError(f"there is not enough memory to open {path}; try low_memory, or a smaller model") from error
        raise BundleCorruptError(f"{path} cannot be opened: {_first_line(error)}; build the bundle again") from error


class GuardedSession:
    """A session whose failures are `ResourceError` and `RunError`; as safe for threads as the one inside."""

    def __init__(self, session: Session, graph: GraphName) -> None:
        self._session, self._graph = session, graph

    def run(self, output_names: list[str] | None, input_feed: dict[str, Any]) -> Any:
        with _run_errors(self._graph):
            return self._session.run(output_names, input_feed)

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_with_iobinding(self, iobinding: Any) -> None:
        with _run_errors(self._graph):
            self._session.run_with_iobinding(iobinding)


class GraphSessions:
    """Opens each graph of a bundle once, when it is first asked for; threads may share it."""

    def __init__(
        self, bundle: Bundle, options: ort.SessionOptions, factory: SessionFactory, towers: SessionFactory | None = None
    ) -> None:
        """`towers` is the factory of graphs that encode pictures; None: the same as the decoder's."""
        self._bundle, self._options = bundle, options
        self._decoders, self._towers = factory, towers or factory
        self._opened: dict[GraphName, Session] = {}
        self._lock = threading.Lock()

    def __call__(self, name: GraphName) -> Session:
        with self._lock:
            if name not in self._opened:
                self._opened[name] = self._open(name)
            return self._opened[name]

    def close(self) -> None:
        """Let go of all sessions."""
        with self._lock:
            self._opened.clear()

    def _open(self, name: GraphName) -> Session:
        factory = self._decoders if is_decoder(name) else self._towers
        return GuardedSession(open_session(self._bundle.graph(name), self._options, factory), name)


def is_decoder(name: GraphName) -> bool:
    return name.startswith("decoder")


@contextmanager
def _run_errors(graph: GraphName) -> Iterator[None]:
    try:
        yield
    except McvError:
        raise
    except Exception as error:
        if _is_out_of_memory(error):
            raise ResourceError(f"there is not enough memory to run {graph}: {_first_line(error)}") from error
        raise RunError(f"ONNX Runtime failed in {graph}: {_first_line(error)}") from error


def _is_out_of_memory(error: Exception) -> bool:
    # bfc_arena.cc of ONNX Runtime, C++ itself, and the CUDA libraries, in their words
    words = ("failed to allocate", "bad_alloc", "bad allocation", "out of memory", "alloc_failed")
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def _first_line(error: Exception) -> str:
    return printable((str(error).splitlines() or [type(error).__name__])[0][:_LONGEST])


def feed(wanted: Mapping[str, TensorSpec], values: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The inputs that a graph wants, from what the runtime has to offer, in the graph's element types."""
    for name in wanted.keys() - values.keys():
        raise BundleCorruptError(
            f"a graph wants the input {shown(name)}, which this runtime does not have; is the bundle newer?"
        )
    return {name: np.asarray(values[name], dtype=spec.dtype, order="C") for name, spec in wanted.items()}
