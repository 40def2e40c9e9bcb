"""What the processes of one cluster must agree on: times, directories, the lock and the connection file.

Rules
-----
* Everything of a running cluster lies in ``cluster_dir(name)``, a directory of mode 0700 in :func:`runtime_dir`:
  ``lock``, ``connection.json``, the Unix sockets, and with TCP a connection file for each narrower role
  (:func:`role_file`). Who can read the directory can use the cluster; nobody else can.
* A cluster runs while its broker holds the lock, and only then. The kernel lets go of a dead process's lock, so
  nothing here trusts pids or ages. A directory without a held lock is a leftover; whoever sees it removes it.
* Only who holds the lock puts files there: what is older may be removed by anybody who lists the clusters.
* The lock file is only removed by one who holds it, and before the directory. So one who has locked a file checks that
  it is still the one in the directory; otherwise its remover came first and it tries again.
* A connection file is private from birth: it is made with mode 0600 under another name and renamed, never chmod-ed.
  Loading trusts nothing and says in one line what is wrong and what to do.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field

from .errors import ClusterExists, ClusterNotFound, ConnectionFileError

# A beat is a few hundred bytes: one a second from a thousand nodes is nothing, and a loss is seen within seconds.
BEAT_INTERVAL_S = 1.0
# One lost packet is repaired by TCP within a second or so; three beats missing in a row is worth a question.
SUSPECT_AFTER_BEATS = 3
# What a suspect has to answer the broker's ping before it is lost. Covers a round trip and a busy agent's loop turn.
PING_GRACE_S = 0.5
# A client that is silent for so long is gone (a notebook's kernel restarts faster), and its open tasks with it.
CLIENT_LEASE_S = 60.0
# A node whose starter is on another host ends when it has not heard of the broker for so long: when the network is gone, the
# end of its standard input may never reach it.
NODE_ALONE_S = 60.0
# Results of a job are kept for this long after the last of its tasks was answered.
KEEP_RESULTS_S = 24 * 3600.0
# For the probe of all of a broker's addresses together: a user waits this long to read "nobody answers".
CONNECT_TIMEOUT_S = 5.0
# How long a client keeps trying to reach a broker that was there before its futures fail with ClusterLost: a broker that
# was suspended for half a minute, or cut off for so long, must find it waiting.
CLUSTER_LOST_AFTER_S = 60.0
# A directory so young may be that of a cluster on its way up.
STALE_AFTER_S = 5.0

DEFAULT_CLUSTER = "default"
LOCK_FILE = "lock"
CONNECTION_FILE = "connection.json"
# What a key lets its holder do (core/roles.py). Who owns the cluster has all of it, in the connection file; the narrower
# ones are to be passed on, each in a file of its own.
Role = Literal["admin", "client", "node", "observer"]
ROLES: tuple[Role, ...] = ("admin", "client", "node", "observer")
# There while somebody ends the cluster by force: no broker is to follow the one that is killed.
STOPPING_FILE = "stopping"
# Raised when a field changes its meaning; new fields with defaults leave it alone.
FILE_FORMAT = 1
# "tunnel:///PATH": a Unix socket on the host that was given the address, which leads to the broker's TCP socket (through
# ssh -R), with CURVE from end to end.
TUNNEL_SCHEME = "tunnel://"
# sockaddr_un holds 108 bytes and libzmq wants one for the closing zero.
MAX_SOCKET_PATH = 107

_NAME = r"\A[A-Za-z0-9_-][A-Za-z0-9._-]{0,39}\Z"
# A connection file is about 600 bytes; a mistaken path to something huge should not be read whole.
MAX_FILE = 64 * 1024
# `ls` holds a lock for microseconds while it looks, and a remover for milliseconds. A broker is there for good.
_LOCK_TRIES, _LOCK_PAUSE_S = 25, 0.01


def runtime_dir() -> Path:
    """The directory of this user's clusters on this host, made if need be.

    ``$ZMQSCHED_DIR``, else ``$XDG_RUNTIME_DIR/zmqsched``, else ``/tmp/zmqsched-UID``. An ``$XDG_RUNTIME_DIR`` that is
    not this user's is passed over: ``su`` and ``sudo -E`` leave that of the user one was before.

    Raises
    ------
    ConnectionFileError
        The directory cannot be made, or others could look into it.
    """
    directory = _configured_runtime_dir()
    make_private(directory)
    return directory


def _configured_runtime_dir() -> Path:
    if chosen := os.environ.get("ZMQSCHED_DIR"):
        return Path(chosen).expanduser().absolute()
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        with contextlib.suppress(OSError):
            if os.path.isabs(session) and os.stat(session).st_uid == os.geteuid():
                return Path(session, "zmqsched")
    return Path(f"/tmp/zmqsched-{os.geteuid()}")


def journal_path(name: str) -> Path:
    """Where the journal of the cluster of this name lies unless told otherwise: where it survives a reboot.

    ``$ZMQSCHED_DIR/.journals``, else ``$XDG_STATE_HOME/zmqsched``, else ``~/.local/state/zmqsched``.
    """
    return _state_dir() / f"{check_name(name)}.journal"


def shared_dir(name: str) -> Path:
    """What hosts of one cluster hand each other through the file system that they share, as the home directory mostly is:
    what batch jobs need and are known by, the connection file for the ranks of one program. ``name`` in the directory of
    journals; made with :func:`make_private`."""
    return _state_dir() / check_name(name)


def _state_dir() -> Path:
    if chosen := os.environ.get("ZMQSCHED_DIR"):
        return Path(chosen).expanduser().absolute() / ".journals"
    if state := os.environ.get("XDG_STATE_HOME"):
        return Path(state, "zmqsched")
    return Path.home() / ".local" / "state" / "zmqsched"


def make_private(directory: Path) -> None:
    """Make the directory with mode 0700, or check that it is one that only this user can enter.

    Raises
    ------
    ConnectionFileError
        It cannot be made, is a symlink, is another user's, or has group or other bits.
    """
    try:
        _make_private(directory)
    except OSError as error:
        raise ConnectionFileError(_not_made(directory, error)) from None


def _not_made(directory: Path, error: OSError) -> str:
    return f"cannot make {directory}: {error.strerror}; set ZMQSCHED_DIR to a directory of yours"


def _make_private(directory: Path) -> None:
    for each in (*reversed(directory.parents), directory):  # those that `parents=True` makes are open to others
        if not os.path.lexists(each):
            with contextlib.suppress(FileExistsError):
                each.mkdir(mode=0o700)
    found = directory.lstat()
    # /tmp is everyone's: another user may have put a directory or a link of this name there first.
    if stat.S_ISLNK(found.st_mode):
        raise ConnectionFileError(f"{directory} is a symlink; remove it or set ZMQSCHED_DIR to a directory of yours")
    if found.st_uid != os.geteuid():
        raise ConnectionFileError(f"{directory} belongs to user {found.st_uid}; set ZMQSCHED_DIR to one of yours")
    if not stat.S_ISDIR(found.st_mode):
        raise ConnectionFileError(f"{directory} is not a directory; remove it or set ZMQSCHED_DIR to one of yours")
    if found.st_mode & 0o077:
        raise ConnectionFileError(f"{directory} is open to other users; run: chmod 700 {directory}")


def this_host() -> str:
    """What the connection file's ``host`` holds."""
    return os.uname().nodename


