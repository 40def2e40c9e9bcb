"""A bar for work that is under way: done, failed, running, rate, time left; and why nothing moves, when nothing does.

Rules
-----
* The work knows nothing of its bar: a thread looks at it ten times a second. Nobody waits for that thread but ``close``,
  at most ``CLOSE_S``.
* When nothing has moved for ``STILL_S`` it asks the broker why, and again each time that long has passed. It goes on drawing
  meanwhile.
* tqdm draws, in its notebook form in notebooks; it is imported when the first bar is shown. Who prints while there are bars
  does it in ``tqdm.external_write_mode``, as ``printing.py``.
* A bar that cannot be drawn is given up, and the work goes on. After ``close`` nothing is drawn any more.
* Whoever has a bar closes it; it ends by itself, too, when the work has.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import contextvars
import importlib.util
import math
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures._base import FINISHED, PENDING, RUNNING
from typing import Any, NamedTuple, Protocol

from .options import boolean
from .protocol import Query, Report

INTERVAL_S = 0.1
LOG_INTERVAL_S = 5.0  # where lines are not overwritten but kept
STILL_S = 3.0
SHOWN_AFTER_S = 0.5  # a bar that nobody asked for
CLOSE_S = 1.0
MAX_SHOWN = 2  # reasons
SAMPLE = 1_000  # tasks asked about

_bars: weakref.WeakSet[Bar] = weakref.WeakSet()
_dumb_terminal = threading.Lock()  # held by the bar that is drawn there: one below the other needs a cursor that moves


class Counts(NamedTuple):
    """Of items. ``total``: None if it is not known. ``running``: as far as is known here."""

    total: int | None
    done: int
    failed: int
    running: int


class Work(Protocol):
    """What can have a bar. ``waiting``: items that no worker has, as far as is known here. ``pause``: what it waits for
    itself, "" if for nothing. ``ended``: nothing will move any more."""

    def counts(self) -> Counts: ...
    @property
    def waiting(self) -> int: ...
    @property
    def pause(self) -> str: ...
    @property
    def ended(self) -> bool: ...
    def open_tasks(self) -> list[bytes]:
        """Ids of tasks that are not answered, not all if there are many."""
        ...


class Cluster(Protocol):
    """What answers questions: a client. ``_held_back``: its broker takes no more tasks for now."""

    @property
    def _held_back(self) -> bool: ...
    def _request(self, make: Callable[[int], Any]) -> tuple[int, concurrent.futures.Future[Any]]: ...


def show(progress: bool | None, work: Work, label: str, cluster: Cluster | None) -> Bar | None:
    """A bar for this work, to be closed by the caller; None if none is wanted. ``progress`` None: half a second from now, if
    this is an interactive session.

    Raises
    ------
    TypeError
        ``progress`` is none of True, False and None.
    """
    if progress is None:
        return Bar(work, label, cluster, SHOWN_AFTER_S) if is_interactive() else None
    return Bar(work, label, cluster, 0.0) if boolean("progress", progress) else None


def is_interactive() -> bool:
    """Somebody is watching: a notebook, or a prompt whose errors go to a terminal."""
    return in_notebook() or (hasattr(sys, "ps1") and _is_terminal())


def in_notebook() -> bool:
    """This is a Jupyter kernel."""
    if "ipykernel" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return getattr(shell, "kernel", None) is not None


class Bar:
    """One bar; drawn from ``delay_s`` on, if there is still something to wait for then."""

    def __init__(self, work: Work, label: str, cluster: Cluster | None, delay_s: float) -> None:
        self._work = work
        self._label = label
        self._why = Why(cluster)
        self._delay_s = delay_s
        self._ended = threading.Event()
        _bars.add(self)
        # In this context a notebook knows the cell that the bar belongs to.
        run = contextvars.copy_context().run
        self._began = time.monotonic()
        self._thread = threading.Thread(target=run, args=(self._run,), name="zmqsched progress", daemon=True)
        with contextlib.suppress(RuntimeError):  # the program ends, or the system has no more threads
            self._thread.start()

    def close(self) -> None:
        """Draw how it stands a last time. Idempotent; from the garbage collector too."""
        self._ended.set()
        if threading.current_thread() is not self._thread and self._thread.is_alive():
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        if self._ended.wait(self._delay_s):
            return
        # Standard error may be closed or anybody's own, and a notebook lack what tqdm needs: then there is no bar.
        with contextlib.suppress(Exception), contextlib.ExitStack() as stack:
            dumb = os.environ.get("TERM") == "dumb" and _is_terminal()
            if dumb and not self._take_turn(stack):
                return
            self._draw_until_end(ascii_only=dumb)

    def _take_turn(self, stack: contextlib.ExitStack) -> bool:
        while not _dumb_terminal.acquire(timeout=INTERVAL_S):
            if self._ended.is_set():
                return False
        stack.callback(_dumb_terminal.release)
        return True

    def _draw_until_end(self, *, ascii_only: bool) -> None:
        work = self._work
        bar = _new_bar(self._label, work.counts().total, self._began, ascii_only=ascii_only)
        try:
            interval_s = INTERVAL_S if in_notebook() or _is_terminal() else LOG_INTERVAL_S
            drawn: tuple[object, ...] = ()
            drawn_at = -math.inf
            while not self._ended.is_set() and not work.ended:
                now = time.monotonic()
                counts = work.counts()
                why = self._why.look(counts, work, now)
                if (counts, why) != drawn or now - drawn_at >= 1.0:  # the seconds go on
                    drawn, drawn_at = (counts, why), now
                    _draw(bar, counts, why)
                self._ended.wait(interval_s)
            _draw(bar, work.counts()._replace(running=0), "")
        finally:
            bar.close()


class Why:
    """Says why nothing moves once nothing has for ``STILL_S``. It asks the cluster, and never waits for the answer."""

    def __init__(self, cluster: Cluster | None) -> None:
        self._cluster = cluster
        self._counts: Counts | None = None
        self._since = 0.0
        self._reply: concurrent.futures.Future[Any] | None = None
        self._asked_at = -math.inf
        self._report: Report | None = None
        self._trouble = ""

    def look(self, counts: Counts, work: Work, now: float) -> str:
        """Returns "" while something moves, or nothing is known."""
        if counts != self._counts:
            self._counts, self._since = counts, now
            self._reply = self._report = None
            self._trouble = ""
            return ""
        if now - self._since < STILL_S or self._cluster is None:
            return ""
        if work.pause:
            return work.pause
        if self._reply is not None and self._reply.done():
            self._take(self._reply)
        elif self._reply is not None and now - self._asked_at >= STILL_S:
            return f"the broker has not answered for {now - self._asked_at:.0f} s"
        if self._reply is None and now - self._asked_at >= STILL_S:
            self._ask(work, now)
        return self._trouble or self._words(work)

    def _ask(self, work: Work, now: float) -> None:
        assert self._cluster is not None
        self._asked_at = now
        tasks = work.open_tasks()[:SAMPLE]
        if not tasks:
            self._report = None
            return
        try:
            self._reply = self._cluster._request(lambda request: Query(request, tasks))[1]
        except Exception as error:  # noqa: BLE001 - the client is closed or broken: the work will end, and say why
            self._trouble = str(error)

    def _take(self, reply: concurrent.futures.Future[Any]) -> None:
        self._reply = None
        if reply.exception() is None:
            self._report = reply.result()

    def _words(self, work: Work) -> str:
        if self._report is None:
            return ""
        told = self._report.waiting
        waiting = max(work.waiting, sum(count for count, _ in told))
        if told:
            return f"{waiting:,} waiting: {'; '.join(reason for _, reason in told[:MAX_SHOWN])}"
        if self._cluster is not None and self._cluster._held_back:
            return f"{waiting:,} waiting: the broker holds as much as it may, and takes no more for now"
        return ""


class FutureWork:
    """The work of these futures, of which some may be other executors'."""

    pause = ""

    def __init__(self, futures: Iterable[concurrent.futures.Future[Any]]) -> None:
        self._open = list(futures)
        self._total = len(self._open)
        self._failed = 0
        self._look_again_at = 0.0
        self._running = 0

    def counts(self) -> Counts:
        self._look()
        return Counts(self._total, self._total - len(self._open) - self._failed, self._failed, self._running)

    @property
    def ended(self) -> bool:
        self._look()
        return not self._open

    @property
    def waiting(self) -> int:
        return len(self._open) - self._running

    def open_tasks(self) -> list[bytes]:
        return [task for future in self._open if (task := getattr(future, "_task", None)) is not None]

    def _look(self) -> None:
        """At all of them; if they are many, so seldom that it takes a twentieth of the time."""
        began = time.monotonic()
        if began < self._look_again_at:
            return
        still = []
        running = 0
        for future in self._open:
            state = future._state  # read once: it changes
            if state in (PENDING, RUNNING):
                still.append(future)
                running += state == RUNNING
            elif state != FINISHED or _has_failed(future):
                self._failed += 1
        self._open, self._running = still, running
        now = time.monotonic()
        self._look_again_at = now + min(1.0, 20 * (now - began))


