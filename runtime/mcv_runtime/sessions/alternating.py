"""Sessions for machines where not all graphs of a bundle fit into memory at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mcv_runtime.bundle.folder import Bundle
from mcv_runtime.bundle.manifest import GraphName
from mcv_runtime.sessions.graphs import GraphSessions, Session, SessionFactory, is_decoder

if TYPE_CHECKING:
    import onnxruntime as ort


class AlternatingSessions(GraphSessions):
    """Tower and decoder in turns: what opens one of them closes the other.

    A session is asked for before every run, and not held on to; one thread at a time may do so.
    """

    def __init__(
        self, bundle: Bundle, options: ort.SessionOptions, factory: SessionFactory, towers: SessionFactory | None = None
    ) -> None:
        super().__init__(bundle, options, factory, towers)
        self.before_closing: Callable[[], None] = lambda: None
        """Called before sessions are closed: who holds on to one lets go."""

    def __call__(self, name: GraphName) -> Session:
        if any(is_decoder(name) != is_decoder(other) for other in self._opened):
            self.before_closing()
            self._opened.clear()  # before the other side is opened
        return super().__call__(name)
