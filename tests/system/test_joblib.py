"""joblib's own ``Parallel`` on a cluster, and scikit-learn, which does its parallel work by it."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import CancelledError

import joblib
import numpy as np
import pytest
from conftest import eventually, interrupt_behind_call, told
from sklearn.datasets import make_classification
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.svm import SVC

import zmqsched.joblib
from zmqsched import Client, LocalCluster
from zmqsched.errors import ClusterLost, NotSerializable, Unschedulable

pytestmark = pytest.mark.system

LARGE = 2**20  # bytes from which joblib shares arrays


@pytest.fixture
def on_cluster(client):
    with joblib.parallel_config("zmqsched", client=client):
        yield


@pytest.fixture(scope="module")
def idle(client):
    """All workers can be told to compute, and none does."""

    def idle():
        eventually(lambda: not any([*client.status().tasks.values(), *(node.assigned for node in client.nodes())]))

    return idle


def pid(_=None):
    return os.getpid()


def squares(numbers, **options):
    return joblib.Parallel(**options)(joblib.delayed(lambda x: x * x)(number) for number in numbers)


# --- what comes back -----------------------------------------------------------------------------------------------


def test_a_list_in_order(on_cluster):
    assert squares(range(1_000)) == [number**2 for number in range(1_000)]


def test_a_generator_in_order(on_cluster):
    results = squares(range(100), return_as="generator")
    assert next(results) == 0
    assert list(results) == [number**2 for number in range(1, 100)]


def test_an_unordered_generator_gives_first_what_is_done_first(on_cluster, gate):
    gated = gate.task
    calls = [joblib.delayed(gated)("late"), joblib.delayed(str)("early")]
    results = joblib.Parallel(return_as="generator_unordered", batch_size=1)(calls)
    assert next(results) == "early"
    gate.open()
    assert list(results) == ["late"]


def test_two_generators_at_a_time(on_cluster):
    first, second = (squares(range(20), return_as="generator") for _ in range(2))
    assert list(zip(first, second, strict=True)) == [(number**2, number**2) for number in range(20)]


@pytest.mark.filterwarnings("ignore:.*tasks which were still being processed")
def test_a_dropped_generator_cancels_its_own_tasks_only(on_cluster, client, gate, tmp_path, idle):
    dropped = joblib.Parallel(return_as="generator", pre_dispatch="all")([joblib.delayed(time.sleep)(60)] * 4)
    kept = joblib.Parallel(return_as="generator")([joblib.delayed(str)(number) for number in range(4)])
    del dropped
    assert list(kept) == ["0", "1", "2", "3"]
    idle()


def test_without_a_client_a_cluster_is_found(clusters, monkeypatch):
    with LocalCluster(2, name="default") as cluster:
        assert set(joblib.Parallel(backend="zmqsched")([joblib.delayed(os.getppid)()] * 2)) <= nurseries(cluster)
    zmqsched.easy._shared.shutdown()


def nurseries(cluster):
    import psutil

    return {child.pid for node in cluster.node_pids for child in psutil.Process(node).children()}


def test_a_client_may_be_given_to_parallel_itself(client):
    assert joblib.Parallel(backend="zmqsched", client=client)([joblib.delayed(pid)()])[0] in workers_of(client)


def test_a_clients_view_gives_its_options_to_the_tasks(client):
    view = client.options(tags=["none such"])
    with joblib.parallel_config("zmqsched", client=view), pytest.raises(Unschedulable, match="none such"):
        squares(range(3))


def test_anything_else_is_no_client():
    with pytest.raises(TypeError, match="client is a zmqsched Client"):
        joblib.parallel_config("zmqsched", client="lab")


def workers_of(client):
    return {worker.pid for worker in client.workers()}


# --- how many ------------------------------------------------------------------------------------------------------


def test_all_workers_are_the_default(on_cluster, client):
    assert joblib.effective_n_jobs() == joblib.effective_n_jobs(-1) == joblib.effective_n_jobs(7) == 2
    assert set(joblib.Parallel()([joblib.delayed(pid)()] * 20)) <= workers_of(client)


def test_one_job_is_this_process(on_cluster):
    assert joblib.effective_n_jobs(1) == 1
    assert joblib.Parallel(n_jobs=1)([joblib.delayed(pid)()] * 2) == [os.getpid()] * 2


def test_no_jobs_are_an_error(on_cluster):
    with pytest.raises(ValueError, match="n_jobs == 0"):
        joblib.effective_n_jobs(0)
    with pytest.raises(ValueError, match="n_jobs == 0"):
        squares(range(3), n_jobs=0)


def test_fewer_jobs_than_workers_run_at_a_time(clusters, tmp_path):
    def count(number):
        mine = tmp_path / str(number)
        mine.touch()
        at_once = len(list(tmp_path.iterdir()))
        time.sleep(0.02)
        mine.unlink()
        return at_once

    with LocalCluster(3) as cluster, Client(cluster) as client, joblib.parallel_config("zmqsched", client=client):
        assert joblib.effective_n_jobs(2) == joblib.effective_n_jobs(-2) == 2
        at_once = joblib.Parallel(n_jobs=2, batch_size=1)(joblib.delayed(count)(number) for number in range(20))
    assert max(at_once) == 2


def test_a_cluster_of_one_worker_is_used(clusters):
    with LocalCluster(1) as cluster, Client(cluster) as client, joblib.parallel_config("zmqsched", client=client):
        assert set(joblib.Parallel()([joblib.delayed(pid)()] * 5)) == workers_of(client)


def test_short_calls_travel_many_at_a_time(on_cluster, client):
    before = client.status().counts["accepted"]
    squares(range(5_000))
    assert client.status().counts["accepted"] - before < 1_000


def test_a_generator_is_read_no_further_than_pre_dispatch(on_cluster, gate):
    taken = []

    def calls():
        for number in range(50):
            taken.append(number)
            yield joblib.delayed(gate.task)(number)

    results = joblib.Parallel(return_as="generator", pre_dispatch=4, batch_size=1)(calls())
    gate.wait_until_begun(2)
    assert len(taken) == 4
    gate.open()
    assert list(results) == list(range(50))


# --- what goes wrong -----------------------------------------------------------------------------------------------


def test_an_error_keeps_its_type_and_ends_the_rest(on_cluster, tmp_path, idle):
    def fail(number):
        if number == 3:
            raise FileNotFoundError(2, "no such thing", "thing")
        time.sleep(60)

    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match="no such thing") as caught:
        joblib.Parallel(pre_dispatch="all", batch_size=1)(joblib.delayed(fail)(number) for number in (3, 0))
    assert "in fail" in told(caught.value)
    idle()
    assert time.monotonic() - began < 50


def test_a_call_over_its_time_ends_and_frees_the_workers(on_cluster, idle):
    with pytest.raises(multiprocessing.TimeoutError):  # as joblib has it
        joblib.Parallel(timeout=0.2)([joblib.delayed(time.sleep)(60)] * 4)
    idle()


def test_an_interrupt_ends_the_call_and_frees_the_workers(on_cluster, gate, idle):
    def interrupt():
        gate.wait_until_begun(2)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        joblib.Parallel()([joblib.delayed(gate.task)()] * 4)
    thread.join()
    idle()
    assert squares(range(3)) == [0, 1, 4]


def test_one_while_a_batch_is_submitted_frees_the_workers_too(on_cluster, idle):
    for point in itertools.count(1):
        with (
            interrupt_behind_call(point, zmqsched.joblib.Backend._start) as interrupted,
            contextlib.suppress(multiprocessing.TimeoutError),  # the last is interrupted by nothing else
        ):
            joblib.Parallel(timeout=1)([joblib.delayed(time.sleep)(600)] * 2)
        idle()
        if not interrupted:
            break
    assert point > 3
    assert squares(range(3)) == [0, 1, 4]


def test_what_cannot_be_pickled_is_the_calls_error(on_cluster):
    with pytest.raises(NotSerializable, match="lock"):
        joblib.Parallel()([joblib.delayed(str)(threading.Lock())])


def test_an_error_of_the_generator_is_the_calls_error(on_cluster):
    def calls():
        yield from [joblib.delayed(str)(1)] * 30
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        joblib.Parallel(batch_size=1)(calls())


def test_a_killed_worker_costs_nothing_but_time(on_cluster, tmp_path):
    def die_once(number):
        once = tmp_path / f"died-{number}"
        if number == 2 and not once.exists():
            once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    results = joblib.Parallel(batch_size=1)(joblib.delayed(die_once)(number) for number in range(6))
    assert results == list(range(6))
    assert (tmp_path / "died-2").exists()


def test_a_lost_cluster_ends_the_call(clusters, gate):
    with LocalCluster(2) as cluster, Client(cluster) as client, joblib.parallel_config("zmqsched", client=client):
        results = joblib.Parallel(return_as="generator")([joblib.delayed(gate.task)()] * 10)
        gate.wait_until_begun(2)
        threading.Thread(target=cluster.close).start()
        with pytest.raises((ClusterLost, CancelledError)):
            list(results)


# --- calls within calls --------------------------------------------------------------------------------------------


def test_a_call_inside_a_task_uses_threads_of_its_worker(on_cluster):
    def inner(number):
        return joblib.Parallel(n_jobs=2)(joblib.delayed(lambda x: (x, os.getpid()))(number + i) for i in range(5))

    for number, (values, pids) in enumerate(zip(*each, strict=True) for each in joblib.Parallel()(
        joblib.delayed(inner)(number) for number in range(4)
    )):  # fmt: skip
        assert values == tuple(range(number, number + 5))
        assert len(set(pids)) == 1


def test_three_levels_deep(on_cluster):
    def level(depth):
        if not depth:
            return 1
        return sum(joblib.Parallel(n_jobs=2)([joblib.delayed(level)(depth - 1)] * 2))

    assert level(3) == 8


# --- large arrays --------------------------------------------------------------------------------------------------


def looked_at(array, number):
    array.flat[0] = number  # one's own copy
    return array.flat[0], array.sum() - array.flat[0], array.dtype.str, array.shape, array.flags.f_contiguous


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["f8", "i2", "M8[s]", [("a", "i4"), ("b", "f8")]])
def test_large_arrays_are_what_they_were(on_cluster, order, dtype):
    array = np.zeros((400, 1_000), dtype, order=order)
    array[1, 2] = np.ones(1, dtype)[0] if dtype != "M8[s]" else np.datetime64("2026-11-22T13:35:00")
    (back,) = joblib.Parallel(max_nbytes=500_000)([joblib.delayed(np.copy)(array, order="A")])
    np.testing.assert_array_equal(back, array)
    assert (back.dtype, back.flags.f_contiguous) == (array.dtype, array.flags.f_contiguous)


@pytest.mark.parametrize("stride", [1, 2])
def test_who_writes_to_a_large_array_writes_to_a_copy(on_cluster, stride):
    array = np.ones((600, 1_000))[::stride]
    results = joblib.Parallel(batch_size=1)(joblib.delayed(looked_at)(array, number) for number in range(6))
    assert results == [(number, array.size - 1, "<f8", array.shape, False) for number in range(6)]
    assert array.min() == array.max() == 1


def test_a_large_array_does_not_travel_on_its_own_host(on_cluster):
    def is_mapped(_):
        with open("/proc/self/maps") as file:
            return "zmqsched-array" in file.read()

    arrays = [np.ones(LARGE), np.ones(LARGE // 2, "i1")]
    assert [joblib.Parallel()([joblib.delayed(is_mapped)(array)]) for array in arrays] == [[True], [False]]
    fds = f"/proc/{os.getpid()}/fd"
    assert not [fd for fd in os.listdir(fds) if "zmqsched-array" in os.path.realpath(f"{fds}/{fd}")]


def test_where_workers_may_be_elsewhere_it_does(clusters):
    with LocalCluster(2, listen="") as cluster, Client(cluster) as client, joblib.parallel_config("zmqsched", client=client):
        sums = joblib.Parallel()(joblib.delayed(np.sum)(np.ones(2 * LARGE // 8)) for _ in range(3))
    assert sums == [2 * LARGE // 8] * 3


# --- scikit-learn --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data():
    return make_classification(n_samples=400, n_features=12, random_state=1)


def test_cross_val_score(client, data):
    serial = cross_val_score(LogisticRegression(), *data, cv=5, n_jobs=1)
    with joblib.parallel_config("zmqsched", client=client):
        np.testing.assert_array_equal(cross_val_score(LogisticRegression(), *data, cv=5), serial)


def test_grid_search(client, data):
    grid = {"C": [0.1, 1, 10], "gamma": [0.01, 0.1]}
    serial = GridSearchCV(SVC(), grid, cv=3, n_jobs=1).fit(*data)
    with joblib.parallel_config("zmqsched", client=client):
        parallel = GridSearchCV(SVC(), grid, cv=3).fit(*data)
    assert parallel.best_params_ == serial.best_params_
    np.testing.assert_array_equal(parallel.cv_results_["mean_test_score"], serial.cv_results_["mean_test_score"])
    np.testing.assert_array_equal(parallel.predict(data[0]), serial.predict(data[0]))


@pytest.mark.parametrize("kind", [RandomForestClassifier, RandomForestRegressor])
def test_random_forests(client, data, kind):
    serial = kind(n_estimators=30, random_state=0, n_jobs=1).fit(*data)
    with joblib.parallel_config("zmqsched", client=client):
        parallel = kind(n_estimators=30, random_state=0, n_jobs=-1).fit(*data)
        predicted = parallel.predict(data[0])
    np.testing.assert_array_equal(predicted, serial.predict(data[0]))
    np.testing.assert_array_equal(parallel.feature_importances_, serial.feature_importances_)


def test_a_search_among_forests(client, data):
    search = GridSearchCV(RandomForestClassifier(random_state=0, n_jobs=2), {"n_estimators": [5, 10]}, cv=2)
    with joblib.parallel_config("zmqsched", client=client):
        assert search.fit(*data).best_score_ > 0.5


def test_folds_of_a_large_matrix_share_it(client):
    """50 MB, that five folds would carry each; here they map it."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(65_000, 100))  # noqa: N806 - as scikit-learn calls it
    y = (X[:, 0] > 0).astype(int)
    model = LogisticRegression(max_iter=5, tol=1.0)
    serial = cross_val_score(model, X, y, cv=5, n_jobs=1)
    with joblib.parallel_config("zmqsched", client=client):
        np.testing.assert_array_equal(cross_val_score(model, X, y, cv=5), serial)
