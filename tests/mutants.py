"""Known bugs, to be planted in the cores, and the search for the first seed at which the simulator finds each.

A mutant replaces text of one module, in a process of its own. Text that is not there exactly once is an error: a gate
whose bugs cannot be planted any more must not stand open.

    python tests/mutants.py            tell for each mutant at which seed
    python tests/mutants.py NAME 100   search with this one, within so many seeds
"""

from __future__ import annotations

import subprocess
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
NOTHING = "nothing"  # the name of a bug that is none
WITHIN = 1_000  # seeds, from 0 on; each run of the tests simulates more. Most are found among the first 10


class Mutant(NamedTuple):
    module: str  # in zmqsched.core
    replaced: tuple[tuple[str, str], ...]


def _one(module: str, old: str, new: str) -> Mutant:
    return Mutant(module, ((old, new),))


MUTANTS = {
    # the journal
    "what was received is acknowledged before it is written": _one(
        "scheduler", "cautious=settings.journal", "cautious=False"
    ),
    "an answer is told before it is written": _one(
        "book",
        "            self.ledger.answer(owner.id, final)",
        "            self.ledger.answer(owner.id, final); self.written(owner.id, final)",
    ),
    "what may be started only once is started before that is written": _one(
        "dispatching", "tasks if book.ledger is None else self._dispatch_once(book.ledger, node, tasks)", "tasks"
    ),
    "what may have been started before a crash is queued again": _one(
        "recovery", "for task_id in once & book.tasks.keys():", "for task_id in ():"
    ),
    "a journal written anew lacks the answers": _one(
        "recovery", "answers = [*owner.answers.values(), *owner.unwritten.values()]", "answers: list[Final] = []"
    ),
    "a broker that lacks a task does not say so": _one(
        "book", "self.sessions.send(session, Unknown(unknown))", "self.sessions.send(session, Unknown([]))"
    ),
    # delivery
    "a message that was lost is not sent again": _one(
        "link", "for seq, body in self._unacked if seq > after]", "for seq, body in self._unacked if False]"
    ),
    "a pong that proves a loss is ignored": _one("link", "self._resend_after = pong.received", "pass"),
    "a message that comes twice is taken twice": _one(
        "link", "if envelope.seq != self.received + 1:", "if envelope.seq > self.received + 1:"
    ),
    "a task that is submitted again is another task": _one(
        "book", "if spec.task in tasks or owner.has_answered(spec.task):", "if False:"
    ),
    "a client does not submit again to another broker": _one(
        "requests", "self._wait_again(self._open.values())", "self._wait_again([])"
    ),
    "a client does not ask again what it waits for": _one("requests", "[*again, *self._asked.values(),", "[*again,"),
    "a client hands out an answer twice": _one(
        "requests", "entry = self._open.pop(task, None)", "entry = self._open.get(task)"
    ),
    "a function that a node has forgotten is not sent again": _one(
        "scheduler", "known = [Function(d, functions[d]) for d in digests if d in functions]", "known = []"
    ),
    "a function that the broker has forgotten is not sent again": _one(
        "requests",
        "known = [Function(digest, self._functions[digest]) for digest in digests if digest in self._functions]",
        "known = []",
    ),
    # answers
    "a late result answers a task that was answered": Mutant(
        "book",
        (
            (
                "        del self.tasks[task.id]\n",
                "        self.__dict__.setdefault('_gone', {})[task.id] = task\n        del self.tasks[task.id]\n",
            ),
            (
                '                self.counts["zombie results"] += 1\n',
                '                self.counts["zombie results"] += 1\n'
                "                gone = self.__dict__.get('_gone', {}).get(outcome.task)\n"
                "                if task is None and gone is not None and self.owners.knows(gone.owner):\n"
                "                    self._keep(gone.owner, Final(gone.id, 'ok', outcome.value))\n",
            ),
        ),
    ),
    "the attempt that a result names is not looked at": _one(
        "book",
        "current = (task.node == node.id and task.attempt == outcome.attempt)",
        "current = task.node == node.id",
    ),
    "an error of an attempt that was given up decides": _one(
        "book", "if task is None or not outcome.ok:", "if task is None:"
    ),
    "a retry is counted on the WaitGroup again": _one(
        "book",
        'self.counts["retried"] += 1',
        'self.counts["retried"] += 1; task.kind.options.group and self.counting.groups.begin(task.kind.options.group)',
    ),
    "what an attempt has counted counts though it died": _one(
        "counting", "for counted in (debts.counted, *(", "for counted in (_NOTHING, *("
    ),
    "what was counted at a node that was given up is forgotten": _one(
        "counting", "        changes.update(debts.counted)\n", ""
    ),
    "a task that ended without counting down owes for ever": _one(
        "counting", "for group, text, overdue in self.groups.overdue():", "for group, text, overdue in ():"
    ),
    "what a task has added is owed for ever when it ended without counting that down": _one(
        "counting", "return max(0, self.counted", "return self.counted.get(group, 0) >= 0 and max(0, 0 * self.counted"
    ),
    "a task that ended without counting down has its debt settled twice": _one(
        "counting",
        "            self.answer(self.groups.lose(group, text, debts))\n\n",
        "            self.answer(self.groups.lose(group, text, debts) + self.groups.lose(group, text, debts))\n\n",
    ),
    # tasks that have tasks
    "what a task submits does not wait for what it has counted": _one(
        "fences", "        self._behind.append(event)\n        return True", "        return False"
    ),
    "what a task's tasks have counted counts though its attempt died": _one(
        "counting", "*(self._debts(child).counted for child, _ in orphans)", ""
    ),
    "a child that has failed is counted down for good, though its parent is run again": _one(
        "counting", "            debts = self._charge_parents(group, text, overdue)\n", "            debts = overdue\n"
    ),
    "a cancelled task is queued again and runs": _one(
        "book",
        "        if task.cancelled:\n            self.finish(task",
        "        if False:\n            self.finish(task",
    ),
    # tasks that wait for others
    "a task is placed before its inputs are here": _one(
        "book", "if task.state is WAITING and not task.lacks and", "if task.state is WAITING and"
    ),
    "what waits for an input that failed waits for ever": _one(
        "dependencies", "self._fail(self.inputs.waiting_for(task.id), task, final)", "pass"
    ),
    "a client does not say how an input had ended": _one("requests", "self._give_inputs(tasks)", "pass"),
    # death and blame
    "all that lay in a dead worker's pipe is blamed": _one(
        "agent",
        "        self._taken_back(worker, untaken, now)\n",
        "        self._reports.deaths += [Death(worker.id, pid, how, run.task, run.attempt) for run in untaken]\n"
        "        self._taken_back(worker, untaken, now)\n",
    ),
    "a task may kill workers for ever": _one(
        "book", "elif len(task.deaths) >= self._settings.max_deaths:", "elif False:"
    ),
    "a retry is counted as a death": _one(
        "book",
        "                self._retry(task)\n",
        "                task.deaths += ('retried',)\n"
        "                if len(task.deaths) >= self._settings.max_deaths:\n"
        "                    self._retry(task) or self._fail(task, 'it died too often')\n"
        "                else:\n"
        "                    self._retry(task)\n",
    ),
    "what a lost node held is not queued again": _one(
        "book", "for task in reversed(list(node.tasks.values())):", "for task in []:"
    ),
    "a task that must not run twice is queued again when its node is lost": _one(
        "book", "if task.kind.options.requeue or task.cancelled:", "if True:"
    ),
    "a client that submits again forgets what must not run twice": _one(
        "requests", "if not welcome.remembered:", "if False:"
    ),
    # life
    "a node starts work without a lease": _one("agent", "elif self._uplink.has_lease(now):", "else:"),
    "a pause of the broker is taken for silence of the nodes": _one(
        "scheduler", "if gap > 1.5 * self.settings.beat_interval_s:", "if False:"
    ),
    "a node is given up before it could answer the ping": _one(
        "scheduler", "due = now + self.settings.ping_grace_s", "due = now; node.pinged_at -= self._grace()"
    ),
    "a silent client is never given up": _one("scheduler", "now - session.heard_at > self.settings.client_lease_s", "False"),
    # credit
    "what a node hands back is not taken back": _one(
        "book", "for attempt in reversed(message.returned):", "for attempt in []:"
    ),
    "credit falls and never rises": _one(
        "scheduler", "if message.credit != node.credit:", "if message.credit < node.credit:"
    ),
    "a node is given more than its credit": _one("nodes", "self.state is ALIVE and len(self.tasks) < self.credit", "True"),
    "a node that drains is given new tasks": _one(
        "nodes", "self.state is ALIVE and len", "self.state in (ALIVE, DRAINING) and len"
    ),
    "a node that is paused is given new tasks": _one(
        "nodes", "self.state is ALIVE and len", "self.state in (ALIVE, PAUSED) and len"
    ),
    "a node that is to leave is given tasks that take longer": _one(
        "nodes", "if gone or not node.lasts(lane.length_s, now):", "if gone:"
    ),
    "a worker is given more tasks than it may run": _one(
        "giving", "min(depth, worker.left) - len", "depth - len"
    ),
    "a worker that has run all it may is not replaced": _one(
        "crew", "in self._worn.values() if", "in self._worn.values() if False and"
    ),
    "a node does not go when its time is up": _one("agent", "if now >= self._leave_by:", "if False:"),
    "a node counts orphans that have ended": _one(
        "agent", "        self._orphans -= held.orphan\n        for name", "        for name"
    ),
    "a node that drains goes by the time when it was idle last": _one(
        "agent", "self._go_at = math.inf\n            return", "return"
    ),
    # time limits and cancels by force
    "an interrupted worker is given a task before its interrupt has come": _one(
        "stops", "(self.acknowledged and self.step < KILLED)", "self.step < KILLED"
    ),
    "a task is charged with the death of a worker that its node has killed": _one(
        "agent", "if worker.ending is not None and worker.ending.interrupted:\n", "if False:\n"
    ),
    "a worker that ignores its interrupt is not killed": _one("stops", "return [Kill(worker)]", "return []"),
    "a time limit is forgotten": _one("agent", "if age >= first.limit_s and worker.ending is None:", "if False:"),
    "an interrupted task's error is its own": _one(
        "agent", "if ending is not None and ending.interrupted and not done.ok:", "if False:"
    ),
    "a node takes its broker to know its credit after an adoption": _one(
        "agent",
        "self._reports.credit = self._wanted_credit(now)\n        self._uplink.send(Progress(self._reports.credit))",
        "self._reports.credit = max(self._reports.credit, len(self._held) - self._orphans)",
    ),
    "a retry that is waited for is forgotten": _one(
        "book", "self.delayed.set(task.id, self.now + wait_s", "(task.id, self.now + wait_s"
    ),
}

