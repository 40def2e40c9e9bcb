"""Whatever a user hands in comes out alike on the other side, or the error names what could not."""

from __future__ import annotations

import functools
import gc
import importlib
import math
import operator
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import types
import weakref
from pathlib import Path

import cloudpickle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqsched import payload
from zmqsched.errors import (
    NotSerializable,
    PayloadTooLarge,
    RemoteError,
    RemoteTraceback,
    ResultDecodeError,
    ResultNotSerializable,
)
from zmqsched.payload import (
    OUT_OF_BAND,
    Chunk,
    FunctionPickler,
    pack_call,
    pack_exception,
    pack_value,
    unpack_call,
    unpack_exception,
    unpack_function,
    unpack_value,
)

ROOT = Path(__file__).parent.parent


def run_as_main(source: str) -> str:
    """Run a script of the user's, where classes and functions live in ``__main__``; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def there_and_back(value):
    return unpack_value(pack_value(value))


def add(left, right=0):
    return left + right


class Holder:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)


class Explosive:
    def __reduce__(self):
        raise SystemExit("boom in __reduce__")


class ExplodesLater:
    def __reduce__(self):
        return sys.exit, (3,)


# --- values --------------------------------------------------------------------------------------------------------

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None)
@given(st.lists(plain), st.dictionaries(st.text(), plain))
def test_plain_arguments_arrive_equal(args, kwargs):
    assert unpack_call(pack_call(tuple(args), kwargs)) == (tuple(args), kwargs)


def test_small_payloads_are_bytes():
    assert type(pack_call((1, "x"), {"y": np.arange(10)})) is bytes


def test_text_that_mentions_main_is_just_text():
    assert there_and_back(["__main__", b"__main__", pickle.dumps("__main__", 5)])[0] == "__main__"


@pytest.mark.parametrize("make", [np.arange, lambda n: bytearray(8 * n)])
def test_large_buffers_travel_out_of_band_without_a_copy(make):
    big = make(OUT_OF_BAND)
    packed = pack_call((pickle.PickleBuffer(big) if isinstance(big, bytearray) else big,), {})
    assert isinstance(packed, list)
    assert len(packed[0]) < 1_000
    assert np.shares_memory(np.frombuffer(packed[1], "u1"), np.frombuffer(big, "u1"))


def test_small_buffers_stay_in_band():
    assert type(pack_value(np.zeros(OUT_OF_BAND - 1, "u1"))) is bytes
    assert type(pack_value(np.zeros(OUT_OF_BAND, "u1"))) is list


@pytest.mark.parametrize(
    "array",
    [
        np.arange(100_000).reshape(100, 1000),
        np.arange(100_000).reshape(100, 1000)[::2, ::3],
        np.asfortranarray(np.arange(100_000.0).reshape(100, 1000)),
        np.arange(100_000)[::-1],
        np.zeros((0, 5)),
        np.array(["a", None, {"b": 1}], dtype=object),
    ],
    ids=["contiguous", "strided", "fortran", "reversed", "empty", "objects"],
)
def test_arrays_of_every_layout_arrive_equal_and_writable(array):
    back = there_and_back(array)
    assert np.array_equal(back, array)
    assert back.flags.writeable


def test_an_array_on_a_read_only_frame_is_writable_if_it_was():
    stream, *buffers = pack_value(np.zeros(100_000))
    back = unpack_value([bytes(stream), *map(bytes, buffers)])
    back[0] = 1
    assert back.flags.writeable


def test_more_buffers_than_a_message_has_frames_still_travel():
    arrays = [np.full(OUT_OF_BAND, number % 256, "u1") for number in range(payload.MAX_BUFFERS + 5)]
    packed = pack_value(arrays)
    assert len(packed) == payload.MAX_BUFFERS + 1
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(arrays, unpack_value(packed), strict=True))


def test_lambdas_and_local_classes_are_arguments():
    class Local:
        x = 3

    (fn, cls), _ = unpack_call(pack_call((lambda value: value + 1, Local), {}))
    assert fn(1) == 2
    assert cls.x == 3


def test_a_retry_by_cloudpickle_does_not_double_the_buffers():
    packed = pack_call((np.zeros(100_000), lambda: 1), {})
    assert len(packed) == 2
    assert np.array_equal(unpack_call(packed)[0][0], np.zeros(100_000))


def test_sizes_are_checked(monkeypatch):
    monkeypatch.setattr(payload, "MAX_PAYLOAD", 1_000)
    with pytest.raises(PayloadTooLarge, match=r"the arguments.* 2,0\d\d bytes .*1,000.*pass the path"):
        pack_call((b"x" * 2_000,), {})
    with pytest.raises(PayloadTooLarge, match="returned"):
        pack_value(np.zeros(100_000))
    with pytest.raises(PayloadTooLarge, match="function `<lambda>`"):
        FunctionPickler().pack(lambda text="x" * 2_000: text)


# --- what lives in __main__ ----------------------------------------------------------------------------------------

WORKER_SIDE = """
import subprocess, sys
from zmqsched import payload

