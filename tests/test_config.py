"""Directories, names, the lock, the connection file: what is refused, and that it says what to do."""

import os
import socket
import subprocess
import sys
import threading

import msgspec
import pytest

from zmqsched import config
from zmqsched.config import Addresses, ClusterLock, ConnectionFile
from zmqsched.errors import ClusterExists, ClusterNotFound, ConnectionFileError

KEY = "rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    """A runtime directory of the test's own."""
    directory = tmp_path / "run"
    monkeypatch.setenv("ZMQSCHED_DIR", str(directory))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.delenv("ZMQSCHED_CLUSTER", raising=False)
    return directory


def a_file(name="default", **changes) -> ConnectionFile:
    addresses = {role: [f"ipc:///tmp/{role}"] for role in ("work", "beats", "status")}
    facts = {
        "name": name,
        "cluster_id": "c1",
        "host": config.this_host(),
        "pid": os.getpid(),
        "python": "3.11.7",
        "zmqsched": "0.1.0",
        "addresses": Addresses(**addresses),
    }
    return ConnectionFile(**facts | changes)


def a_tcp_file(*work: str, **changes) -> ConnectionFile:
    keys = dict.fromkeys(("server_key", "client_public", "client_secret"), KEY)
    addresses = Addresses(work=list(work), beats=["tcp://h:1"], status=["tcp://h:2"])
    return a_file(addresses=addresses, **keys | changes)


def start(name: str, **changes) -> ClusterLock:
    """What a broker does at its start."""
    lock = ClusterLock.acquire(name)
    a_file(name, **changes).write(lock.directory / config.CONNECTION_FILE)
    return lock


def mode(path) -> int:
    return path.lstat().st_mode & 0o777


class TestRuntimeDir:
    def test_is_made_private(self, runtime):
        assert config.runtime_dir() == runtime
        assert mode(runtime) == 0o700

    def test_and_so_is_what_it_lies_in_if_that_is_not_there(self, tmp_path):
        """What jobs and ranks need lies in the directory of journals, and may be the first there."""
        config.make_private(tmp_path / "state" / "jobs")
        config.make_private(tmp_path / "state")
        assert mode(tmp_path / "state") == mode(tmp_path / "state" / "jobs") == 0o700

    def test_falls_back_to_the_session_and_then_to_tmp(self, tmp_path, monkeypatch):
        monkeypatch.delenv("ZMQSCHED_DIR")
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        assert config.runtime_dir() == tmp_path / "zmqsched"
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "gone"))
        assert str(config._configured_runtime_dir()) == f"/tmp/zmqsched-{os.geteuid()}"
        monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
        assert str(config._configured_runtime_dir()) == f"/tmp/zmqsched-{os.geteuid()}"

    def test_open_to_others_is_refused(self, runtime):
        runtime.mkdir(mode=0o755)
        with pytest.raises(ConnectionFileError, match="chmod 700"):
            config.runtime_dir()

    def test_symlink_is_refused(self, runtime, tmp_path):
        (tmp_path / "real").mkdir(mode=0o700)
        runtime.symlink_to(tmp_path / "real")
        with pytest.raises(ConnectionFileError, match="symlink"):
            config.runtime_dir()

    def test_of_another_user_is_refused(self, runtime, monkeypatch):
        config.runtime_dir()
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
        with pytest.raises(ConnectionFileError, match="belongs to user"):
            config.runtime_dir()

    def test_a_file_in_its_place_is_an_error(self, runtime):
        runtime.write_text("")
        with pytest.raises(ConnectionFileError, match="not a directory"):
            config.runtime_dir()


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "ä", "x" * 41, "name\n", "a\0"])
def test_bad_names(name):
    with pytest.raises(ConnectionFileError, match="cannot name a cluster"):
        config.cluster_dir(name)


def test_a_long_socket_path_is_refused(tmp_path):
    with pytest.raises(ConnectionFileError, match="ZMQSCHED_DIR to a shorter path"):
        config.ipc_address(tmp_path / ("x" * 107), "work")


