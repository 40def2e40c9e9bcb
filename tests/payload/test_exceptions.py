"""What a task raised arrives as itself, or as text."""

from __future__ import annotations

import json
import linecache
import sys
import threading
import traceback
import types

import pytest
from conftest import told
from samples import Explosive

from zmqsched.errors import RemoteError
from zmqsched.payload import origin_of, pack_exception, unpack_exception
from zmqsched.payload.tracebacks import MAX_FRAMES


def raised(exc: BaseException) -> BaseException:
    try:
        raise exc
    except BaseException as caught:  # noqa: BLE001 - it comes from the test
        return caught


def as_client_sees(exc: BaseException) -> BaseException:
    return unpack_exception(pack_exception(raised(exc)))


class TwoArguments(Exception):
    def __init__(self, left, right):
        super().__init__(f"{left} and {right}")


class NoReduce(Exception):
    def __reduce__(self):
        raise RuntimeError("no reduce")


class NoStr(Exception):
    def __str__(self):
        raise RuntimeError("no str")


class HoldsLock(Exception):
    def __init__(self):
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class BecomesAnother(Exception):
    def __reduce__(self):
        return ValueError, ("another",)


class Frozen(Exception):
    def __setattr__(self, name, value):
        raise AttributeError("frozen")


@pytest.mark.parametrize(
    "exc",
    [
        ValueError("x"),
        KeyError("k"),
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        OSError(2, "no"),
        Frozen("f"),
    ],
    ids=lambda exc: type(exc).__name__,
)
def test_exceptions_arrive_as_themselves(exc):
    back = as_client_sees(exc)
    assert type(back) is type(exc)
    assert back.args == exc.args
    assert "in raised" in told(back)


def test_groups_notes_and_attributes_survive():
    inner = KeyError("inner")
    inner.add_note("a note")
    inner.extra = 5  # type: ignore[attr-defined]
    back = as_client_sees(ExceptionGroup("both", [inner, ValueError("v")]))
    assert isinstance(back, ExceptionGroup)
    assert back.exceptions[0].__notes__ == ["a note"]
    assert back.exceptions[0].extra == 5  # type: ignore[attr-defined]


def test_an_exception_class_made_in_place_arrives_as_itself():
    class Local(Exception):
        pass

    assert type(as_client_sees(Local("x"))) is Local


@pytest.mark.parametrize(
    "exc",
    [TwoArguments("salt", "pepper"), NoReduce("text"), HoldsLock(), BecomesAnother("text"), Explosive],
    ids=["two arguments", "reduce raises", "lock", "another type", "reduce exits"],
)
def test_what_cannot_be_rebuilt_arrives_as_text(exc):
    if exc is Explosive:
        exc = type("Exits", (Exception,), {"__reduce__": Explosive.__reduce__})("text")
    back = as_client_sees(exc)
    assert isinstance(back, RemoteError)
    assert type(exc).__name__ in str(back)
    assert str(exc) in str(back)
    assert "in raised" in told(back)


def test_an_exception_without_a_message_does_not_stop_the_report():
    assert "NoStr" in told(as_client_sees(NoStr("x")))


def test_a_huge_message_is_cut_in_the_text():
    huge = TwoArguments("x" * 10_000_000, "the end")
    back = as_client_sees(huge)
    assert len(str(back)) < 70_000
    assert len(told(back)) < 70_000
    assert "characters left out" in told(back)
    assert "the end" in told(back)


def test_an_exception_over_the_limit_becomes_text(monkeypatch):
    monkeypatch.setattr("zmqsched.payload.exceptions._MAX_PICKLED", 100_000)
    assert isinstance(as_client_sees(ValueError("x" * 200_000)), RemoteError)


def test_the_chain_of_causes_survives():
    def chained():
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error

    with pytest.raises(ValueError, match="second") as caught:
        chained()
    text = told(unpack_exception(pack_exception(caught.value)))
    assert text.index("KeyError: 'first'") < text.index("direct cause") < text.index("ValueError: second")


def test_a_class_missing_here_becomes_text_with_the_reason(monkeypatch):
    module = types.ModuleType("only_there")
    exec("class Gone(Exception):\n    pass", vars(module))
    monkeypatch.setitem(sys.modules, "only_there", module)
    packed = pack_exception(raised(module.Gone("words")))
    monkeypatch.delitem(sys.modules, "only_there")
    back = unpack_exception(packed)
    assert isinstance(back, RemoteError)
    assert "only_there.Gone: words" in str(back)
    assert "ModuleNotFoundError" in told(back)
    assert "in raised" in told(back)


def frames_of(error: BaseException) -> list[tuple[str, str]]:
    return [(frame.name, frame.line) for frame in traceback.extract_tb(error.__traceback__)]


def test_each_exception_of_a_chain_has_its_own_traceback():
    def inner():
        raise KeyError("first")

    def outer():
        try:
            inner()
        except KeyError as error:
            raise HoldsLock from error

    with pytest.raises(HoldsLock) as caught:
        outer()
    back = unpack_exception(pack_exception(caught.value))
    assert isinstance(back, RemoteError)
    assert type(back.__cause__) is KeyError, "one that cannot be rebuilt takes no other along"
    assert frames_of(back.__cause__) == [("outer", "inner()"), ("inner", 'raise KeyError("first")')]
    assert frames_of(back)[-1] == ("outer", "raise HoldsLock from error")


