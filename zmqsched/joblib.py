"""joblib on a cluster: ``import zmqsched.joblib``, then ``joblib.parallel_config("zmqsched", client=client)``.

>>> import joblib, zmqsched.joblib
>>> with joblib.parallel_config("zmqsched", client=client):
...     joblib.Parallel()(joblib.delayed(pow)(number, 2) for number in range(5))
[0, 1, 4, 9, 16]

Rules
-----
* joblib makes the batches, and dispatches the next as one is done; each is one task. What it looks to be is what the cluster
  does: errors keep their type, a worker that dies does not end the call.
* Each call has a backend of its own, made from the one in ``parallel_config``: several may be under way at once (generators
  that are not read yet), and one that fails must not cancel another's tasks.
* ``n_jobs=-1``, the default, is all workers; ``n_jobs=1`` is this process, without the cluster, as ever in joblib. A number
  below that of the workers is how many of them the call uses at a time.
* When a call ends early, by an error, a time-out, an interrupt or because its generator was dropped, its tasks are
  cancelled, those that run by force.
* A cluster on Unix sockets is all on this host: there large arrays among the arguments are copied once a call, into memory
  without a name that the workers map. Beyond this host they are part of each batch.
* A ``Parallel`` inside a task uses threads of its worker, if it is told how many, as under joblib's own process backend.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import mmap
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from joblib.parallel import (
    AutoBatchingMixin,
    BatchedCalls,
    FallbackToBackend,
    ParallelBackendBase,
    SequentialBackend,
    register_parallel_backend,
)

from .easy import _client
from .tasks import Tasks
from .waiting import cancel_all

if TYPE_CHECKING:
    import numpy as np

NAME = "zmqsched"


class Backend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]  # joblib has no annotations
    """What ``parallel_config("zmqsched")`` makes.

    Parameters
    ----------
    client
        A :class:`~zmqsched.Client`, or a view of one: ``client=client.options(priority=5, retries=2)``. Without it, this
        user's running cluster or a local one, as for :func:`zmqsched.map`.
    """

    supports_retrieve_callback = True
    default_n_jobs = -1

    def __init__(self, client: Tasks | None = None, **base: Any) -> None:
        super().__init__(**base)
        if client is not None and not isinstance(client, Tasks):
            raise TypeError(f"client is a zmqsched Client, or client.options(...), not {type(client).__name__}")
        self._given = client
        self._parallel: Any = None  # whose own this backend is
        self._limit: int | None = None  # tasks of this call that may be at the cluster
        self._there = 0  # those that are
        self._aborted = False
        self._lock = threading.Lock()
        self._open: set[concurrent.futures.Future[Any]] = set()
        self._held: deque[tuple[BatchedCalls, Callable[[Any], None]]] = deque()
        self._arrays = _Arrays(None)

    @property
    def _tasks(self) -> Tasks:
        return self._given or _client()

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """How many tasks can run at once. With 1 joblib would not use the cluster, so it is 1 only if that is asked for.

        Raises
        ------
        ValueError
            ``n_jobs`` is 0.
        """
        return 1 if n_jobs == 1 else max(2, self._workers(n_jobs)[0])

    def _workers(self, n_jobs: int | None) -> tuple[int, int]:
        """How many workers are asked for, and how many there are."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        there: int = self._tasks._max_workers
        if n_jobs is None:
            n_jobs = self.default_n_jobs
        return (min(n_jobs, there) if n_jobs > 0 else max(1, there + 1 + n_jobs)), there

    def configure(
        self,
        n_jobs: int = 1,
        parallel: Any = None,
        *,
        client: Tasks | None = None,
        max_nbytes: int | None = None,
        **_: Any,
    ) -> int:
        """Called by ``Parallel`` before each call: how many jobs there will be.

        ``Parallel(backend="zmqsched", client=client)`` comes here, and ``max_nbytes``, the size from which an array is
        shared; what else ``Parallel`` gives is about processes that joblib starts.
        """
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        if self._parallel is not parallel:
            own = Backend(client or self._given, nesting_level=self.nesting_level)
            own._parallel = parallel
            raise FallbackToBackend(own)
        self.parallel = parallel
        wanted, there = self._workers(n_jobs)
        self._limit = wanted if wanted < there else None
        self._arrays = _Arrays(max_nbytes if self._tasks._client._on_one_host else None)
        return self.effective_n_jobs(n_jobs)

    def start_call(self) -> None:
        with self._lock:
            self._aborted = False
            self._open = set()  # what the last call has left is nobody's here
            self._there = 0

    def submit(self, func: BatchedCalls, callback: Callable[[Any], None]) -> None:
        """Run a batch. Never raises: joblib calls this in callbacks too, where an error would be nobody's."""
        self._arrays.share(func)
        with self._lock:
            if self._there == self._limit:
                self._held.append((func, callback))
                return
            self._there += 1
        self._start(func, callback)

    def _start(self, batch: BatchedCalls, callback: Callable[[Any], None]) -> None:
        future: concurrent.futures.Future[Any]
        mine = self._open
        try:
            tasks = self._tasks
            future = tasks._client._submit(joblib_batch, (batch,), {}, tasks._options, tasks._retry_on, known_to=mine)
        except Exception as error:  # noqa: BLE001 - the cluster is lost, the client shut down: the call's error
            future = concurrent.futures.Future()
            future.set_exception(error)
        with self._lock:
            mine.add(future)
            aborted = self._aborted or mine is not self._open
        future.add_done_callback(self._ended)
        future.add_done_callback(callback)
        if aborted:  # meanwhile
            cancel_all([future], force=True)

    def _ended(self, future: concurrent.futures.Future[Any]) -> None:
        with self._lock:
            if future not in self._open:
                return
            self._open.discard(future)
            held = self._held.popleft() if self._held else None
            self._there -= held is None
        if held is not None:
            self._start(*held)

    def retrieve_result_callback(self, out: concurrent.futures.Future[Any]) -> Any:
        """The batch's results. Of an error joblib drops the traceback, so that of the task is written to it as a note."""
        if (error := out.exception()) is None:
            return out.result()
        if error.__traceback__ is not None:
            with contextlib.suppress(Exception):  # the user's class may not let itself be written to
                error.add_note("".join(["In the task:\n", *traceback.format_tb(error.__traceback__)]).rstrip())
        raise error

    def abort_everything(self, ensure_ready: bool = True) -> None:
        with self._lock:
            self._aborted = True
            self._held.clear()
            unfinished = list(self._open)
        cancel_all(unfinished, force=True)

    def terminate(self) -> None:
        """The call has ended."""
        self._arrays.close()
        self.reset_batch_stats()