class TestAddresses:
    @pytest.mark.parametrize(
        "address", ["tcp://127.0.0.1:5", "tcp://[::1]:65535", "tcp://[fe80::1%eth0]:9", "tcp://host-1.lan:80", "ipc:///a"]
    )
    def test_good(self, address):
        config.check_address(address)

    @pytest.mark.parametrize(
        ("address", "why"),
        [
            ("tcp://host:0", "port 0"),
            ("tcp://host:99999", "port 99999"),
            ("tcp://host", "no port"),
            ("tcp://[::1]", "no port"),
            ("tcp://:80", "no host"),
            ("tcp://::1:80", "without brackets"),
            ("tcp://[host]:80", "not an IPv6"),
            ("tcp://host:http", "form|brackets"),
            ("tcp://host:80/", "form"),
            ("tcp://host:80\n", "form"),
            ("tcp://*:80", "every interface"),
            ("tcp://0.0.0.0:80", "every interface"),
            ("tcp://[::]:80", "every interface"),
            ("udp://host:80", "neither"),
            ("inproc://x", "neither"),
            ("", "neither"),
            ("ipc://@abstract", "ABSOLUTE"),
            ("ipc://relative", "ABSOLUTE"),
            ("ipc:///" + "x" * 107, "longer"),
        ],
    )
    def test_bad(self, address, why):
        with pytest.raises(ValueError, match=why):
            config.check_address(address)