def this_network() -> str:
    """The running kernel and the network namespace that we are in. Another machine may have the same name, and what is in a
    namespace of its own has a network of its own, even if it sees the same files."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return ""


def role_file(directory: Path, role: Role) -> Path:
    """The connection file in a running cluster's directory to hand to whoever is to have this role. On a cluster that only
    has Unix sockets one file serves all."""
    path = directory / file_name(role)
    return path if path.exists() else directory / CONNECTION_FILE


def file_name(role: Role) -> str:
    """What the connection file of this role is called on a cluster that has keys."""
    return CONNECTION_FILE if role == "admin" else f"{role}.json"


def check_name(name: str) -> str:
    """The name itself, if a cluster may have it.

    Raises
    ------
    ConnectionFileError
        A ValueError of the ``ClusterError`` branch, because the name is a part of the connection file's path.
    """
    if not isinstance(name, str) or not re.fullmatch(_NAME, name):
        raise ConnectionFileError(
            f"{str(name)[:60]!r} cannot name a cluster: use 1 to 40 letters, digits, '.', '_' or '-', no dot at the start"
        )
    return name


def cluster_dir(name: str) -> Path:
    """Where the cluster of this name lives; made by :class:`ClusterLock`, not here."""
    return runtime_dir() / check_name(name)


def ipc_address(directory: Path, role: str) -> str:
    """The address of the Unix socket ``role`` in this directory."""
    path = directory / role
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ConnectionFileError(
            f"the socket path {path} is longer than {MAX_SOCKET_PATH} bytes: set ZMQSCHED_DIR to a shorter path"
        )
    return f"ipc://{path}"


def split_tcp(address: str) -> tuple[str, int]:
    """Host (IPv6 without its brackets) and port of a ``tcp://`` address that one can connect to.

    libzmq connects to port 99999 or to a name that does not exist without a word (pitfall 37); hence the care.

    Raises
    ------
    ValueError
        Says what is wrong with it.
    """
    match = re.fullmatch(r"tcp://(?:\[([^\[\]]*)\]|([^\[\]/\s]*?))(?::(\d{1,9}))?", address)
    if match is None:
        raise ValueError("is not of the form tcp://HOST:PORT")
    inner, host, port = match.groups()
    if inner is not None:
        host = _ipv6(inner)
    elif ":" in host:
        raise ValueError("holds an IPv6 address without brackets: write tcp://[::1]:PORT")
    if not host:
        raise ValueError("has no host")
    if host in ("*", "0.0.0.0", "::"):
        raise ValueError("names every interface, which nobody can connect to")
    if port is None:
        raise ValueError("has no port")
    if not 1 <= int(port) <= 65535:
        raise ValueError(f"has port {port}; ports are 1 to 65535")
    return host, int(port)


def _ipv6(text: str) -> str:
    with contextlib.suppress(ValueError):
        if ip_address(text).version == 6:
            return text
    raise ValueError(f"holds {text!r} in brackets, which is not an IPv6 address")


def ipc_path(address: str) -> str:
    """The file of an ``ipc://`` address. Abstract sockets (``ipc://@x``) are refused: any local user could use them.

    Raises
    ------
    ValueError
        Says what is wrong with it.
    """
    path = address.removeprefix("ipc://")
    if path == address or not path.startswith("/") or "\0" in path:
        raise ValueError("is not of the form ipc:///ABSOLUTE/PATH")
    if len(os.fsencode(path)) > MAX_SOCKET_PATH:
        raise ValueError(f"is longer than {MAX_SOCKET_PATH} bytes: set ZMQSCHED_DIR to a shorter path")
    return path


def tunnel_end(address: str) -> str:
    """A tunnel's Unix socket on this host, as an ``ipc://`` address."""
    return f"ipc://{address.removeprefix(TUNNEL_SCHEME)}"


