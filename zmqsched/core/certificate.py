"""A death certificate: what a task's ``WorkerDied`` says of the workers that died running it.

Rules
-----
* An entry is made when a worker dies and is all that is kept of the death: at most ``MAX_ENTRY`` characters, cause and times
  first, the stack last, so that a cut takes the stack's far end before anything else.
* Durations only. How long the worker ran is by its node's clock, how long after the first death it died by the broker's; the
  two are never compared.
* All entries of a task fit into one ``Final``: beyond three each gets less.
"""

from __future__ import annotations

from ..protocol import Death

MAX_ENTRY = 20_000
MAX_TEXT = 3 * MAX_ENTRY + 2_000  # below the limit of protocol.Text
_MIB = 2**20


def entry(death: Death, where: str, after_first_s: float | None, before: tuple[str, ...]) -> str:
    """How one attempt ended.

    Parameters
    ----------
    where
        The worker, readably.
    after_first_s
        Seconds since the first worker died of this task; None if this is the first.
    before
        The entries so far: a stack that was told is not told again.
    """
    left = death.remains
    lines = [f"worker {where} (pid {death.pid}): {death.how}"]
    if left.oom:
        lines.append("by the kernel's OOM killer (likely)")
    after = "" if after_first_s is None else f", and died {_seconds(after_first_s)} after the first worker that died"
    lines.append(f"attempt {death.attempt} ran for {_seconds(death.ran_s)}{after}")
    if left.memory or left.peak:
        measured = f"{_mib(left.memory)} when last measured, " if left.memory else ""  # it may have lived less than a beat
        lines.append(f"memory: {measured}{_mib(left.peak)} at most")
    text = "\n    ".join(lines)
    text += _block("the end of its stderr", left.stderr)
    stack = _block("its Python stack, latest call first", left.stack)
    text += "\n    the same Python stack as before" if stack and any(stack in other for other in before) else stack
    return _cut(text, MAX_ENTRY)


def certificate(head: str, call: str, entries: tuple[str, ...]) -> str:
    """The whole, of at most ``MAX_TEXT`` characters."""
    share = min(MAX_ENTRY, (MAX_TEXT - 1_000) // max(1, len(entries)))
    lines = [head, *([f"the call: {call}(...)"] if call else []), *(_cut(text, share) for text in entries)]
    return _cut("\n  ".join(lines), MAX_TEXT)


def _block(title: str, text: str) -> str:
    if not text:
        return ""
    return "".join([f"\n    {title}:", *(f"\n      {line.rstrip()}" for line in text.splitlines())])


def _seconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _mib(size: int) -> str:
    return f"{size / _MIB:.0f} MiB" if size else "unknown"


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else text[: size - 6] + " [...]"