# The other side has a __main__ of its own.
SERVE = '''
import sys
from zmqsched.payload import *
stdin = sys.stdin.buffer
def read():
    return stdin.read(int(stdin.readline()))
fn, call = unpack_function(read()), unpack_call(read())
try:
    value = b"v" + pack_value(fn(*call[0], **call[1]))
except BaseException as error:
    value = b"e" + pack_exception(error)
sys.stdout.buffer.write(value)
'''

def remote(fn, *args, **kwargs):
    parts = [payload.FunctionPickler().pack(fn)[1], payload.pack_call(args, kwargs)]
    done = subprocess.run([sys.executable, "-c", SERVE], stdout=subprocess.PIPE, check=True,
                          input=b"".join(b"%d\\n%b" % (len(part), part) for part in parts))
    if done.stdout[:1] == b"v":
        return payload.unpack_value(done.stdout[1:])
    raise payload.unpack_exception(done.stdout[1:])
"""


def test_classes_and_functions_of_main_travel_by_value_and_come_home_as_themselves():
    printed = run_as_main(
        WORKER_SIDE
        + """
import collections, dataclasses, enum

@dataclasses.dataclass
class Point:
    x: int
    made = 0

class Color(enum.Enum):
    RED = 1

Pair = collections.namedtuple("Pair", "left right")

class Oops(Exception):
    def __init__(self, code):
        super().__init__(code)
        self.code = code

def move(point, color, pair=None):
    assert color is Color.RED
    Point.made += 100
    return Point(point.x + 1), color, pair, [Point]

def fail():
    raise Oops(7)

Point.made = 1
point, color, pair, classes = remote(move, Point(1), Color.RED, pair=Pair(1, 2))
assert type(point) is Point and point == Point(2)
assert color is Color.RED
assert type(pair) is Pair
assert classes == [Point]
assert Point.made == 1, "the client's class stays as the client left it"
try:
    remote(fail)
except Oops as error:
    assert type(error) is Oops and error.code == 7
    assert "in fail" in str(error.__cause__)
    print("fine")
"""
    )
    assert printed == "fine"


def test_a_class_made_in_a_task_comes_back_whole():
    printed = run_as_main(
        WORKER_SIDE
        + """
def make():
    class New:
        def hello(self):
            return "hello"
    return New()

print(remote(make).hello())
"""
    )
    assert printed == "hello"


def test_a_class_of_main_that_changed_is_sent_as_it_is_now():
    printed = run_as_main(
        WORKER_SIDE
        + """
class Model:
    scale = 1

def scaled(model):
    return model.scale

