"""Chaos with real processes: they are killed, frozen and cut off while tasks run, and each promise is checked.

Rules
-----
* Executions are counted independently of zmqsched: each task writes a line to a :class:`~chaos.ledger.Ledger` when it begins
  and when it ends.
* A scenario is a function that starts its own :class:`~chaos.fleet.Fleet`, breaks something, asserts what must never be
  otherwise (nothing lost, nothing answered twice or wrongly, nothing left behind) and returns its measurements as
  :class:`~chaos.figures.Figure`. Times are measured, never asserted: they are the machine's as much as ours.
* Each scenario has a long form (``make chaos``) and a short one, run by the tests. Both are the same code.
"""
