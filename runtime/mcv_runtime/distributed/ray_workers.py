"""The rows of a batch, answered by workers of Ray, an extra; files that rows name must be there for every worker.

Requests travel with paths, or the bytes of encoded pictures, never with decoded ones. A worker that dies is replaced, and the
rows that it had are asked again, one by one, so that one that kills whoever answers it ends as an error of its own.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from mcv_runtime.batch.rows import BatchRow
from mcv_runtime.distributed.answering import answered
from mcv_runtime.documents.document import Document, Page
from mcv_runtime.engine import load
from mcv_runtime.errors import McvError, OptionError, RunError
from mcv_runtime.pictures.video import Video
from mcv_runtime.request.request import Request

THREADS = 4
"""Of a worker, or all CPUs of the smallest machine."""
_AT_A_WORKER = 2
"""Chunks of rows: one that it works on, and one that begins when rows of that are finished."""
_ATTEMPTS = 4
"""Workers that a row may lose."""


class _Worker:
    """One process with an engine."""

    def __init__(self, bundle: str, load_options: Mapping[str, Any], size: int) -> None:
        self._size = size
        self._refused = ""
        try:
            self._engine = load(bundle, max_rows=size, **load_options)
        except McvError as error:
            self._refused = str(error)

    def identity(self) -> tuple[str, str, int]:
        """The bundle's, what is wrong with it, and the threads that compute."""
        return ("", self._refused, 0) if self._refused else (self._engine.bundle.identity, "", self._engine.info().threads)

    def answer(self, requests: Sequence[Request]) -> list[dict[str, Any] | str]:
        return answered(self._engine, requests, 2 * self._size)


@dataclasses.dataclass(eq=False)
class Asked:
    """A row on its way."""

    request: Request
    found: dict[str, Any] | str | None = None
    """The fields of its answer, or why there is none."""
    attempts: int = 0


