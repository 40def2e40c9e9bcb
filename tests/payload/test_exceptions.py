"""What a task raised arrives as itself, or as text."""

from __future__ import annotations

import sys
import threading
import types

import pytest
from samples import Explosive

from zmqsched.errors import RemoteError, RemoteTraceback
from zmqsched.payload import pack_exception, unpack_exception


def raised(exc: BaseException) -> BaseException:
    try:
        raise exc
    except BaseException as caught:  # noqa: BLE001 - it comes from the test
        return caught


def as_client_sees(exc: BaseException) -> BaseException:
    back = unpack_exception(pack_exception(raised(exc)))
    assert isinstance(back.__cause__, RemoteTraceback)
    return back


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
    assert "in raised" in str(back.__cause__)


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
    assert "in raised" in str(back.__cause__)


def test_an_exception_without_a_message_does_not_stop_the_report():
    assert "NoStr" in str(as_client_sees(NoStr("x")).__cause__)


def test_a_huge_message_is_cut_in_the_text():
    huge = TwoArguments("x" * 10_000_000, "the end")
    back = as_client_sees(huge)
    assert len(str(back)) < 70_000
    assert len(str(back.__cause__)) < 70_000
    assert "characters left out" in str(back.__cause__)
    assert "the end" in str(back.__cause__)


def test_an_exception_over_the_limit_becomes_text(monkeypatch):
    monkeypatch.setattr("zmqsched.payload.exceptions._MAX_PICKLED", 100_000)
    assert isinstance(as_client_sees(ValueError("x" * 200_000)), RemoteError)


def test_the_chain_of_causes_is_in_the_text():
    def chained():
        try:
            raise KeyError("first")
        except KeyError as error:
            raise ValueError("second") from error

    with pytest.raises(ValueError, match="second") as caught:
        chained()
    text = str(unpack_exception(pack_exception(caught.value)).__cause__)
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
    assert "ModuleNotFoundError" in str(back)
    assert "in raised" in str(back.__cause__)