def joblib_batch(batch: BatchedCalls) -> Any:
    """What each task calls. The batch is its argument: as a function it would be kept for others to come."""
    return batch()


class _Arrays:
    """The large arrays of one call, in memory that others on this host can map.

    They are told apart by identity, for as long as the call lasts.
    """

    def __init__(self, from_bytes: int | None) -> None:
        self._from_bytes = from_bytes
        self._shared: dict[int, tuple[np.ndarray[Any, Any], _Shared]] = {}

    def share(self, batch: BatchedCalls) -> None:
        """Put what stands for them into the batch, in place of arrays of at least so many bytes among the arguments."""
        if self._from_bytes is None or "numpy" not in sys.modules:
            return
        batch.items = [
            (fn, tuple(map(self._stand_in, args)), {name: self._stand_in(value) for name, value in kwargs.items()})
            for fn, args, kwargs in batch.items
        ]

    def _stand_in(self, value: Any) -> Any:
        import numpy as np

        if type(value) is not np.ndarray or value.nbytes < (self._from_bytes or 0) or value.dtype.hasobject:
            return value
        known = self._shared.get(id(value))
        if known is None:
            known = self._shared[id(value)] = value, _Shared(value)
        return known[1]

    def close(self) -> None:
        for _, shared in self._shared.values():
            shared.close()
        self._shared.clear()


class _Shared:
    """Pickles into an array on memory of this process, mapped: who writes to it writes to a copy of that page."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        import numpy as np

        order: Literal["C", "F"] = "F" if array.flags.fnc else "C"
        self._file = io.FileIO(os.memfd_create("zmqsched-array", os.MFD_CLOEXEC), "r+")
        left = np.ravel(array, order).view(np.uint8).data
        while left:
            left = left[self._file.write(left) :]
        path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        self._reduced = (_mapped, (path, array.dtype, array.shape, order))

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._reduced

    def close(self) -> None:
        self._file.close()


def _mapped(path: str, dtype: Any, shape: tuple[int, ...], order: Literal["C", "F"]) -> np.ndarray[Any, Any]:
    import numpy as np

    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return np.frombuffer(memory, dtype).reshape(shape, order=order)


register_parallel_backend(NAME, Backend)