class TestConnectionFile:
    def test_round_trip_and_privacy(self, tmp_path):
        path = tmp_path / "c.json"
        old = os.umask(0)
        try:
            a_tcp_file("tcp://h:1").write(path)
        finally:
            os.umask(old)
        assert mode(path) == 0o600
        assert ConnectionFile.load(path) == msgspec.json.decode(path.read_bytes(), type=ConnectionFile)
        assert [entry.name for entry in tmp_path.iterdir()] == ["c.json"]

    def test_the_secret_is_not_in_the_repr(self):
        assert KEY not in repr(a_tcp_file("tcp://h:1"))

    def test_write_replaces_and_does_not_follow(self, tmp_path):
        path, victim = tmp_path / "c.json", tmp_path / "victim"
        victim.write_text("precious")
        path.symlink_to(victim)
        a_file().write(path)
        assert victim.read_text() == "precious"
        assert ConnectionFile.load(path).name == "default"

    def test_write_nowhere(self, tmp_path):
        with pytest.raises(ConnectionFileError, match="cannot write"):
            a_file().write(tmp_path / "no" / "c.json")

    def test_unknown_fields_are_for_later_versions(self, tmp_path):
        self.put(tmp_path, role="node")
        assert ConnectionFile.load(tmp_path / "c.json").name == "default"

    def put(self, tmp_path, **changes):
        raw = msgspec.to_builtins(a_file()) | changes
        path = tmp_path / "c.json"
        path.touch(mode=0o600)
        path.write_bytes(msgspec.json.encode({key: value for key, value in raw.items() if value is not None}))
        return path

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"format": None}, "`format`"),
            ({"format": True}, "`format`"),
            ({"format": 2}, "format 2"),
            ({"name": None}, "`name`"),
            ({"name": "../x"}, r"\$\.name"),
            ({"pid": "1"}, r"\$\.pid"),
            ({"pid": -1}, r"\$\.pid"),
            ({"addresses": {"work": []}}, r"\$\.addresses\.work"),
            ({"addresses": {"work": ["ipc:///a"], "beats": ["ipc:///a"]}}, "`status`"),
            ({"server_key": "short"}, r"\$\.server_key"),
            ({"server_key": KEY + "\n"}, r"\$\.server_key"),
            ({"server_key": KEY}, "client_public is empty"),
            ({"addresses": {"work": ["tcp://h:1"], "beats": ["ipc:///b"], "status": ["ipc:///s"]}}, "server_key is"),
            ({"addresses": {"work": ["ipc:///w"], "beats": ["tcp://h:0"], "status": ["ipc:///s"]}}, "beats: 'tcp://h:0'"),
        ],
    )
    def test_bad_fields_are_named(self, tmp_path, changes, why):
        with pytest.raises(ConnectionFileError, match=why) as caught:
            ConnectionFile.load(self.put(tmp_path, **changes))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            (b"", "is empty"),
            (b"{", "not JSON"),
            (b"\xff", "not JSON"),
            (b"[" * 50_000, "not JSON"),
            (b"[]", "`format`"),
            (b"null", "`format`"),
            (b"x" * 70_000, "not a connection file"),
        ],
    )
    def test_bad_content(self, tmp_path, content, why):
        path = tmp_path / "c.json"
        path.touch(mode=0o600)
        path.write_bytes(content)
        with pytest.raises(ConnectionFileError, match=why):
            ConnectionFile.load(path)

    def test_not_private(self, tmp_path):
        path = self.put(tmp_path)
        path.chmod(0o640)
        with pytest.raises(ConnectionFileError, match=f"chmod 600 {path}"):
            ConnectionFile.load(path)

    def test_of_another_user(self, tmp_path, monkeypatch):
        path = self.put(tmp_path)
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
        with pytest.raises(ConnectionFileError, match="belongs to user"):
            ConnectionFile.load(path)

    def test_not_a_file(self, tmp_path):
        link, fifo, path = tmp_path / "link", tmp_path / "fifo", self.put(tmp_path)
        link.symlink_to(path)
        os.mkfifo(fifo, 0o600)
        none = tmp_path / "none"
        for where, why in {link: "symlink", fifo: "regular", tmp_path: "regular", none: "no connection"}.items():
            with pytest.raises(ConnectionFileError, match=why):
                ConnectionFile.load(where)
        with pytest.raises(ConnectionFileError, match="null"):
            ConnectionFile.load("a\0b")

    def test_unix_addresses_are_only_offered_on_their_host(self):
        mixed = ["ipc:///tmp/work", "tcp://h:1"]
        here = config.this_network()
        assert a_tcp_file(*mixed, network=here).reachable("work") == mixed
        assert a_tcp_file(*mixed, network=here, host="elsewhere").reachable("work") == ["tcp://h:1"]
        assert a_tcp_file(*mixed, network="another").reachable("work") == ["tcp://h:1"]
        assert a_file(network="another").reachable("work"), "there is nothing else"
        tunnel = "tunnel:///tmp/end"
        assert a_tcp_file("ipc:///tmp/work", tunnel, host="elsewhere").reachable("work") == [tunnel]