def test_contexts_and_their_suppression_survive():
    def fails(how):
        try:
            {}["first"]
        except KeyError:
            if how == "none":
                raise ValueError("second") from None
            raise ValueError("second")  # noqa: B904 - the context is what this is about

    for how, shown in (("none", False), ("context", True)):
        with pytest.raises(ValueError, match="second") as caught:
            fails(how)
        back = unpack_exception(pack_exception(caught.value))
        assert isinstance(back.__context__, KeyError)
        assert ("During handling" in told(back)) is shown


def test_exceptions_that_refer_to_each_other_in_circles():
    first, second = raised(ValueError("first")), raised(ValueError("second"))
    first.__cause__, second.__cause__ = second, first
    back = unpack_exception(pack_exception(first))
    assert str(back.__cause__) == "second"
    assert back.__cause__.__cause__ is None


def test_one_member_that_cannot_be_rebuilt_leaves_the_group_a_group():
    group = ExceptionGroup("both", [raised(KeyError("k")), raised(HoldsLock())])
    with pytest.raises(ExceptionGroup) as caught:
        raise unpack_exception(pack_exception(raised(group)))
    matching, rest = caught.value.split(KeyError)
    assert [str(error) for error in matching.exceptions] == ["'k'"]
    assert isinstance(rest.exceptions[0], RemoteError)
    assert frames_of(rest.exceptions[0]) == [("raised", "raise exc")]


def test_a_group_of_the_users_own_class():
    class Mine(ExceptionGroup):
        pass

    back = as_client_sees(Mine("all", [raised(KeyError("k")), ValueError("v")]))
    assert type(back) is Mine
    assert frames_of(back.exceptions[0]) == [("raised", "raise exc")]


def test_a_traceback_has_the_originals_columns_and_keeps_nothing_alive():
    def fails(values):
        return 1 + values["x"] + 2

    with pytest.raises(KeyError) as caught:
        fails({})
    back = unpack_exception(pack_exception(caught.value))
    theirs, ours = (list(traceback.extract_tb(error.__traceback__))[-1] for error in (caught.value, back))
    assert (ours.lineno, ours.end_lineno, ours.colno, ours.end_colno) == (
        theirs.lineno, theirs.end_lineno, theirs.colno, theirs.end_colno,
    )  # fmt: skip
    trace = back.__traceback__
    while trace is not None:
        assert trace.tb_frame.f_back is None
        assert trace.tb_frame.f_locals == {}
        assert trace.tb_frame.f_code.co_firstlineno <= trace.tb_lineno
        trace = trace.tb_next


def test_a_deep_stack_is_cut_in_the_middle():
    def deeper(n):
        return deeper(n - 1) if n else 1 // 0

    with pytest.raises(ZeroDivisionError) as caught:
        deeper(500)
    names = [name for name, _ in frames_of(unpack_exception(pack_exception(caught.value)))]
    assert len(names) == MAX_FRAMES
    assert names[0] == "test_a_deep_stack_is_cut_in_the_middle"
    assert names[-1] == "deeper"


def test_lines_of_a_file_that_the_client_lacks_travel_along(tmp_path, monkeypatch):
    there = tmp_path / "only_there.py"
    there.write_text("def first():\n    return second()\n\n\ndef second():\n    raise ValueError(\n        'x'\n    )\n")
    names: dict = {"__name__": "only_there"}
    exec(compile(there.read_text(), str(there), "exec"), names)
    with pytest.raises(ValueError, match="x") as caught:
        names["first"]()
    packed = pack_exception(caught.value)
    there.unlink()
    linecache.clearcache()
    shown = told(unpack_exception(packed))
    assert "    return second()\n" in shown
    assert "    raise ValueError(\n" in shown


def test_the_origin_is_known_without_rebuilding():
    def parses(text):
        return json.loads(text)

    with pytest.raises(json.JSONDecodeError) as caught:
        parses("{")
    origin = origin_of(pack_exception(caught.value))
    assert origin.kind == "json.decoder.JSONDecodeError"
    assert (origin.file, origin.function.rpartition(".")[2]) == (__file__, "parses"), "the deepest line of the user's own"
    assert linecache.getline(origin.file, origin.line).strip() == "return json.loads(text)"
    assert str(origin).endswith("parses")
    assert str(origin_of(pack_exception(ValueError("never raised")))) == "ValueError"


def test_code_that_no_source_has_is_left_out_of_the_traceback():
    names: dict = {}
    exec("def odd():\n    return 1 // 0", names)
    names["odd"].__code__ = names["odd"].__code__.replace(co_filename="made\0up")
    with pytest.raises(ZeroDivisionError) as caught:
        names["odd"]()
    assert isinstance(unpack_exception(pack_exception(caught.value)), ZeroDivisionError)