# Of those that are hardly found: where they were found last, for the search to begin there. It goes on from 0.
NEAR = {
    "what was received is acknowledged before it is written": 185,
    "an answer is told before it is written": 156,
    "what may be started only once is started before that is written": 101,
    "a child that has failed is counted down for good, though its parent is run again": 100,
    "a task is charged with the death of a worker that its node has killed": 98,
    "what a task submits does not wait for what it has counted": 194,
    "a node takes its broker to know its credit after an adoption": 281,
}


class Planter(MetaPathFinder):
    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != f"zmqsched.core.{self._mutant.module}":
            return None
        spec = PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.origin is not None
        spec.loader = Planted(name, spec.origin, self._mutant)
        return spec


class Planted(SourceFileLoader):
    def __init__(self, name: str, path: str, mutant: Mutant) -> None:
        super().__init__(name, path)
        self._mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        return compile(planted(self._mutant), self.path, "exec")


def planted(mutant: Mutant) -> str:
    """The module's source with the bug in it."""
    source = (ROOT / "zmqsched" / "core" / f"{mutant.module}.py").read_text()
    for old, new in mutant.replaced:
        if (times := source.count(old)) != 1:
            raise LookupError(f"core/{mutant.module}.py has this {times} times, not once: {old!r}")
        source = source.replace(old, new)
    return source


def search(name: str, within: int = WITHIN) -> tuple[int, str]:
    """At which seed it was found, and as what; or raise AssertionError."""
    command = [sys.executable, __file__, name, str(within)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
    seed, _, what = done.stdout.partition(" ")
    return int(seed), what.strip()


def main() -> int:
    if len(sys.argv) == 1:
        for name in MUTANTS:
            seed, what = search(name)
            print(f"{seed:4}  {name}: {what}"[:180], flush=True)
        return 0
    name, within = sys.argv[1], int(sys.argv[2])
    sys.path.insert(0, str(ROOT))
    if name != NOTHING:
        sys.meta_path.insert(0, Planter(MUTANTS[name]))
    from zmqsched.sim import simulate

    near = NEAR.get(name, 0)
    for seed in (*range(near, within), *range(near)):
        try:
            simulate(seed)
        except (NameError, AttributeError, TypeError):
            raise  # the planted code is wrong in another way than it is meant to be
        except Exception as error:  # noqa: BLE001 - whatever a core raises is a find
            print(seed, f"{type(error).__name__}: {error}".replace("\n", " "))
            return 0
    print(f"not found within {within} seeds")
    return 1


if __name__ == "__main__":
    sys.exit(main())
