"""dask's collections, computed by a client in the place of dask's own scheduler."""

import os

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest

from zmqsched.errors import NotSerializable

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def array():
    return da.random.default_rng(0).normal(size=(1_000, 1_000), chunks=250)


def test_delayed_calls(client):
    @dask.delayed
    def add(left, right):
        return left + right, os.getpid()

    total, pid = add(add(1, 2)[0], add(3, 4)[0]).compute(scheduler=client)
    assert total == 10
    assert pid != os.getpid()


def test_arrays(client, array):
    product = (array @ array.T).sum(axis=0)
    np.testing.assert_allclose(product.compute(scheduler=client), product.compute(scheduler="synchronous"))


def test_bags(client):
    squares = db.from_sequence(range(100), npartitions=7).map(lambda number: number**2)
    assert squares.sum().compute(scheduler=client) == sum(number**2 for number in range(100))


def test_data_frames(client):
    frame = pd.DataFrame({"key": [1, 2, 3] * 40, "value": range(120)})
    sums = dd.from_pandas(frame, npartitions=5).groupby("key").value.sum().compute(scheduler=client)
    pd.testing.assert_series_equal(sums.sort_index(), frame.groupby("key").value.sum())


def test_as_the_default_scheduler_and_with_several_at_once(client, array):
    with dask.config.set(scheduler=client):
        low, high = dask.compute(array.min(), array.max())
    assert (low, high) == dask.compute(array.min(), array.max(), scheduler="synchronous")


def test_with_options_for_the_tasks(client):
    with dask.config.set(scheduler=client.options(name="of dask", retries=1)):
        assert dask.delayed(pow)(2, 5).compute() == 32


def test_dask_asks_how_many_tasks_may_run(client):
    assert client._max_workers == client.options(priority=1)._max_workers == 2


def test_an_error_is_the_tasks_own(client):
    @dask.delayed
    def fail():
        raise LookupError("not there")

    with pytest.raises(LookupError, match="not there"):
        fail().compute(scheduler=client)
    assert dask.delayed(pow)(2, 3).compute(scheduler=client) == 8


def test_what_cannot_be_pickled_is_named(client):
    import threading

    lock = threading.Lock()
    with pytest.raises(NotSerializable, match="lock"):
        dask.delayed(lambda: lock.locked())().compute(scheduler=client)