def _has_failed(future: concurrent.futures.Future[Any]) -> bool:
    """Without unpickling anything."""
    final = getattr(future, "_final", None)
    return final.verdict != "ok" if final is not None else future._exception is not None


def _is_terminal() -> bool:
    try:
        return sys.stderr.isatty()
    except Exception:  # noqa: BLE001 - closed, None, or somebody's own
        return False


def _new_bar(label: str, total: int | None, began: float, *, ascii_only: bool) -> Any:
    if importlib.util.find_spec("ipywidgets") is None:  # in a notebook tqdm.auto would complain of that, in the user's cell
        from tqdm import tqdm
    else:
        from tqdm.auto import tqdm

    class Drawn(tqdm):  # type: ignore[misc]  # it comes without types
        monitor_interval = 0  # of a thread that helps loops which seldom update

        def refresh(self, nolock: bool = False, lock_args: object = None) -> bool:
            """As tqdm's, which keeps its lock when drawing raises, and thereby stops all bars of the process."""
            if not self.disable:
                with contextlib.nullcontext() if nolock else self.get_lock():
                    self.display()
            return True

        def close(self) -> None:
            """As tqdm's, which leaves a copy behind of each bar below, when these move down."""
            if not getattr(self, "disable", True):
                with self.external_write_mode(file=self.fp):
                    super().close()

    plain = True if ascii_only else None
    bar = Drawn(desc=label, total=total, mininterval=0, miniters=0, ascii=plain, **_size())
    bar.start_t -= time.monotonic() - began
    bar.last_print_t = bar.start_t
    return bar