class RayWorkers:
    """Workers of a cluster, made here and gone with `close`; a context."""

    def __init__(
        self,
        bundle: Path,
        load_options: Mapping[str, Any],
        size: int,
        *,
        model: str,
        address: str | None = None,
        workers: int | None = None,
    ) -> None:
        """`address`: of a cluster, `auto` for that of this machine; None: a new one on this machine."""
        ray = _ray()
        if not ray.is_initialized():
            own = {"address": "local", "include_dashboard": False} if address is None else {"address": address}
            try:
                ray.init(log_to_driver=False, logging_level="ERROR", **own)
            except Exception as error:  # plain ones too, where processes take long to start
                where = "Ray does not start on this machine" if address is None else f"there is no Ray cluster at {address}"
                raise OptionError(f"{where}: {_last_line(error)}") from error
        self._size = size
        nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        threads = load_options.get("threads") or min([THREADS, *(cpus for cpus in nodes if cpus)])
        count = workers or max(sum(cpus // threads for cpus in nodes), 1)
        if address is None and max(nodes) < threads:  # another cluster may grow
            raise OptionError(f"no machine of the cluster has {threads} CPUs for a worker; give fewer --threads")
        # nothing is done again by Ray itself: this is where it is known what is to be done again
        self._kind = ray.remote(num_cpus=threads, max_restarts=0, max_task_retries=0, max_concurrency=_AT_A_WORKER)(_Worker)
        given = {name: value.absolute() if isinstance(value, Path) else value for name, value in load_options.items()}
        self._given = (str(bundle.absolute()), {**given, "threads": threads}, size)
        self._workers: list[Any] = [self._make() for _ in range(count)]
        self._at_work: dict[Any, tuple[int, list[Asked]]] = {}
        """Chunks by what Ray gives for them, each with its worker's place."""
        self._chunks = deque[list[Asked]]()
        self._next: list[Asked] = []
        self.ahead = 2 * _AT_A_WORKER * count * size
        self._require(model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; rows that are not answered stay so."""
        ray = _ray()
        for worker in self._workers:
            ray.kill(worker)
        self._workers = []

    def ask(self, row: BatchRow) -> Asked:
        """Hand in a row, which has a request."""
        assert row.request is not None
        asked = Asked(_portable(row.request))
        self._next.append(asked)
        if len(self._next) == self._size:
            self._close_chunk()
        return asked

    def wait(self, asked: Sequence[Asked]) -> None:
        """Until the first of them is answered."""
        if self._next:
            self._close_chunk()
        while asked[0].found is None:
            self._settle()

    def fields(self, asked: Asked) -> dict[str, Any] | str:
        """Those of its answer, or why there is none."""
        assert asked.found is not None
        return asked.found

    def _make(self) -> Any:
        return self._kind.remote(*self._given)

    def _require(self, model: str) -> None:
        """Raise `OptionError` unless a worker has the bundle that the driver has."""
        ray = _ray()
        try:
            identity, refused, self.threads = ray.get(self._workers[0].identity.remote())
        except ray.exceptions.RayError as error:
            raise OptionError(f"a worker cannot be started: {_last_line(error)}") from None
        if refused or identity != model:
            raise OptionError(f"a worker cannot use the bundle: {refused or 'it has another one at this path'}")

    def _close_chunk(self) -> None:
        self._chunks.append(self._next)
        self._next = []
        self._send()

    def _send(self) -> None:
        """Give waiting chunks to the workers that have the least to do."""
        busy = [0] * len(self._workers)
        for place, chunk in self._at_work.values():
            busy[place] += _share(chunk)
        while self._chunks and min(busy) + _share(self._chunks[0]) <= _AT_A_WORKER:
            place = busy.index(min(busy))
            chunk = self._chunks.popleft()
            busy[place] += _share(chunk)
            self._at_work[self._workers[place].answer.remote([one.request for one in chunk])] = (place, chunk)

    def _settle(self) -> None:
        """Wait for one chunk, and take what came of it."""
        ray = _ray()
        (done, *_), _ = ray.wait(list(self._at_work), num_returns=1)
        place, chunk = self._at_work.pop(done)
        try:
            for one, found in zip(chunk, ray.get(done), strict=True):
                one.found = found
        except ray.exceptions.RayTaskError as error:  # a row's own errors are fields
            for one in chunk:
                one.found = _last_line(error)
        except (ray.exceptions.LocalRayletDiedError, ray.exceptions.RaySystemError) as error:
            raise RunError(f"the Ray cluster is gone ({_last_line(error)}); the same command goes on from there") from None
        except ray.exceptions.RayError:  # the worker's end, its machine's, or that of what it had answered
            self._replace(place)
            self._ask_again(chunk)
        self._send()

    def _replace(self, place: int) -> None:
        """Start another worker for one that is gone, and take back what that had."""
        worker = self._workers[place]
        self._workers[place] = self._make()
        _ray().kill(worker)  # if it only could not be reached, it has no more to say
        for done in [done for done, (at, _) in self._at_work.items() if at == place]:
            self._ask_again(self._at_work.pop(done)[1])

    def _ask_again(self, chunk: Sequence[Asked]) -> None:
        for one in reversed(chunk):
            one.attempts += 1
            if one.attempts < _ATTEMPTS:
                self._chunks.appendleft([one])
            else:
                one.found = f"{one.attempts} workers have died with this row, which may need more memory than they have"


def _share(chunk: Sequence[Asked]) -> int:
    """How much of a worker a chunk takes: all, if it has lost one already, so that no other row is to blame the next time."""
    return _AT_A_WORKER if chunk[0].attempts else 1


def _portable(request: Request) -> Request:
    """The request as another process can take it: paths from the root, pages by their numbers."""
    if request.messages is None:
        images = request.images if isinstance(request.images, list) else [request.images]
        return dataclasses.replace(request, images=[_portable_part(one) for one in images])
    messages = [{**message, "content": _portable_content(message["content"])} for message in request.messages]
    return dataclasses.replace(request, messages=messages)


def _portable_content(content: Any) -> Any:
    return [_portable_part(part) for part in content] if isinstance(content, list) else content


def _portable_part(part: Any) -> Any:
    if isinstance(part, Page):
        document = _portable_part(part.document)
        return dataclasses.replace(document, pages=[part.number])
    if isinstance(part, Document | Video) and isinstance(part.source, Path):
        return dataclasses.replace(part, source=part.source.absolute())
    return part.absolute() if isinstance(part, Path) else part


def _last_line(error: Exception) -> str:
    """Of a Ray error, which begins with where it was."""
    return next(reversed(str(error).strip().splitlines()), type(error).__name__)


def _ray() -> Any:
    """Ray, or what to install, as an `OptionError`."""
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise OptionError("--engine ray needs Ray; install it with `pip install minicpmv-onnx[ray]`") from None
    return ray
