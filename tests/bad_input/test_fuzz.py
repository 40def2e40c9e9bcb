"""The fuzzer in short; ``make fuzz`` is the long run."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import fuzz

from zmqsched.core.scheduler import Scheduler

ROOT = Path(__file__).parent.parent.parent


def test_twenty_thousand_senseless_messages():
    command = [sys.executable, "-m", "tests.fuzz", "--messages", "20000", "--seed", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    told = {line.split("  ")[-1] for line in done.stdout.splitlines()}
    assert "peak memory grew by" in done.stdout
    # It gets behind the codec, and behind the first check of each core.
    assert {"codec: still a message", "accepted", "ok", "unknown session", "zombie results", "dropped: Query from a node",
            "dropped: answer to what is not running", "dropped: Beat from the broker"} <= told  # fmt: skip


def test_what_raises_is_found_and_its_story_told_again(monkeypatch, capsys):
    def fails(self, session, message):
        raise KeyError("a bug")

    monkeypatch.setattr(Scheduler, "_misplaced", fails)
    assert fuzz.main(["--messages", "5000"]) == 1
    said = capsys.readouterr().err
    assert "KeyError: 'a bug'" in said
    story = said.rsplit("--story ", 1)[1].strip()
    assert fuzz.main(["--story", story]) == 1
    assert "KeyError: 'a bug'" in capsys.readouterr().err
    monkeypatch.undo()
    assert fuzz.main(["--story", story]) == 0


def test_each_message_is_made_by_its_types():
    maker = fuzz.Maker(Random(1))
    made = Counter(type(maker.message((*fuzz.MESSAGES, *fuzz.PIPE_MESSAGES))) for _ in range(5_000))
    assert made.keys() == {*fuzz.MESSAGES, *fuzz.PIPE_MESSAGES}
