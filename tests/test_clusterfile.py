"""What a cluster's file may hold, and what is said of what it may not."""

from __future__ import annotations

import pickle
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqsched.clusterfile import BatchPart, ClusterFile, HeartbeatPart, NodeGroup, Scale
from zmqsched.errors import ClusterFileError
from zmqsched.hostlist import MAX_HOSTS, hosts_of
from zmqsched.options import duration_argument

EVERYTHING = """
name = "lab"

[broker]
host = "head"
listen = ["10.0.0.1"]
insecure_any_interface = true
port = 5700
journal = "/data/journal"
idle_timeout = "2h"
max_queued = "2G"
policy = "pack"
env = {LANG = "C"}
prologue = ["module load python"]
python = "~/python3"
ssh_options = ["-p", "2222"]

[heartbeat]
interval = 0.5
dead_after = 2

[tasks]
retries = 2
timeout = "10m"
priority = -1
requeue = false

[[nodes]]
name = "fast"
launcher = "ssh"
hosts = ["gpu[1-2]", "a,b"]
slots = 8
resources = {gpu = 4, disk = 1.5}
tags = ["big"]
env = {OMP_NUM_THREADS = "1"}
cwd = "/data"
prologue = ["module load python"]
python = "/opt/bin/python3"
ssh_options = ["-p", "2222"]
max_tasks_per_worker = 100
memory_limit = "4G"
memory_soft = 0.5
scale = {min = 1, max = 6}

[[nodes]]
launcher = "slurm"
batch = {nodes = 4, time = "1-12:00:00", partition = "short", account = "acct", array = true, options = ["--qos=low"]}
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load(text: str | bytes) -> ClusterFile:
        Path("c.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return ClusterFile.load("c.toml")

    return load


@pytest.fixture
def problems(load):
    def problems(text: str | bytes) -> list[str]:
        with pytest.raises(ClusterFileError) as raised:
            load(text)
        assert all(line.startswith("c.toml: ") and "\n" not in line for line in raised.value.args)
        assert str(raised.value).count("\n") == 0
        return [line.removeprefix("c.toml: ") for line in raised.value.args]

    return problems


# What it may hold.


def test_an_empty_file_is_a_cluster_on_this_machine(load):
    assert load("") == ClusterFile(nodes=(NodeGroup(name="local"),)) == ClusterFile().checked()


def test_every_key_is_read(load):
    file = load(EVERYTHING)
    assert (file.name, file.broker.idle_timeout, file.broker.max_queued, file.tasks.timeout) == ("lab", 7200, 2 << 30, 600)
    fast, slurm = file.nodes
    assert fast.hosts == ("gpu1", "gpu2", "a", "b")
    assert (fast.memory_limit, fast.scale, fast.resources) == (4 << 30, Scale(min=1, max=6), {"gpu": 4.0, "disk": 1.5})
    assert (slurm.name, slurm.batch.time, slurm.batch.options) == ("slurm", 36 * 3600, ("--qos=low",))
    for part in (file, file.broker, file.heartbeat, file.tasks, fast, slurm.batch):  # nothing is as it is by default
        same = [key for key in part.__struct_fields__ if getattr(part, key) == getattr(type(part)(), key)]
        assert same in ([], ["count", "batch"])
    assert file.checked() == file


def test_hosts_may_be_one_text(load):
    assert load('nodes = [{launcher = "ssh", hosts = "a, n[08-10]"}]').nodes[0].hosts == ("a", "n08", "n09", "n10")


def test_a_broker_alone(load):
    assert load("nodes = []").nodes == ()


@pytest.mark.parametrize(
    ("group", "size"),
    [
        (NodeGroup(), 1),
        (NodeGroup(count=3), 3),
        (NodeGroup(launcher="ssh", hosts=("a", "b")), 2),
        (NodeGroup(launcher="ssh", hosts=("a", "b"), count=5), 5),
        (NodeGroup(launcher="slurm", batch=BatchPart(nodes=4)), 4),
        (NodeGroup(scale=Scale(min=0, max=4)), 0),
        (NodeGroup(scale=Scale(min=0, max=4), count=2), 2),
    ],
)
def test_with_how_many_nodes_a_group_starts(group, size):
    assert group.size == size


# What it may not.


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("nam = 'x'", "nam: no such key; did you mean `name`?"),
        ("zzz = 1", "zzz: no such key; there are name, broker, heartbeat, tasks, nodes"),
        ("hosts = 'a'", "hosts: no such key; did you mean `nodes.hosts`?"),
        ("'\\u0000 odd' = 1", r"'\\u0000 odd': no such key"),
        ("name = 3", "name: expected str, got int"),
        ("name = 1979-05-27", "name: expected str, got date"),
        ("name = 'a b'", "name: 'a b' cannot name a cluster"),
        ("name = '../x'", "cannot name a cluster"),
        ("broker = 3", "broker: expected a table, got int"),
        ("nodes = 3", "nodes: expected an array, got int"),
        ("[nodes]", "nodes: expected an array, got a table"),
        ("nodes = [1]", "nodes[0]: expected a table, got int"),
        ("[[nodes]]\n[[nodes]]\nslots = 'x'", "nodes[1].slots: expected int, got str"),
        ("[[nodes]]\nslots = -1", "nodes[0].slots: expected int >= 0, not -1"),
        ("[[nodes]]\nslots = true", "nodes[0].slots: expected int, got bool"),
        ("[[nodes]]\ncount = 10001", "nodes[0].count: expected int <= 10000, not 10001"),
        ("[[nodes]]\nsloots = 1", "nodes[0].sloots: no such key; did you mean `slots`?"),
        ("[[nodes]]\npartition = 'a'", "nodes[0].partition: no such key; did you mean `batch.partition`?"),
        ("[[nodes]]\nenv = {A = 1}", "nodes[0].env.A: expected str, got int"),
        ("[[nodes]]\nenv = {'A B' = '1'}", "nodes[0].env: 'A B' cannot name a variable"),
        ('[[nodes]]\nenv = {A = "a\\u0000"}', "nodes[0].env.A: holds a zero byte"),
        ("[[nodes]]\nname = 'a/b'", "nodes[0].name: 'a/b' cannot name a group"),
        ("[[nodes]]\nname = '-x'", "cannot name a group"),
        ("[[nodes]]\n[[nodes]]", "nodes[1].name: nodes[0] is called 'local' already; give each group a name"),
        (
            "[[nodes]]\nname = 'ssh'\n[[nodes]]\nlauncher = 'ssh'\nhosts = 'a'",
            "nodes[1].name: nodes[0] is called 'ssh' already",
        ),
        ("[[nodes]]\nlauncher = 'ssh'", "nodes[0].hosts: the launcher ssh needs some"),
        ("[[nodes]]\nhosts = ['a']", "nodes[0].hosts: the launcher local takes none; did you mean ssh?"),
        ("[[nodes]]\nlauncher = 'slurm'\nhosts = ['a']", "nodes[0].hosts: the launcher slurm takes none; see batch.options"),
        ("[[nodes]]\nlauncher = 'ssh'\nhosts = ['a', 'n[']", "nodes[0].hosts: 'n[': brackets are written"),
        (
            "[[nodes]]\nlauncher = 'ssh'\nhosts = 'gpu[1-999999999]'",
            "nodes[0].hosts: 'gpu[1-999999999]' names 999999999 hosts",
        ),
        ("[[nodes]]\nlauncher = 'ssh'\nhosts = ['a', 'a']", "nodes[0].hosts: host a is named twice"),
        (
            "[[nodes]]\nlauncher = 'ssh'\nhosts = ['-oProxyCommand=x']",
            "nodes[0].hosts: '-oProxyCommand=x' cannot name a host",
        ),
        ("[[nodes]]\nssh_options = ['-v']", "nodes[0].ssh_options: the launcher local takes none"),
        ("[[nodes]]\nbatch = {nodes = 2}", "nodes[0].batch: the launcher local asks no batch system"),
        ("[[nodes]]\nbatch = {time = '30'}", "nodes[0].batch.time: '30' has no unit: write it as 90s, 30m, 1h or 2d"),
        ("[[nodes]]\nbatch = {time = 'soon'}", "nodes[0].batch.time: 'soon' is not a duration"),
        ("[[nodes]]\nbatch = {time = nan}", "nodes[0].batch.time: expected float >= 0.0, not nan"),
        ("[[nodes]]\nscale = {min = 3, max = 2}", "nodes[0].scale: min is 3, more than max, 2"),
        ("[[nodes]]\nscale = {mn = 3}", "nodes[0].scale.mn: no such key; did you mean `min`?"),
        ("[[nodes]]\nscale = 3", "nodes[0].scale: expected a table | null, got int"),
        ("[[nodes]]\ncount = 3\nscale = {max = 2}", "nodes[0].count: 3 is not between scale.min and scale.max"),
        ("[[nodes]]\nresources = {gpu = -1}", "nodes[0].resources: resources['gpu'] must be a finite number"),
        ("[[nodes]]\nresources = {gpu = inf}", "nodes[0].resources: resources['gpu'] must be a finite number"),
        ("[[nodes]]\ntags = ['a', '']", "nodes[0].tags[1]: a name is not empty"),
        ("[[nodes]]\nmemory_limit = 'much'", "nodes[0].memory_limit: 'much' is not a size"),
        ("[[nodes]]\nmemory_soft = 0", "nodes[0].memory_soft: expected float > 0.0, not 0"),
        ('[[nodes]]\npython = "a\\u0000"', "nodes[0].python: holds a zero byte"),
        ('[[nodes]]\nprologue = ["a\\u0000"]', "nodes[0].prologue: holds a zero byte"),
        ("[[nodes]]\ncount = 9000\n[[nodes]]\nname = 'b'\ncount = 9000", "nodes: are more than 10000 in all"),
        ("broker = {port = 65534}", "broker.port: expected int <= 65533, not 65534"),
        ("broker = {host = 'a,b'}", "broker.host: 'a,b' is not one host"),
        ("broker = {host = '-oProxyCommand=x'}", "broker.host: '-oProxyCommand=x' cannot name a host"),
        ("broker = {python = '/a'}", "broker.python: is for a broker on another host; say which (broker.host)"),
        ("broker = {host = 'a', env = {'A B' = '1'}}", "broker.env: 'A B' cannot name a variable"),
        (
            "broker = {policy = 'least-loded'}",
            "broker.policy: there is no policy 'least-loded'; did you mean 'least-loaded'?",
        ),
        ("broker = {max_queued = 99999999999999999999}", "broker.max_queued: expected int <= "),
        ("broker = {journal = 3}", "broker.journal: expected bool | str, got int"),
        ("heartbeat = {interval = 0}", "heartbeat.interval: must be above 0"),
        ("heartbeat = {interval = inf}", "heartbeat.interval: expected float <= "),
        ("heartbeat = {interval = 5}", "heartbeat.dead_after: must be at least three times heartbeat.interval (5 s)"),
        ("tasks = {timeout = -1}", "tasks.timeout: expected float >= 0.0, not -1"),
        ("tasks = {priority = 2147483649}", "tasks.priority: expected int <= 2147483648, not 2147483649"),
        ("a = [1, 2", "is not TOML: Unclosed array"),
        ("a = 1\na = 2\n", "is not TOML: Cannot overwrite a value (at line 2"),
        (b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_what_cannot_be_is_an_error_with_its_path(text, problem, problems):
    assert problems(text)[0].startswith(problem) or problem in problems(text)[0]


def test_all_problems_are_found_in_their_order(problems):
    found = problems("name = 1\n[broker]\nport = 'x'\n[[nodes]]\nslots = 'y'\nnope = 1\nenv = {A = 2}\n")
    assert [line.partition(":")[0] for line in found] == [
        "name",
        "broker.port",
        "nodes[0].slots",
        "nodes[0].nope",
        "nodes[0].env.A",
    ]
    found = problems("name = ' '\n[[nodes]]\nlauncher = 'ssh'\nscale = {min = 2}\n")
    assert [line.partition(":")[0] for line in found] == ["name", "nodes[0].hosts", "nodes[0].scale"]


def test_the_error_is_one_line_that_says_how_many_there_are(load):
    with pytest.raises(ClusterFileError, match=r"^c.toml: name: expected str, got int \(and 1 more\)$") as raised:
        load("name = 1\nnope = 2")
    assert pickle.loads(pickle.dumps(raised.value)).args == raised.value.args


@pytest.mark.parametrize(("path", "says"), [("nowhere", "no such file"), (".", "is a directory"), ("/dev/zero", "larger")])
def test_a_file_that_cannot_be_read(path, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ClusterFileError, match=f"^{path}: .*{says}"):
        ClusterFile.load(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x" * 10_000_000, "is larger than"),
        ("a=" + "[" * 100_000, "is nested too deeply"),
        ("a." * 300_000 + "b=1", "a key of 300001 parts"),
        ('"a"."b".' * 100_000 + "b=1", "a key of 200001 parts"),
        ("'''\\'''\n" + "[" + "a." * 300_000 + "b]", "a key of 300001 parts"),
        ('"\\' * 400_000, "is not TOML"),
        ('"""\\' * 200_000, "is not TOML"),
        ("a=" + "9" * 5000, "is not TOML"),
        ("\n".join(f"a{i}=1" for i in range(20_000)), "a0: no such key"),
        ("[[nodes]]\n" * 20_000, "nodes: holds 20000 items"),
    ],
    ids=lambda value: value[:12],
)
def test_no_file_takes_much_memory_or_time(text, says, problems):
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, limits[1]))
    try:
        found = problems(text)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert says in found[0]
    assert len(found) <= 100
    assert max(map(len, found)) < 400


