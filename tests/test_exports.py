"""The public surface, on purpose: what is added or taken away here is something users will notice."""

import inspect
import subprocess
import sys

import pytest

import zmqsched
from zmqsched import errors

PUBLIC = [
    "Client", "Cluster", "Future", "LocalCluster", "Map", "SSHCluster", "SlurmCluster", "WaitGroup", "__version__",
    "as_completed", "errors", "get_client", "get_task", "map", "starmap", "wait",
]  # fmt: skip


def test_these_names_and_no_others():
    assert sorted(zmqsched.__all__) == PUBLIC
    assert dir(zmqsched) == PUBLIC
    assert all(getattr(zmqsched, name) is not None for name in PUBLIC)


def test_what_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Clusters'"):
        zmqsched.Clusters  # noqa: B018


def imported(statement: str) -> set[str]:
    """The modules that are there after it, in a new interpreter."""
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_heavy():
    """Workers import it too, and none of them needs ZeroMQ. So it takes a fraction of the time that ``import zmq`` takes."""
    ours, theirs = imported("import zmqsched"), imported("import zmq")
    assert not {"zmq", "msgspec", "cloudpickle", "psutil", "click", "rich"} & ours
    assert len(ours) < len(theirs)


def test_a_client_imports_what_it_needs_and_no_more():
    heavy = {"numpy", "rich", "click", "tqdm", "psutil", "sqlite3", "asyncio", "IPython", "joblib", "multiprocessing"}
    assert not heavy & imported("from zmqsched import Client, WaitGroup, as_completed, wait")


def kinds():
    return [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", kinds(), ids=lambda kind: kind.__name__)
def test_every_error_has_the_root_a_sentence_and_a_place_in_the_tree(kind):
    assert issubclass(kind, errors.ZmqschedError)
    assert inspect.getdoc(kind).endswith(".")
    assert kind.__name__ in errors.__doc__
