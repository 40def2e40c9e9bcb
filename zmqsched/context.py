"""What code can know and say of the task that it runs in: :func:`get_task`."""

from __future__ import annotations

from numbers import Real

from . import worker
from .payload import short_form
from .protocol import Advanced, Run

_SLACK = 1e-9  # what adding up fractions may be off


class Task:
    """The task that runs in this worker; made by :func:`get_task`.

    ``id``: 32 hexadecimal digits. ``attempt``: from 1; more after a retry, or after a worker or node died.
    """

    def __init__(self, now: worker.Now, run: Run) -> None:
        self._now = now
        self._run = run
        self.id = run.task.hex()
        self.attempt = run.attempt

    @property
    def name(self) -> str:
        """As given by ``options(name=...)``, else the function's."""
        function = self._now.function
        return self._run.name or ("" if function is None or self._is_over else short_form(function))

    @property
    def cancelled(self) -> bool:
        """Whether its end was asked for: at its time limit, or because it was cancelled by force. The main thread gets a
        KeyboardInterrupt then; other threads, and code that catches it, can look here. Also True when the task is over.
        """
        return self._is_over or self._now.cancelled

    def progress(self, fraction: float, text: str = "") -> None:
        """Say how far the task has come: from 0 to 1, and in a few words (of which 200 characters are kept).

        ``future.progress`` shows the latest some ten times a second, so this may be called as often as one likes: it takes
        about a microsecond, and a system call ten times a second.

        Raises
        ------
        ValueError
            ``fraction`` is not a number from 0 to 1.
        """
        number: object = fraction  # NumPy's count too
        if isinstance(number, bool) or not isinstance(number, Real) or not -_SLACK <= float(number) <= 1 + _SLACK:
            raise ValueError(f"progress is a number from 0 to 1, not {fraction!r}")
        if not isinstance(text, str):
            raise TypeError(f"the text of progress is a str, not {type(text).__name__}")
        if self._is_over:
            return
        part = min(1.0, max(0.0, float(fraction)))
        if self._now.voice.advance(self._run.task, self._run.attempt, part, text):
            worker.tell(Advanced())

    @property
    def _is_over(self) -> bool:
        return self._now.run is not self._run

    def __repr__(self) -> str:
        return f"<zmqsched task {self.name} {self.id}, attempt {self.attempt}>"

    def __reduce__(self) -> tuple[object, ...]:
        raise TypeError("what get_task() gives belongs to the process that runs the task; send its id")


def get_task() -> Task:
    """The task that this code is part of, in any of its threads.

    A batch of items that ``map`` has made is one task. A thread that goes on when its task has ended finds the next one.

    Raises
    ------
    RuntimeError
        Outside of a task.
    """
    now = worker.now()
    run = None if now is None else now.run
    if now is None or run is None:
        raise RuntimeError("get_task() is for code that runs in a task: this process runs none at the moment")
    return Task(now, run)