def check_address(address: str) -> None:
    """Raise ValueError, saying what is wrong, unless one can connect to this address."""
    if address.startswith("tcp://"):
        split_tcp(address)
    elif address.startswith("ipc://"):
        ipc_path(address)
    elif address.startswith(TUNNEL_SCHEME):
        ipc_path(tunnel_end(address))
    else:
        raise ValueError("is neither tcp:// nor ipc://")


_Text = Annotated[str, Meta(max_length=255)]
_Address = Annotated[str, Meta(max_length=512)]
_Addresses = Annotated[list[_Address], Meta(min_length=1, max_length=64)]
# 32 bytes in Z85, or nothing on a cluster that only has Unix sockets.
_Key = Annotated[str, Meta(pattern=r"\A([0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40})?\Z")]


BADGE = "zmqsched-node:"


class Addresses(Struct, frozen=True):
    """Where the broker listens. Several of one kind are the same socket, to be tried in order."""

    work: _Addresses
    beats: _Addresses
    status: _Addresses


class TaskDefaults(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What tasks of the cluster's clients have unless they say otherwise, by ``Client.options``; ``timeout`` 0: none."""

    priority: Annotated[int, Meta(ge=-(2**31), le=2**31)] = 0
    retries: Annotated[int, Meta(ge=0, le=1_000_000)] = 0
    timeout: Annotated[float, Meta(ge=0, le=2**60)] = 0.0
    requeue: bool = True


class ConnectionFile(Struct, frozen=True, kw_only=True):
    """All that a client or node needs to reach a cluster, as the JSON file that the broker writes.

    The key pair is the right to use the cluster; the server's secret key is not in here. Unknown fields are ignored.
    ``role``: what the key pair is for. The broker takes that from the key, so to change it here gives nobody anything.
    ``network``: of the broker's host, see :func:`this_network`.
    """

    format: int = FILE_FORMAT
    name: Annotated[str, Meta(pattern=_NAME)]
    cluster_id: Annotated[str, Meta(min_length=1, max_length=64)]
    host: _Text
    pid: Annotated[int, Meta(ge=1)]
    python: _Text
    zmqsched: _Text
    created: _Text = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    addresses: Addresses
    role: Role = "admin"
    network: _Text = ""
    tasks: TaskDefaults = TaskDefaults()
    server_key: _Key = ""
    client_public: _Key = ""
    client_secret: _Key = ""

    def __repr__(self) -> str:
        # Reprs end up in logs and tracebacks, the secret must not.
        return f"ConnectionFile(name={self.name!r}, role={self.role}, host={self.host!r}, work={self.addresses.work})"

    def reachable(self, role: Literal["work", "beats", "status"]) -> list[str]:
        """The addresses that mean this cluster where we are: on another host, a Unix path may be another cluster's, and so
        it may in another network namespace, a container's perhaps: there TCP is taken, or a tunnel, if there is any."""
        addresses: list[str] = getattr(self.addresses, role)
        others = [address for address in addresses if not address.startswith("ipc://")]
        here = self.host == this_host() and (not others or self.network == this_network())
        return addresses if here else others

    def write_into(self, directory: Path) -> None:
        """Write the file of this role into the cluster's directory."""
        self.write(directory / file_name(self.role))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file, replacing one that is there, readable by this user alone from its first moment on.

        Raises
        ------
        ConnectionFileError
            It cannot be written there.
        """
        replace_private(Path(path), msgspec.json.format(msgspec.json.encode(self), indent=2) + b"\n")

    @property
    def badge(self) -> str:
        """What a node that has this file from its standard input is known by: the name of a memfd that it keeps open, which
        goes when it does, and which only its user can see."""
        return f"{BADGE}{self.cluster_id}:{self.name}"

    def line(self) -> bytes:
        """The file as one line, for a node's standard input (``--connect -``)."""
        return msgspec.json.encode(self) + b"\n"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ConnectionFile:
        """Read and check a connection file.

        Raises
        ------
        ConnectionFileError
            It is missing, damaged, not private, or of another version; one line that says what to do.
        """
        where = Path(path)
        return cls.parse(_read_private(where), str(where))

    @classmethod
    def parse(cls, data: bytes, where: str) -> ConnectionFile:
        """Check what a connection file holds, however it came here; ``where`` names it in errors.

        Raises
        ------
        ConnectionFileError
            It is damaged, or of another version; one line that says what to do.
        """
        if not data:
            raise ConnectionFileError(f"{where} is empty; restart the cluster to have it anew")
        if len(data) > MAX_FILE:
            raise ConnectionFileError(f"{where} is over {MAX_FILE} bytes: not a connection file")
        try:
            raw = msgspec.json.decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ConnectionFileError(f"{where} is not JSON ({error}); restart the cluster to have it anew") from None
        _check_format(where, raw)
        try:
            loaded = msgspec.convert(raw, cls)
        except msgspec.ValidationError as error:
            raise ConnectionFileError(f"{where}: {error}; restart the cluster to have the file anew") from None
        loaded._check(where)
        return loaded

    def _check(self, where: str) -> None:
        """What the types cannot say."""
        addresses = [
            (f"addresses.{role}", address)
            for role in self.addresses.__struct_fields__
            for address in getattr(self.addresses, role)
        ]
        for role, address in addresses:
            try:
                check_address(address)
            except ValueError as error:
                raise ConnectionFileError(f"{where}: {role}: {address!r} {error}") from None
        keys = (self.server_key, self.client_public, self.client_secret)
        if not all(keys) and (any(keys) or not all(address.startswith("ipc:") for _, address in addresses)):
            missing = ("server_key", "client_public", "client_secret")[[bool(key) for key in keys].index(False)]
            raise ConnectionFileError(f"{where}: {missing} is empty, and a tcp:// address needs all keys")


def _check_format(where: str, raw: Any) -> None:
    """Before all other fields: those of another version may be others."""
    if not isinstance(raw, dict) or type(raw.get("format")) is not int:
        raise ConnectionFileError(f"{where} is not a connection file: it has no number in the field `format`")
    if raw["format"] != FILE_FORMAT:
        raise ConnectionFileError(
            f"{where} has format {raw['format']}, this zmqsched reads {FILE_FORMAT}: "
            "use the zmqsched version that started the cluster"
        )


def replace_private(target: Path, data: bytes) -> None:
    """Write a file that is readable by this user alone from its first moment on, in the place of one that is there. It is on
    the disk, under its name, when this returns.

    Raises
    ------
    ConnectionFileError
        It cannot be written there.
    """
    draft = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        _write_private(draft, data)
        os.replace(draft, target)
        _sync_directory(target.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise ConnectionFileError(f"cannot write {target}: {error.strerror}") from None


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_private(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)


def _read_private(path: Path) -> bytes:
    """The bytes of a regular file that only this user can read."""
    try:
        # O_NONBLOCK: opening a FIFO would wait for a writer. What is checked is what was opened, so fstat.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise ConnectionFileError(_why_not_opened(path, error)) from None
    try:
        _check_private(path, os.fstat(fd))
        with open(fd, "rb", closefd=False) as file:
            return file.read(MAX_FILE + 1)
    finally:
        os.close(fd)


def _check_private(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConnectionFileError(f"{path} is not a regular file")
    if found.st_uid != os.geteuid():
        raise ConnectionFileError(f"{path} belongs to user {found.st_uid}; only its owner may use it")
    if found.st_mode & 0o077:
        raise ConnectionFileError(f"{path} is open to other users and holds a key; run: chmod 600 {path}")


def _why_not_opened(path: Path, error: OSError | ValueError) -> str:
    match error:
        case FileNotFoundError():
            return f"there is no connection file {path}; is the cluster running? (zmqsched ls)"
        case OSError(errno=errno.ELOOP):
            return f"{path} is a symlink; give the path of the file itself"
        case OSError():
            return f"cannot read {path}: {error.strerror}"
        case _:  # a zero byte in the path
            return f"cannot read {str(path)!r}: {error}"


class ClusterLock:
    """Held by the broker for its whole life: it makes the cluster's name taken and the cluster running.

    The lock is an ``flock``: it belongs to the open file, so a child that is forked and not exec-ed keeps it held after
    the broker's death. The broker forks nothing; its children are exec-ed, which closes the file.
    """

    def __init__(self, directory: Path, fd: int, *, was_left: bool) -> None:
        self.directory = directory
        self.was_left = was_left  # a broker died here and was not followed by another so far
        self._fd = fd

    @classmethod
    def acquire(cls, name: str) -> ClusterLock:
        """Take the name, making its directory; the connection files that a dead broker left are removed.

        Raises
        ------
        ClusterExists
            A running cluster has it.
        ConnectionFileError
            No cluster may have this name, or the directory is not private.
        """
        directory = cluster_dir(name)
        for _ in range(_LOCK_TRIES):
            try:
                _make_private(directory)
                fd = _try_lock(directory)
            except FileNotFoundError:  # a remover took the directory away in between
                continue
            except OSError as error:
                raise ConnectionFileError(_not_made(directory, error)) from None
            if fd is not None:
                was_left = (directory / CONNECTION_FILE).exists()
                for role in ROLES:
                    (directory / file_name(role)).unlink(missing_ok=True)
                return cls(directory, fd, was_left=was_left)
            time.sleep(_LOCK_PAUSE_S)
        raise ClusterExists(
            f"a cluster named {name!r} is running already: stop it (zmqsched down {name}) or choose another name"
        )

    def release(self) -> None:
        """Let go of the lock and leave the directory. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Remove the directory with all that is in it, then let go of the lock. Idempotent."""
        if self._fd < 0:
            return
        try:
            _remove_locked(self.directory)
        finally:
            self.release()

    def __enter__(self) -> ClusterLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_held(directory: Path) -> bool:
    """Whether a broker is alive behind this cluster directory."""
    try:
        fd = os.open(directory / LOCK_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that any number may look at once.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _try_lock(directory: Path) -> int | None:
    """An open file that holds the directory's lock, or None if another does or it went away meanwhile."""
    path = directory / LOCK_FILE
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Its remover may have held it until just now: then what is locked here is a file without a name.
        if os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False)):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:  # a network filesystem without locks
        os.close(fd)
        raise ConnectionFileError(
            f"cannot lock {path}: {error.strerror}; set ZMQSCHED_DIR to a directory on a local disk"
        ) from None
    os.close(fd)
    return None


def _remove_locked(directory: Path) -> None:
    """The lock goes last but for the directory: if another broker comes in between, the directory stays for it."""
    for entry in list(directory.iterdir()):
        if entry.name == LOCK_FILE:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
    (directory / LOCK_FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        directory.rmdir()


def running_clusters() -> list[ConnectionFile]:
    """The clusters of this user on this host that are up, by name. Leftovers of dead ones are removed on the way.

    A cluster that has its lock but no readable connection file yet (or no more) is left out.
    """
    found = []
    for directory in _cluster_dirs():
        if is_held(directory):
            with contextlib.suppress(ConnectionFileError):
                found.append(ConnectionFile.load(directory / CONNECTION_FILE))
        elif _age_s(directory) > STALE_AFTER_S:
            _remove_stale(directory)
    return found


def _cluster_dirs() -> Iterator[Path]:
    for directory in sorted(runtime_dir().iterdir()):
        if re.fullmatch(_NAME, directory.name) and directory.is_dir() and not directory.is_symlink():
            yield directory


def _age_s(directory: Path) -> float:
    """By the wall clock, which may step; a wrong answer only moves the clean-up, the lock is what protects."""
    try:
        return time.time() - directory.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove_stale(directory: Path) -> None:
    # Whoever lists clusters should not fail over the leavings of another; they are there the next time.
    with contextlib.suppress(OSError, ConnectionFileError):
        fd = _try_lock(directory)
        if fd is not None:
            ClusterLock(directory, fd, was_left=False).remove()


def remove_cluster_dir(name: str) -> None:
    """Remove what a cluster that no longer runs left behind; nothing there is fine.

    Raises
    ------
    ClusterExists
        It does run.
    """
    directory = cluster_dir(name)
    if not directory.exists():
        return
    ClusterLock.acquire(name).remove()


def find_cluster(where: str | os.PathLike[str] | None = None) -> ConnectionFile:
    """The connection file of a cluster.

    Parameters
    ----------
    where
        A path to a connection file (a PathLike, or a str with a ``/`` in it or ending in ``.json``), or the name of a
        cluster running on this host, or None for ``$ZMQSCHED_CLUSTER`` (a path or a name), else the cluster "default".

    Raises
    ------
    ClusterNotFound
        No cluster of that name runs here.
    ConnectionFileError
        The file is missing, damaged or not private.
    """
    if where is None:
        where = lasting_name(where)
    if not isinstance(where, str) or _is_path(where):
        return ConnectionFile.load(Path(where).expanduser())
    directory = cluster_dir(where)
    if not is_held(directory):
        raise ClusterNotFound(_not_found(where))
    if not (directory / CONNECTION_FILE).exists():
        raise ClusterNotFound(f"the cluster {where!r} is still starting; try again in a moment")
    return ConnectionFile.load(directory / CONNECTION_FILE)


def lasting_name(where: str | os.PathLike[str] | None) -> str:
    """What :func:`find_cluster` is given, such that it finds the same in another process of this user."""
    if where is None:
        where = os.environ.get("ZMQSCHED_CLUSTER") or DEFAULT_CLUSTER
    return str(Path(where).expanduser().absolute()) if _is_path(where) else str(where)


def _is_path(where: str | os.PathLike[str]) -> bool:
    return not isinstance(where, str) or "/" in where or where.endswith(".json")


def _not_found(name: str) -> str:
    running = [cluster.name for cluster in running_clusters()]
    return (
        f"no cluster named {name!r} runs here (looked in {runtime_dir()}; running: {', '.join(running) or 'none'}); "
        f"start one with `zmqsched up --name {name}`"
    )