def test_dots_in_texts_and_comments_are_no_keys(load):
    dots = "." * 200
    assert load(f"name = \"a\" # {dots}\n# {dots}\n[[nodes]]\nprologue = [\"{dots}\", '''\n{dots}\n''']\n").name == "a"


# Built in Python: the same checks.


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        (ClusterFile(name="a b"), "name: 'a b' cannot name a cluster"),
        (ClusterFile(nodes=(NodeGroup(slots="8"),)), "nodes[0].slots: expected int, got str"),
        (ClusterFile(nodes=(NodeGroup(launcher="ssh", hosts=("a[1-",)),)), "nodes[0].hosts: 'a[1-': brackets"),
        (ClusterFile(heartbeat=HeartbeatPart(interval=2.0, dead_after=2.0)), "heartbeat.dead_after: must be at least"),
        (ClusterFile(nodes=(NodeGroup(cwd=object()),)), "unsupported"),
    ],
)
def test_what_is_built_in_python_is_checked(file, problem):
    with pytest.raises(ClusterFileError) as raised:
        file.checked()
    assert problem in raised.value.args[0]


# Lists of hosts.


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("host1", "host1"),
        ("host1,host2,gpu[1-4]", "host1 host2 gpu1 gpu2 gpu3 gpu4"),
        ("rack[01-03]n[1,3-5]", " ".join(f"rack{r}n{n}" for r in ("01", "02", "03") for n in (1, 3, 4, 5))),
        ("n[8-11]", "n8 n9 n10 n11"),
        ("n[008-011]x", "n008x n009x n010x n011x"),
        ("n[99-101]", "n99 n100 n101"),
        ("[1-2].example.org", "1.example.org 2.example.org"),
        (" a , me@b ", "a me@b"),
        ("::1,fe80::1%eth0,ssh://me@h:22", "::1 fe80::1%eth0 ssh://me@h:22"),
    ],
)
def test_lists_of_hosts(text, hosts):
    assert " ".join(hosts_of(text)) == hosts


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no host"),
        ("a,,b", "beside one of its commas"),
        ("a,", "beside one of its commas"),
        ("a[", "brackets are written as"),
        ("a]", "brackets are written as"),
        ("a[[1]]", "brackets are written as"),
        ("a[1-2", "brackets are written as"),
        ("a[]", "neither a number nor a range"),
        ("a[x]", "neither a number nor a range"),
        ("[::1]", "neither a number nor a range"),
        ("a[1-99999999999]", "neither a number nor a range"),
        ("a[5-3]", "runs backwards; write 3-5"),
        ("gpu[1-999999999]", "names 999999999 hosts; a list may name 10000"),
        ("a[1-9999]b[1-9999]", "names 99980001 hosts"),
        ("a[1-9999],b[1-9999]", "names 9999 hosts; a list may name 10000"),
        ("n[1-3,2]", "host n2 is named twice"),
        ("-v", "cannot name a host"),
        ("a@-oProxyCommand=x", "cannot name a host"),
        ("a b", "cannot name a host"),
        ("$(reboot)", "cannot name a host"),
        ("a;b", "cannot name a host"),
        ("x" * 300, "cannot name a host"),
        ("a," * 200_000, "at most 262144 characters"),
    ],
)
def test_what_is_no_list_of_hosts(text, says):
    with pytest.raises(ValueError, match=says) as raised:
        hosts_of(text)
    assert len(str(raised.value)) < 300


@given(st.text(alphabet="ab1290[]-,@. ", max_size=40))
def test_any_text_is_a_list_of_hosts_or_an_error(text):
    try:
        hosts = hosts_of(text)
    except ValueError:
        return
    assert 0 < len(hosts) <= MAX_HOSTS
    assert all(host and not host.startswith("-") and not set(host) & set("[], ") for host in hosts)
    assert hosts_of(",".join(hosts)) == hosts


# Durations.


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90), ("30m", 1800), ("1h", 3600), ("2d", 172800), ("1h30m", 5400), ("1.5h", 5400), ("0s", 0),
        ("30:00", 1800), ("1:00:00", 3600), ("1-12", 129600), ("1-12:30", 131400), ("1-12:00:05", 129605),
    ],
)  # fmt: skip
def test_durations(text, seconds):
    assert duration_argument(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "30",
        "1.5",
        "s",
        "1m1h",
        "1 h",
        "-1s",
        "1e3s",
        "h1",
        "UNLIMITED",
        "1-",
        "1:2:3:4",
        "9" * 5000,
        "\N{ARABIC-INDIC DIGIT ONE}h",
    ],
)
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match=r"has no unit|is not a duration") as raised:
        duration_argument(text)
    assert len(str(raised.value)) < 130
