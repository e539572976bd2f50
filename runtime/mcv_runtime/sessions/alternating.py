"""Sessions for machines where not all graphs of a bundle fit into memory at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.manifest import GraphName
from mcv_runtime.sessions.graphs import GraphSessions, Session, SessionFactory

if TYPE_CHECKING:
    import onnxruntime as ort

Side = Literal["vision", "decoder"]


class SessionTurns(GraphSessions):
    """Like `GraphSessions`, but tower and decoder take turns: what opens one of them closes the other.

    Threads may share it. A thread that needs the closed side waits until nobody runs, or holds, the open one; those who
    come after it wait behind it, so that nobody waits for ever.
    """

    def __init__(self, bundle: Bundle, options: ort.SessionOptions, factory: SessionFactory) -> None:
        super().__init__(bundle, options, factory)
        self._side: Side = "vision"
        self._users: list[int] = []
        """Threads that run or hold the open side, as often as they do."""
        self._queue: list[object] = []
        self._changed = threading.Condition()

    def __call__(self, name: GraphName) -> Session:
        return _BorrowedSession(self, name)

    @contextmanager
    def held(self, name: GraphName) -> Iterator[None]:
        """Keep the side of `name` open; a thread that holds one side must not ask for the other."""
        self._enter(_side(name))
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def borrowed(self, name: GraphName) -> Iterator[Session]:
        """The session itself, which is closed at some time after."""
        with self.held(name):
            with self._lock:
                if name not in self._opened:
                    self._opened[name] = self._open(name)
                session = self._opened[name]
            yield session

    def _enter(self, side: Side) -> None:
        thread, ticket = threading.get_ident(), object()
        with self._changed:
            if thread not in self._users:
                self._queue.append(ticket)
                try:
                    self._changed.wait_for(lambda: self._queue[0] is ticket and (side == self._side or not self._users))
                finally:
                    self._queue.remove(ticket)
                    self._changed.notify_all()
            assert side == self._side or not self._users, "a thread asked for the side that it keeps closed"
            if side != self._side:
                self._opened.clear()  # before the other side is opened
                self._side = side
            self._users.append(thread)

    def _leave(self) -> None:
        with self._changed:
            self._users.remove(threading.get_ident())
            self._changed.notify_all()


class _BorrowedSession:
    """A session that is there whenever it runs, and need not be in between."""

    def __init__(self, turns: SessionTurns, name: GraphName) -> None:
        self._turns, self._name = turns, name

    def run(self, output_names: list[str] | None, input_feed: dict[str, Any]) -> Any:
        with self._turns.borrowed(self._name) as session:
            return session.run(output_names, input_feed)

    def io_binding(self) -> _Binding:
        return _Binding()

    def run_with_iobinding(self, iobinding: _Binding) -> None:
        with self._turns.borrowed(self._name) as session:
            iobinding.run(session)


class _Binding:
    """What is bound, bound anew for every run: ONNX Runtime's own binding must not outlive its session."""

    def __init__(self) -> None:
        self._bound: dict[tuple[str, str], tuple[str, Any]] = {}
        self._outputs: Any = None

    def bind_output(self, name: str, device: str) -> None:
        self._bound["output", name] = ("bind_output", device)  # keeps its place in the order, by which outputs are numbered

    def bind_cpu_input(self, name: str, value: Any) -> None:
        self._bound["input", name] = ("bind_cpu_input", value)

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self._bound["input", name] = ("bind_ortvalue_input", value)

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        self._bound["output", name] = ("bind_ortvalue_output", value)

    def get_outputs_as_ortvaluevector(self) -> Any:
        return self._outputs

    def run(self, session: Session) -> None:
        binding = session.io_binding()
        for (_, name), (method, value) in self._bound.items():
            getattr(binding, method)(name, value)
        session.run_with_iobinding(binding)
        self._outputs = binding.get_outputs_as_ortvaluevector()


def _side(name: GraphName) -> Side:
    return "decoder" if name.startswith("decoder") else "vision"
