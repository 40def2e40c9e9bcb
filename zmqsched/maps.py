"""``client.map`` and ``starmap``: what is asked for, checked, and the :class:`Map` that gives the results.

What runs is in ``mapping.py``, what has come of it in ``gathered.py``; here is the handle. It is the caller's alone, so that
one which is dropped ends the map; ``client.last_map`` makes another one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from .display import Sheet, Shown, as_line
from .gathered import NOT_KEPT
from .mapping import Run
from .options import boolean
from .payload import Seed, short_form
from .plan import Plan
from .progress import Bar, show
from .sources import Listed, source_of

if TYPE_CHECKING:
    import numpy as np

    from .client import Client
    from .tasks import Tasks

T = TypeVar("T")

logger = logging.getLogger("zmqsched")


class Map(Shown, Iterator[T], Generic[T]):
    """The results of a map, in order or as they come: an iterator. Made by :meth:`Client.map`, :meth:`Client.starmap`.

    A map goes on by itself, read or not. It ends early when it is closed or dropped in the middle of being read, when the
    error of an item is raised, or when its ``timeout`` is over: then what has not started never will. KeyboardInterrupt
    while results are waited for also ends what runs.

    What was finished is kept until the last result has been read, also what was read before: :meth:`results`.
    """

    def __init__(self, client: Client, run: Run, bar: Bar | None = None) -> None:
        self._client = client
        self._run = run
        self._bar = bar
        self._results: Generator[T, None, None] = _results(run, bar)
        self._next = self._results.__next__

    # The generator's own, with no Python code in between: an interrupt comes there, and is never outside of its ``try``.
    __next__ = property(attrgetter("_next"))

    def close(self) -> None:
        """End the map: what has not started never will, and there are no more results."""
        self._run.stop()
        with contextlib.suppress(ValueError):  # another thread is waiting for the next result: it is told
            self._results.close()
        if self._bar is not None:
            self._bar.close()

    @property
    def total(self) -> int | None:
        """How many items there are; None as long as nobody knows."""
        return self._run.total

    @property
    def done(self) -> int:
        """How many items have been computed, read or not."""
        return self._run.counts().done

    @property
    def failed(self) -> int:
        """How many items have failed."""
        return self._run.counts().failed

    @property
    def running(self) -> int:
        """How many items are being computed."""
        return self._run.counts().running

    @property
    def failures(self) -> dict[int, BaseException]:
        """The errors of the items that have failed, by index."""
        return {self._run.plan.index(position): error for position, (error, _) in self._run.failures().items()}

    def results(self) -> dict[int, T]:
        """What is finished, by index, also when the map was interrupted or closed; does not wait.

        Everything, until the last result has been read, then nothing; of more than 1 GiB what was read first goes first.
        """
        return self._run.results()

    def summary(self) -> str:
        """How many items have failed, and below that a line for each type and place, the most frequent first."""
        return _summary(self._run)

    def retry_failed(self) -> Map[T]:
        """The same for the items that have failed, with the same options, as another map: its results are in the order of
        their indices, which are what they were (as are the random numbers of ``seed``). ``timeout`` counts anew.

        Items whose result could not be unpickled here are left out: they did not fail.
        """
        kept = [(at, item) for at, (_, item) in self._run.failures().items() if item is not NOT_KEPT]
        plan = self._run.plan
        numbers = [plan.index(position) for position, _ in kept]
        until = None if plan.timeout is None else time.monotonic() + plan.timeout
        again = replace(plan, numbers=numbers, until=until)
        return _started(self._client, Run(self._client, again, Listed(iter([item for _, item in kept]), len(kept))))

    _repr_pretty_ = Shown._repr_pretty_  # beside __repr__, for IPython takes of each class what it finds there

    def __repr__(self) -> str:
        sheet = self._sheet()
        return as_line(replace(sheet, facts=sheet.facts[:1]))

    def _sheet(self) -> Sheet:
        total, done, failed, running = self._run.counts()
        of = "?" if total is None else f"{total:,}"
        counts = f"{done:,} of {of} done, {failed:,} failed, {running:,} running"
        return Sheet("zmqsched.Map", facts=[("items", counts), *(("failed", line) for line in self._run.summary())])


def _results(run: Run, bar: Bar | None) -> Generator[Any, None, None]:
    try:
        while (values := run.next_values()) is not None:
            yield from values
    except GeneratorExit:
        bar = None  # this may be the garbage collector's thread; the bar ends with the run
        raise
    except KeyboardInterrupt:
        run.stop(force=True)
        raise
    finally:
        if bar is not None:
            bar.close()
    if run.plan.returns and run.counts().failed:
        logger.warning("%s", _summary(run))


def _summary(run: Run) -> str:
    total, done, failed, _ = run.counts()
    of = f"{done + failed:,}"
    if total != done + failed:
        of += " finished" if total is None else f" finished ({total:,} in all)"
    return "\n  ".join([f"{failed:,} items of {of} have failed", *run.summary()])


def start(
    tasks: Tasks,
    fn: Callable[..., Any],
    iterables: tuple[Iterable[Any], ...],
    *,
    spread: bool,
    timeout: float | None,
    chunksize: int | Literal["auto"],
    buffersize: int | None,
    ordered: bool,
    on_error: Literal["raise", "return"],
    seed: int | np.random.SeedSequence | None,
    progress: bool | None,
) -> Map[Any]:
    """A map that is under way."""
    if not callable(fn):
        raise TypeError(f"map needs a callable, not {type(fn).__name__}")
    if progress is not None:
        boolean("progress", progress)
    client, options = tasks._client, tasks._options
    size = 1 if options.job else _chunksize(chunksize)
    limit = math.inf if buffersize is None else _buffersize(buffersize) * (size or 1)
    if on_error not in {"raise", "return"}:
        raise ValueError(f"""on_error is "raise" or "return", not {on_error!r}""")
    plan = Plan(
        fn, options, tasks._retry_on, spread or len(iterables) > 1, size, limit, bool(ordered), on_error == "return",
        None if seed is None else _seed(fn, seed), timeout, _until(timeout), progress=progress,
    )  # fmt: skip
    client._check_usable()
    if options.job:  # its tasks outlive this client, so they are all submitted now
        items = list(iterables[0] if len(iterables) == 1 else zip(*iterables, strict=False))
        return _started(client, Run(client, plan, Listed(iter(items), len(items))))
    return _started(client, Run(client, plan, source_of(iterables)))


def _started(client: Client, run: Run) -> Map[Any]:
    run.start()
    label = run.plan.options.name or short_form(run.plan.fn).rpartition(".")[2].strip("<>")
    handle: Map[Any] = Map(client, run, show(run.plan.progress, run, label, client))
    weakref.finalize(handle, run.drop).atexit = False
    return handle


def _chunksize(chunksize: int | str) -> int:
    """0 for automatic."""
    if chunksize == "auto":
        return 0
    if isinstance(chunksize, bool) or not isinstance(chunksize, int):
        raise TypeError(f"""chunksize is a number of items, or "auto", not {chunksize!r}""")
    if chunksize < 1:
        raise ValueError(f"chunksize must be at least 1, not {chunksize}")
    return chunksize


def _buffersize(buffersize: int) -> int:
    if isinstance(buffersize, bool) or not isinstance(buffersize, int):
        raise TypeError("buffersize must be an integer or None")
    if buffersize < 1:
        raise ValueError("buffersize must be None or > 0")
    return buffersize


def _until(timeout: float | None) -> float | None:
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise TypeError(f"timeout is a number of seconds, not {type(timeout).__name__}")
    if math.isnan(timeout):
        raise ValueError("timeout must be a number of seconds, not nan")
    return time.monotonic() + min(timeout, threading.TIMEOUT_MAX)


def _seed(fn: Callable[..., Any], seed: int | np.random.SeedSequence) -> Seed:
    if importlib.util.find_spec("numpy") is None:
        raise ModuleNotFoundError("seed= makes numpy.random.Generators: install numpy, here and on the nodes", name="numpy")
    _check_takes_rng(fn)
    if isinstance(seed, bool):
        raise TypeError("seed is a number, not a bool")
    if isinstance(seed, int):
        if seed < 0:
            raise ValueError(f"seed must be at least 0, not {seed}")
        return seed, ()
    entropy, key = getattr(seed, "entropy", None), getattr(seed, "spawn_key", None)
    if entropy is None or key is None:
        raise TypeError(f"seed is an int or a numpy.random.SeedSequence, not {type(seed).__name__}")
    return entropy, tuple(key)


def _check_takes_rng(fn: Callable[..., Any]) -> None:
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # a builtin that does not tell
        return
    kinds = {p.kind for p in parameters if p.name == "rng"} | {p.kind for p in parameters if p.kind is p.VAR_KEYWORD}
    if not kinds - {inspect.Parameter.POSITIONAL_ONLY}:
        raise TypeError(f"seed= calls the function with rng=, a numpy.random.Generator, and {fn!r} takes no argument rng")