class TestLock:
    def test_one_broker_per_name(self):
        with ClusterLock.acquire("a") as lock, ClusterLock.acquire("b"):
            assert config.is_held(lock.directory)
            with pytest.raises(ClusterExists, match="down a"):
                ClusterLock.acquire("a")
        assert not config.is_held(lock.directory)
        ClusterLock.acquire("a").remove()

    def test_remove_leaves_nothing_and_can_be_repeated(self, runtime):
        lock = start("a")
        (lock.directory / "logs").mkdir()
        (lock.directory / "logs" / "node.log").write_text("")
        lock.remove()
        lock.remove()
        lock.release()
        assert list(runtime.iterdir()) == []

    def test_the_kernel_frees_it_when_the_broker_is_killed(self):
        code = "from zmqsched.config import *; ClusterLock.acquire('a'); print(flush=True); input()"
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as broker:
            broker.stdout.readline()
            # The lock object is gone in that child, so this also tells that the lock does not hang on it.
            assert config.is_held(config.cluster_dir("a"))
            broker.kill()
        assert not config.is_held(config.cluster_dir("a"))
        ClusterLock.acquire("a").release()

    def test_a_dead_brokers_file_does_not_speak_for_the_next(self):
        start("a").release()
        with ClusterLock.acquire("a"), pytest.raises(ClusterNotFound, match="still starting"):
            config.find_cluster("a")

    def test_a_file_without_a_name_is_no_lock(self, monkeypatch):
        """The remover's race: the lock file goes away between opening and locking it."""
        start("a").release()
        directory = config.cluster_dir("a")
        real = config.fcntl.flock

        def remover_was_faster(fd, operation):
            monkeypatch.setattr(config.fcntl, "flock", real)
            config.remove_cluster_dir("a")
            real(fd, operation)

        monkeypatch.setattr(config.fcntl, "flock", remover_was_faster)
        with ClusterLock.acquire("a") as lock:
            assert lock.directory == directory
            assert config.is_held(directory)
            assert config.fcntl.flock is real, "the remover never came"

    def test_takers_and_removers_at_once(self):
        """Whatever the order, at most one holds it at a time, and each who got it has it in the directory."""
        holders, worst, errors = [], [], []

        def taker():
            for _ in range(30):
                try:
                    lock = ClusterLock.acquire("a")
                except ClusterExists:
                    continue
                holders.append(lock)
                worst.append(len(holders))
                if not config.is_held(lock.directory):
                    errors.append("held, but not to be seen")
                holders.remove(lock)
                lock.remove()

        threads = [threading.Thread(target=taker) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert max(worst) == 1


class TestFinding:
    def test_running_clusters_by_name(self):
        with start("b"), start("a"), ClusterLock.acquire("starting"):
            assert [cluster.name for cluster in config.running_clusters()] == ["a", "b"]

    def test_leftovers_are_removed_when_old(self, runtime):
        start("old").release()
        start("young").release()
        os.utime(runtime / "old", (1, 1))
        assert config.running_clusters() == []
        assert [entry.name for entry in runtime.iterdir()] == ["young"]

    def test_what_is_not_a_cluster_stays(self, runtime, tmp_path):
        config.runtime_dir()
        (runtime / "link").symlink_to(tmp_path)
        (runtime / "file").write_text("")
        assert config.running_clusters() == []
        assert {entry.name for entry in runtime.iterdir()} == {"link", "file"}

    def test_by_name_by_path_and_by_environment(self, monkeypatch):
        with start("default") as default, start("other"):
            path = default.directory / config.CONNECTION_FILE
            assert config.find_cluster().name == "default"
            assert config.find_cluster("other").name == "other"
            assert config.find_cluster(path).name == config.find_cluster(str(path)).name == "default"
            monkeypatch.setenv("ZMQSCHED_CLUSTER", "other")
            assert config.find_cluster().name == "other"
            monkeypatch.setenv("ZMQSCHED_CLUSTER", str(path))
            assert config.find_cluster().name == "default"

    def test_not_found_says_what_runs_and_how_to_start(self):
        with start("one"), pytest.raises(ClusterNotFound, match=r"running: one.*zmqsched up --name default"):
            config.find_cluster()
        with pytest.raises(ClusterNotFound, match="running: none"):
            config.find_cluster("gone")
        with pytest.raises(ConnectionFileError, match=r"no connection file gone\.json"):
            config.find_cluster("gone.json")

    def test_remove_cluster_dir(self, runtime):
        start("a").release()
        config.remove_cluster_dir("a")
        config.remove_cluster_dir("a")
        assert list(runtime.iterdir()) == []
        with start("a"), pytest.raises(ClusterExists):
            config.remove_cluster_dir("a")


def test_sockets_in_the_directory_go_with_it(runtime, monkeypatch):
    with ClusterLock.acquire("a") as lock, socket.socket(socket.AF_UNIX) as unix:
        monkeypatch.chdir(lock.directory)  # the whole path may be too long for a Unix socket
        unix.bind("work")
        monkeypatch.chdir("/")
        lock.remove()
    assert list(runtime.iterdir()) == []
