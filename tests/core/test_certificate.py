"""What a death certificate says, and that it always fits into a message."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from zmqsched.codec import decode, encode
from zmqsched.core.certificate import MAX_ENTRY, MAX_TEXT, certificate, entry
from zmqsched.protocol import Death, Envelope, Final, Finals, Remains

TASK = b"sixteen byte id."
STACK = '  File "/home/me/model.py", line 7 in step\n  File "/home/me/model.py", line 5 in train'


def death(attempt: int = 1, how: str = "killed by SIGSEGV", ran_s: float = 0.25, **remains: object) -> Death:
    return Death(3, 4711, how, TASK, attempt, ran_s, Remains(**remains))  # type: ignore[arg-type]


def test_an_entry_tells_all_that_is_known():
    told = entry(death(2, stack=STACK, stderr="loading\noops\n", memory=100 << 20, peak=140 << 20), "n1/3 on box", 1.24, ())
    assert told.splitlines() == [
        "worker n1/3 on box (pid 4711): killed by SIGSEGV",
        "    attempt 2 ran for 250 ms, and died 1.2 s after the first worker that died",
        "    memory: 100 MiB when last measured, 140 MiB at most",
        "    the end of its stderr:",
        "      loading",
        "      oops",
        "    its Python stack, latest call first:",
        '        File "/home/me/model.py", line 7 in step',
        '        File "/home/me/model.py", line 5 in train',
    ]


def test_what_is_not_known_is_not_told():
    told = entry(death(), "n1/3 on box", None, ())
    assert told.splitlines() == ["worker n1/3 on box (pid 4711): killed by SIGSEGV", "    attempt 1 ran for 250 ms"]


def test_the_kernels_killing_is_told_as_likely():
    told = entry(death(how="killed by SIGKILL", oom=True, peak=1 << 30), "n1/3 on box", None, ())
    assert told.splitlines()[:2] == [
        "worker n1/3 on box (pid 4711): killed by SIGKILL",
        "    by the kernel's OOM killer (likely)",
    ]
    assert "memory: 1024 MiB at most" in told


def test_a_stack_is_told_once():
    first = entry(death(stack=STACK), "n1/3 on box", None, ())
    second = entry(death(2, stack=STACK), "n1/4 on box", 2.0, (first,))
    third = entry(death(3, stack=STACK + "\n  File 'elsewhere'"), "n1/5 on box", 3.0, (first, second))
    assert second.endswith("    the same Python stack as before")
    assert third.endswith("elsewhere'")


def test_a_certificate_names_the_call():
    assert certificate("train failed: why", "Model.fit", ("an entry", "another")).splitlines() == [
        "train failed: why",
        "  the call: Model.fit(...)",
        "  an entry",
        "  another",
    ]
    assert certificate("train failed: why", "", ()) == "train failed: why"


def test_of_a_long_entry_the_stacks_far_end_is_lost():
    frames = "\n".join(f'  File "deep.py", line {line} in f' for line in range(200))
    told = entry(death(how="h" * 15_000, stack=frames, stderr="the end"), "n1/3 on box", None, ())
    assert len(told) == MAX_ENTRY
    assert "the end" in told
    assert "line 0 in f" in told
    assert "line 199 in f" not in told
    assert told.endswith(" [...]")


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 30), st.text(max_size=50), st.integers(0, 30_000), st.sampled_from("x\n\U0001f600"))
def test_a_certificate_fits_into_a_message(deaths, head, size, what):
    stories = ()
    for number in range(deaths):
        stories += (entry(death(number, stack=what * min(size, 8192), stderr=f"{number}" + what * 4000), "w", 1.0, ()),)
    text = certificate(head * 1000, "f" * 255, stories)
    assert len(text) <= MAX_TEXT <= 64 * 1024
    final = Final(TASK, "WorkerDied", text=text)
    assert decode(encode(Envelope(1, 1, 1, Finals([final])))).body == Finals([final])