first = remote(scaled, Model())
Model.scale = 2
print(first, remote(scaled, Model()))
"""
    )
    assert printed == "1 2"


# --- functions -----------------------------------------------------------------------------------------------------


def call_packed(blob, *args):
    return unpack_function(blob)(*args)


@pytest.mark.parametrize(
    ("fn", "args", "answer"),
    [
        (add, (1, 2), 3),
        (math.sqrt, (4,), 2),
        (len, ("abc",), 3),
        (int, ("12",), 12),
        (dict.fromkeys, ("a",), {"a": None}),
        ("a,b".split, (",",), ["a", "b"]),
        (functools.partial(add, 1), (2,), 3),
        (operator.attrgetter("real"), (3,), 3),
        (lambda x: x + 1, (1,), 2),
        (Holder(x=5).__dict__.get, ("x",), 5),
        (np.add, (1, 2), 3),
        (Chunk(add), ([(1, 2), (3, 4)],), [3, 7]),
    ],
)
def test_every_kind_of_callable_can_be_packed(fn, args, answer):
    pickler = FunctionPickler()
    digest, blob = pickler.pack(fn)
    assert len(digest) == 16
    assert pickler.pack(fn) == (digest, blob)
    assert call_packed(blob, *args) == answer


def test_importable_functions_travel_as_references():
    assert len(FunctionPickler().pack(add)[1]) < 100


def test_an_unchanged_function_is_pickled_once(monkeypatch):
    factor = 3
    double = lambda x: 2 * x  # noqa: E731
    fn = lambda x: double(x) * factor + math.floor(1.5)  # noqa: E731
    pickler = FunctionPickler()
    packed = pickler.pack(fn)
    monkeypatch.setattr(payload, "_pack_function", lambda fn: pytest.fail("pickled again"))
    assert pickler.pack(fn) is packed


@pytest.mark.parametrize("name", ["__code__", "__defaults__", "__kwdefaults__"])
def test_a_changed_function_is_pickled_anew(name):
    def fn(x=1, *, y=1):
        return x + y

    def other(x=20, *, y=20):
        return x * y + 7

    pickler = FunctionPickler()
    before = call_packed(pickler.pack(fn)[1])
    setattr(fn, name, getattr(other, name))
    assert fn() != before
    assert call_packed(pickler.pack(fn)[1]) == fn()


def test_a_changed_closure_is_seen():
    factor = 2
    pickler = FunctionPickler()

    def fn(x):
        return x * factor

    assert call_packed(pickler.pack(fn)[1], 1) == 2
    factor = 3
    assert call_packed(pickler.pack(fn)[1], 1) == 3


def test_a_keyword_default_changed_in_place_is_seen():
    def fn(*, y=1):
        return y

    pickler = FunctionPickler()
    assert call_packed(pickler.pack(fn)[1]) == 1
    fn.__kwdefaults__["y"] = 2
    assert call_packed(pickler.pack(fn)[1]) == 2


@pytest.mark.parametrize("mutable", [[1], {1: 1}, {1}, np.ones(1), Holder(x=1), ([1],)])
def test_what_captures_something_mutable_is_pickled_each_time(mutable):
    fn = lambda: mutable  # noqa: E731
    pickler = FunctionPickler()
    pickler.pack(fn)
    assert not pickler._known


def test_a_list_changed_in_place_is_seen():
    items = [1]
    fn = lambda: items  # noqa: E731
    pickler = FunctionPickler()
    assert call_packed(pickler.pack(fn)[1]) == [1]
    items.append(2)
    assert call_packed(pickler.pack(fn)[1]) == [1, 2]


def module_of(source: str) -> types.ModuleType:
    """A module nobody can import, like a notebook."""
    module = types.ModuleType("notebook")
    exec(textwrap.dedent(source), vars(module))
    return module


def test_globals_are_watched_through_functions_and_nested_code():
    notebook = module_of(
        """
        factor = 2
        def helper(x):
            return [x * factor for _ in range(1)][0]
        def fn(x):
            return (lambda: helper(x))()
        """
    )
    pickler = FunctionPickler()
    packed = pickler.pack(notebook.fn)
    assert pickler.pack(notebook.fn) is packed
    assert call_packed(packed[1], 1) == 2
    notebook.factor = 3
    assert call_packed(pickler.pack(notebook.fn)[1], 1) == 3
    notebook.helper = lambda x: -x
    assert call_packed(pickler.pack(notebook.fn)[1], 1) == -1
    notebook.factor = [1]
    notebook.factor.append(2)
    assert call_packed(pickler.pack(notebook.fn)[1], 1) == -1


def test_a_global_defined_later_is_seen():
    notebook = module_of("def fn():\n    return sorted([2, 1])")
    pickler = FunctionPickler()
    assert call_packed(pickler.pack(notebook.fn)[1]) == [1, 2]
    notebook.sorted = lambda items: "mine"
    assert call_packed(pickler.pack(notebook.fn)[1]) == "mine"


def test_recursive_functions_are_remembered_and_not_kept_alive():
    notebook = module_of(
        """
        def even(n):
            return n == 0 or odd(n - 1)
        def odd(n):
            return n != 0 and even(n - 1)
        """
    )
    pickler = FunctionPickler()
    packed = pickler.pack(notebook.even)
    assert pickler.pack(notebook.even) is packed
    assert call_packed(packed[1], 10) is True
    gone = weakref.ref(notebook.even)
    del notebook
    gc.collect()
    assert gone() is None
    assert not pickler._known


def test_the_memory_does_not_grow():
    pickler = FunctionPickler()
    for number in range(50):
        pickler.pack(lambda number=number: number)
    gc.collect()
    assert len(pickler._known) <= 1


def test_equal_functions_have_equal_digests():
    def make():
        return lambda x: x + 1

    assert FunctionPickler().pack(make())[0] == FunctionPickler().pack(make())[0]


def test_registering_a_module_by_value_is_heeded_at_once(tmp_path, monkeypatch):
    (tmp_path / "mine_alone.py").write_text("def fn():\n    return 5\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine_alone = importlib.import_module("mine_alone")

    pickler = FunctionPickler()
    by_reference = pickler.pack(mine_alone.fn)[1]
    cloudpickle.register_pickle_by_value(mine_alone)
    try:
        by_value = pickler.pack(mine_alone.fn)[1]
        argument = pack_call((mine_alone.fn,), {})
    finally:
        cloudpickle.unregister_pickle_by_value(mine_alone)
    monkeypatch.undo()
    del sys.modules["mine_alone"]
    with pytest.raises(ModuleNotFoundError):
        unpack_function(by_reference)
    assert call_packed(by_value) == 5
    assert unpack_call(argument)[0][0]() == 5


def test_a_chunk_is_as_cheap_as_its_function(monkeypatch):
    factor = 2
    fn = lambda x: x * factor  # noqa: E731
    pickler = FunctionPickler()
    first = pickler.pack(Chunk(fn))
    monkeypatch.setattr(payload, "_pack_function", lambda fn: pytest.fail("pickled again"))
    assert pickler.pack(Chunk(fn)) == first
    assert call_packed(first[1], [(1,), (2,)]) == [2, 4]


def test_a_chunk_is_a_value_too():
    assert there_and_back(Chunk(lambda x: x))([(1,)]) == [1]


def test_packing_from_many_threads_agrees():
    notebook = module_of("factor = 1\ndef fn():\n    return factor")
    pickler = FunctionPickler()
    digests = []
    threads = [
        threading.Thread(target=lambda: digests.extend(pickler.pack(notebook.fn)[0] for _ in range(50)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(digests) == 200
    assert len(set(digests)) == 1


# --- what cannot be pickled ----------------------------------------------------------------------------------------


def complaint_about_call(*args, **kwargs) -> str:
    with pytest.raises(NotSerializable) as caught:
        pack_call(args, kwargs)
    return str(caught.value)


def complaint_about(fn) -> str:
    with pytest.raises(NotSerializable) as caught:
        FunctionPickler().pack(fn)
    return str(caught.value)


def test_the_guilty_argument_is_named_by_its_path():
    lock = threading.Lock()
    assert "argument 2 is a _thread.lock (TypeError: cannot pickle" in complaint_about_call(1, lock)
    assert "keyword `x` is a generator" in complaint_about_call(1, x=(i for i in ()))
    nested = {"a": Holder(fine=1, sock=[1, lock])}
    assert "argument 1 -> ['a'] -> attribute `sock` -> [1] is a _thread.lock" in complaint_about_call(nested)
    assert complaint_about_call(lock).endswith("make the object inside the task")


def test_the_guilty_capture_is_named():
    lock = threading.Lock()
    notebook = module_of("import threading\nlock = threading.Lock()\ndef fit():\n    return lock")

    def fit():
        return lock

    def outer():
        return fit()

    def defaulted(x=1, *, y=lock):
        return y

    assert "cannot pickle `fit`: closure variable `lock` is a _thread.lock" in complaint_about(fit)
    assert "`outer`: closure variable `fit` -> closure variable `lock` is a" in complaint_about(outer)
    assert "`defaulted`: the default of `y` is a" in complaint_about(defaulted)
    assert "`fit`: global `lock` is a" in complaint_about(notebook.fit)
    assert "the partial's argument 1 is a" in complaint_about(functools.partial(add, lock))
    assert "its `self` -> attribute `lock` is a" in complaint_about(types.MethodType(lambda self: 1, Holder(lock=lock)))
    assert "`fit`: closure variable `lock`" in complaint_about(Chunk(fit))


def test_slots_are_looked_into():
    class Slotted:
        __slots__ = ("lock",)

    slotted = Slotted()
    slotted.lock = threading.Lock()
    assert "argument 1 -> attribute `lock` is a _thread.lock" in complaint_about_call(slotted)


def test_results_name_their_culprit():
    with pytest.raises(ResultNotSerializable, match=r"the result -> \['a'\] is a generator.*return plain data"):
        pack_value({"a": (i for i in ())})


def test_whatever_reduce_raises_is_wrapped():
    assert "argument 1 is a test_payload.Explosive (SystemExit: boom in __reduce__)" in complaint_about_call(
        Explosive()
    )
    with pytest.raises(ResultNotSerializable, match="boom in __reduce__"):
        pack_value([Explosive()])
    bad = Explosive()
    assert "closure variable `bad` is a" in complaint_about(lambda: bad)


def test_an_interrupt_while_pickling_is_the_users():
    class Interrupted:
        def __reduce__(self):
            raise KeyboardInterrupt

    for pack in (pack_value, lambda value: pack_call((value,), {}), lambda value: FunctionPickler().pack(value)):
        with pytest.raises(KeyboardInterrupt):
            pack(Interrupted())


def deep_list():
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    return nested


def test_nesting_too_deep_is_an_error_not_a_crash():
    printed = run_as_main(
        """
        import sys
        sys.path.insert(0, "tests")
        from test_payload import *
        print("nested too deeply" in complaint_about_call(1, deep_list()))
        try:
            pack_value(deep_list())
        except ResultNotSerializable as error:
            print("nested too deeply" in str(error))
        inner = deep_list()
        print("nested too deeply" in complaint_about(lambda: inner))
        """
    )
    assert printed.split() == ["True"] * 3


def test_a_hostile_object_cannot_break_the_search():
    class Hostile:
        def __getattribute__(self, name):
            raise RuntimeError("leave me alone")

        def __repr__(self):
            raise RuntimeError("no name either")

    assert "argument 1" in complaint_about_call({Hostile: 1, "x": [Hostile(), threading.Lock()]})


def test_the_search_is_bounded():
    many = [Holder(x=number) for number in range(5_000)]
    many.append(threading.Lock())
    assert "argument 1" in complaint_about_call(many)


# --- results that cannot be read -----------------------------------------------------------------------------------


def test_a_result_that_explodes_on_arrival_is_a_decode_error():
    with pytest.raises(ResultDecodeError, match="SystemExit: 3") as caught:
        unpack_value(pack_value(ExplodesLater()))
    assert isinstance(caught.value.__cause__, SystemExit)


@pytest.mark.parametrize("damaged", [b"", b"\x80\x05", b"not a pickle", [b"\x80\x05\x97."]])
def test_damaged_results_are_decode_errors(damaged):
    with pytest.raises(ResultDecodeError):
        unpack_value(damaged)
    assert isinstance(unpack_exception(damaged), RemoteError)


# --- exceptions ----------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(payload, "MAX_PAYLOAD", 5 * payload.MAX_TEXT)
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
