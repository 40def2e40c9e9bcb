"""Every exception zmqsched raises, one tree, one root.

::

    ZmqschedError
    ├── TaskError                       a task's future ends with one of these
    │   ├── NotSerializable (TypeError)     the call cannot be pickled; names the culprit
    │   ├── PayloadTooLarge (ValueError)    the call or the result is over the stated limit
    │   ├── ResultNotSerializable (TypeError)
    │   ├── ResultDecodeError               the result arrived but cannot be unpickled here
    │   ├── RemoteError                     the task's own exception, as text: it could not be rebuilt here
    │   ├── TaskTimeout (TimeoutError)      the task ran longer than its time limit
    │   ├── WorkerDied                      the task was running each time a worker died
    │   ├── Unschedulable                   no node can ever hold what the task asks for
    │   ├── TooManyWaiting                  the task waited for others, as too many did on its node
    │   ├── DependencyFailed                a future among the task's arguments failed; that error is the cause
    │   └── NotAccepted                     the broker could not take the task, and why
    ├── ClusterError                    the cluster cannot be found, reached or joined
    │   ├── ClusterNotFound (LookupError)
    │   ├── ClusterExists
    │   ├── JobNotFound (LookupError)
    │   ├── JournalError                    the journal is damaged, in use, or of another cluster
    │   ├── ConnectionFileError (ValueError)
    │   ├── ClusterFileError (ValueError)   what was asked for of a cluster cannot be; with the path of each wrong key
    │   ├── CommandFailed                   a node was not drained, paused, ...: there is none, or it is leaving
    │   ├── BrokerUnreachable (ConnectionError)
    │   ├── Refused                         the broker said no, and why
    │   └── ClusterLost (concurrent.futures.BrokenExecutor)
    ├── StartError                      a process of the cluster did not start; holds its own words
    ├── WaitGroupError (ValueError)     the counter went below zero
    └── ProtocolError (ValueError)      bytes from a peer that are not a message of ours
        └── VersionMismatch

A task's own exception is none of these: it arrives as itself, with the traceback it had in its worker.
"""

from __future__ import annotations

from concurrent.futures import BrokenExecutor


class ZmqschedError(Exception):
    """The root: catch it to catch whatever zmqsched itself raises."""


class TaskError(ZmqschedError):
    """A task could not be run or answered; everything else goes on."""


class NotSerializable(TaskError, TypeError):
    """The function or its arguments cannot be pickled."""


class PayloadTooLarge(TaskError, ValueError):
    """A call or result is over the limit; write it to a file and pass the path."""


class ResultNotSerializable(TaskError, TypeError):
    """The task finished but what it returned cannot be pickled."""


class ResultDecodeError(TaskError):
    """The result arrived but unpickling it failed in this process."""


class RemoteError(TaskError):
    """A task raised an exception that cannot be pickled, or not rebuilt here: its type, message and traceback as text."""


class TaskTimeout(TaskError, TimeoutError):
    """The task was stopped because it ran longer than its ``timeout``."""


class WorkerDied(TaskError):
    """The task was running each time one of its workers died, too often to try again."""


class Unschedulable(TaskError):
    """No node of the cluster can ever hold what the task asks for."""


class TooManyWaiting(TaskError):
    """The task waited for tasks of its own, and so did as many on its node as may: nested too deeply, or too wide."""


class DependencyFailed(TaskError):
    """The task was not run, for a future among its arguments failed: how that ended is the ``__cause__``."""


class NotAccepted(TaskError):
    """The broker could not take the task: its journal cannot be written now (the disk is full), or the function of a job's
    task never came, for its client was gone."""


class ClusterError(ZmqschedError):
    """The cluster cannot be found, reached or joined."""


class ClusterNotFound(ClusterError, LookupError):
    """No running cluster of this user has that name."""


class ClusterExists(ClusterError):
    """A cluster of that name is running already."""


class JobNotFound(ClusterError, LookupError):
    """The cluster knows no job of that name: never submitted, or its results were dropped after their time."""


class CommandFailed(ClusterError):
    """A node was not drained, retired, paused or resumed: there is none of that name, or it is leaving, as the text says."""


class JournalError(ClusterError):
    """The broker cannot use its journal, and says why; nothing was changed."""


class ConnectionFileError(ClusterError, ValueError):
    """The connection file is missing, damaged, or not private to this user."""


class ClusterFileError(ClusterError, ValueError):
    """What was asked for of a cluster cannot be, or its file not be read: ``args`` are all the problems, a line each."""

    def __str__(self) -> str:
        return str(self.args[0]) if len(self.args) < 2 else f"{self.args[0]} (and {len(self.args) - 1} more)"


class BrokerUnreachable(ClusterError, ConnectionError):
    """Nobody answers at the broker's addresses."""


class Refused(ClusterError):
    """The broker refused this client or node."""


class ClusterLost(ClusterError, BrokenExecutor):
    """The connection to the broker is gone and did not come back in time."""


class StartError(ZmqschedError):
    """A process of the cluster did not start."""


class WaitGroupError(ZmqschedError, ValueError):
    """A WaitGroup's counter went below zero."""


class ProtocolError(ZmqschedError, ValueError):
    """Bytes from a peer that are not a message of this protocol."""


class VersionMismatch(ProtocolError):
    """The peer speaks another major version of the protocol."""