def _size() -> dict[str, Any]:
    """tqdm asks the terminal each time. To one that does not know (in Emacs, in containers) it would draw nothing at all."""
    with contextlib.suppress(Exception):
        if os.get_terminal_size(sys.stderr.fileno()).columns == 0:
            return {"ncols": 80, "nrows": 24}
    return {"dynamic_ncols": True}


def _draw(bar: Any, counts: Counts, why: str) -> None:
    total, done, failed, running = counts
    if total != bar.total:  # an iterator has come to its end
        bar.total = total
        if (widgets := getattr(bar, "container", None)) is not None:
            widgets.children[1].max = total
    words = [f"{failed:,} failed"] if failed else []
    words += [f"{running:,} running"] if running else []
    bar.set_postfix_str(", ".join(words), refresh=False)
    bar.bar_format = None
    if why:  # instead of the bar itself
        of_all = "" if total is None else "/{total_fmt}"
        left = _left(bar, total, done + failed) if total and done + failed else ""
        words_as_they_are = why.replace("{", "{{").replace("}", "}}")
        bar.bar_format = f"{{desc}}: {{n_fmt}}{of_all} [{{elapsed}}{left}{{postfix}}] {words_as_they_are}"
    if step := done + failed - bar.n:
        bar.update(step)  # which draws, and learns how fast it goes
    else:
        bar.refresh()


def _left(bar: Any, total: int, ended: int) -> str:
    """The time left, by the rate since the beginning: tqdm's is that of the last moments, and nothing moves."""
    return f"<{bar.format_interval(bar.format_dict['elapsed'] * (total - ended) / ended)}"


@atexit.register
def _close_all() -> None:
    for bar in list(_bars):
        bar.close()
