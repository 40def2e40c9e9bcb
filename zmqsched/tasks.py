"""Submitting tasks, with one set of options: what a client and its views share."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from msgspec.structs import replace

from .futures import Future
from .maps import Map
from .maps import start as start_map
from .options import boolean, exception_types, integer, seconds, short_name, task_resources, task_tags, time_limit
from .payload import pack_kinds
from .protocol import Options

if TYPE_CHECKING:
    from numpy.random import SeedSequence

    from .client import Client
    from .taskgroup import TaskGroup

T = TypeVar("T")


class Tasks(concurrent.futures.Executor):
    """What a client and its views share: submitting, with one set of options."""

    _client: Client
    _options: Options
    _retry_on: bytes  # pickled types; empty: any

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run ``fn(*args, **kwargs)`` on the cluster.

        Waits while 64 MiB of tasks are on their way, because the broker is full, slow or away.

        Every keyword is ``fn``'s; a task's own settings are given by :meth:`options`.

        Futures of this client among the arguments, also inside lists, tuples, dicts and other objects, become what their
        tasks return: the call waits for them on the cluster, where their results stay. If one fails or is cancelled, the
        call is not run and its future fails with :class:`~zmqsched.errors.DependencyFailed`, whose ``__cause__`` is that
        error. At most 10,000 unfinished ones per call.

        Returns
        -------
        Future
            Completes with the result, or with the task's own exception (its traceback begins where the task's does).
            What cannot be pickled is an exception of the future too (:class:`~zmqsched.errors.NotSerializable`).

        Raises
        ------
        TypeError
            ``fn`` cannot be called.
        RuntimeError
            After ``shutdown``.
        ClusterLost
            The broker is gone.
        """
        if not callable(fn):
            raise TypeError(f"submit needs a callable, not {type(fn).__name__}; to run f(x) write submit(f, x)")
        return self._client._submit(fn, args, kwargs, self._options, self._retry_on)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int | Literal["auto"] = "auto",
        buffersize: int | None = None,
        ordered: bool = True,
        on_error: Literal["raise", "return"] = "raise",
        seed: int | SeedSequence | None = None,
        progress: bool | None = None,
    ) -> Map[T]:
        """``fn(*items)`` for the items of the iterables, as many as the shortest has, in parallel: an iterator of results.

        As ``Executor.map``, and it does not grow with the number of items. Lists and other containers are taken as they are
        at the call; any other iterable, a generator for instance, is read by a thread in the background while the map goes
        on, whether or not its results are read; what it raises is raised behind the results of the items that it gave.

        Parameters
        ----------
        timeout
            Seconds from this call on until ``TimeoutError``.
        chunksize
            Items per task. "auto": as many as take 50 to 100 ms, fewer near the end; what a task has not begun then is
            given to others. The results of a task come together, so with ``chunksize=1`` each comes as soon as it can.
        buffersize
            At most so many items are taken and not yet read as results (so many chunks, if ``chunksize`` is a number).
        ordered
            False: results as they come.
        on_error
            "raise": the first error in the order of the results is raised there, and ends the map. "return": exceptions
            stand in the place of results, and a summary is logged at the end. One item's error never disturbs another item.
            See :attr:`Map.failures`, :meth:`Map.summary`, :meth:`Map.retry_failed`.
        seed
            An int of at least 0, or a ``numpy.random.SeedSequence``: ``fn`` is called with ``rng=``, a
            ``numpy.random.Generator`` of the item's own. Its numbers depend on the seed and the item's index alone.
        progress
            Whether to show a bar: what is done, failed and running, rate and time left; when nothing has moved for three
            seconds, why. By default in interactive sessions, if the map takes longer than half a second.

        Raises
        ------
        TypeError, ValueError
            Wrong arguments.
        RuntimeError
            After ``shutdown``.
        """
        return start_map(
            self, fn, iterables, spread=False, timeout=timeout, chunksize=chunksize, buffersize=buffersize, ordered=ordered,
            on_error=on_error, seed=seed, progress=progress,
        )  # fmt: skip

    def starmap(
        self,
        fn: Callable[..., T],
        iterable: Iterable[Iterable[Any]],
        *,
        timeout: float | None = None,
        chunksize: int | Literal["auto"] = "auto",
        buffersize: int | None = None,
        ordered: bool = True,
        on_error: Literal["raise", "return"] = "raise",
        seed: int | SeedSequence | None = None,
        progress: bool | None = None,
    ) -> Map[T]:
        """As :meth:`map`, for an iterable of tuples of arguments, as ``itertools.starmap``."""
        return start_map(
            self, fn, (iterable,), spread=True, timeout=timeout, chunksize=chunksize, buffersize=buffersize, ordered=ordered,
            on_error=on_error, seed=seed, progress=progress,
        )  # fmt: skip

    def options(
        self,
        *,
        priority: int | None = None,
        retries: int | None = None,
        resources: Mapping[str, float] | None = None,
        tags: Iterable[str] | None = None,
        name: str | None = None,
        requeue: bool | None = None,
        retry_on: type[BaseException] | tuple[type[BaseException], ...] | None = None,
        backoff: float | None = None,
        timeout: float | None = None,
        job: str | None = None,
    ) -> TaskOptions:
        """A view of this client that submits with these settings; what is not given stays as it is here.

        Parameters
        ----------
        priority
            Higher first; tasks of equal priority run first come, first served.
        retries
            How often to run again after an exception of the task's own. Deaths of workers are counted apart.
        retry_on
            Exception types, as in ``except``: other exceptions are not retried. Default: any.
        backoff
            Seconds to wait before the first retry, twice as long before each further one, at most 60; each time
            shortened at random by up to half.
        timeout
            Seconds that each run of the task may take, waiting not included. Then KeyboardInterrupt is raised in it; if it
            has not ended half a second later, its worker is killed. The future fails with
            :class:`~zmqsched.errors.TaskTimeout`, unless the task catches the interrupt and returns a value in time.
        resources
            Amounts by name that a node must have free: ``cpu`` (1 unless given), ``gpu``, ``memory`` in bytes, or
            any name that nodes offer.
        tags
            Names that the node must have.
        name
            Shown in errors and reports.
        requeue
            False: never run a second time after a worker or node died while it may have been running; with
            ``retries=0`` the task is executed at most once.
        job
            Submit under this name: the tasks outlive this client, and :meth:`Client.job` of any client gives their
            futures. Results are kept for 24 hours after the last of them. Futures among their arguments should be of
            the job as well: other tasks end with this client, and then so do those that wait for them.
        """
        return TaskOptions(
            self._client,
            Options(
                priority=self._options.priority if priority is None else integer("priority", priority, -(2**31), 2**31),
                retries=self._options.retries if retries is None else integer("retries", retries, 0, 1_000_000),
                resources=self._options.resources if resources is None else task_resources(resources),
                tags=self._options.tags if tags is None else task_tags(tags),
                name=self._options.name if name is None else short_name(name),
                group=self._options.group,
                requeue=self._options.requeue if requeue is None else boolean("requeue", requeue),
                backoff=self._options.backoff if backoff is None else seconds("backoff", backoff),
                timeout=self._options.timeout if timeout is None else time_limit("timeout", timeout),
                job=self._options.job if job is None else short_name(job),
            ),
            self._retry_on if retry_on is None else pack_kinds(exception_types(retry_on)),
        )

    def task_group(self) -> TaskGroup:
        """Tasks that belong together, as ``asyncio.TaskGroup``::

            with client.task_group() as group:
                futures = [group.submit(load, part) for part in parts]

        The end of the ``with`` waits for all. The first task that fails cancels the rest, those that run by force, and the
        ``with`` raises an ExceptionGroup of what has failed.
        """
        from .taskgroup import TaskGroup

        return TaskGroup(self)

    @property
    def _max_workers(self) -> int:
        """How many tasks can run at once; dask and joblib read it."""
        return max(1, sum(node.slots for node in self._client.nodes() if node.state == "alive"))

    def _in_group(self, group: bytes) -> TaskOptions:
        """A view whose tasks count on this WaitGroup: up when accepted, down when answered."""
        return TaskOptions(self._client, replace(self._options, group=group), self._retry_on)


class TaskOptions(Tasks):
    """A client with other settings for its tasks; made by :meth:`Client.options`, cheap, not to be shut down."""

    def __init__(self, client: Client, options: Options, retry_on: bytes) -> None:
        self._client = client
        self._options = options
        self._retry_on = retry_on

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Shuts the client itself down."""
        self._client.shutdown(wait, cancel_futures=cancel_futures)
