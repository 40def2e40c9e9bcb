"""The simulator: the real scheduler, the real agents and the real clients, in one thread on a virtual clock, with faults.

Rules
-----
* Same seed, same run. Everything random comes from one ``random.Random(seed)``.
* Workers are simulated: a task's call says how long it runs and how it ends.
* Some tasks have tasks (``families.py``): they count on a WaitGroup, submit children with a client in their worker, behind
  fences, and wait for them or not. Across a broker's restart nothing is checked of what families have counted.
* Each seed switches on each of ``runs.FAULTS`` with a chance of one half, and with random strength (all at once would mask
  bugs). A quiet tail follows, in which everything must finish, and both ends must come to agree: safety is not enough.
* Each process has a clock of its own, which began at a time of its own. Nothing may compare them.
* A failure says its seed; ``python -m zmqsched.sim --start SEED --seeds 1 --verbose`` tells the story.

What is checked, and where
--------------------------
=====================================================  ==============================================================
a task is in exactly one state                         ``Scheduler.sanity_check``, ``Placement.sanity_check``
running means one live lease                           ``Scheduler.sanity_check``
a node starts nothing once it was given up             ``SimNode``, at each run given to a worker
attempt numbers only grow                              ``Watch``, at each dispatch
finished is never queued again                         ``Watch``, at each dispatch
exactly one final answer                               ``Watch``, at each final; ``SimClient``, at each answer
no node exceeds its credit                             ``Node.take``, at each dispatch; ``SimNode``, after each turn
a node that leaves or is suspect gets nothing new      ``Watch``, at each dispatch
no task goes to a node that leaves before it may end  ``Watch``, at each dispatch
no worker runs more tasks than it may                  ``SimWorker``, at each start
who is to leave has left by then                       ``SimNode``, after each turn
what was handed back is not started                    ``SimNode``, at each run given to a worker
what was cancelled is not started again                ``Watch``, at each dispatch
no task waits while an eligible node has credit        ``Placement.check_nothing_waits``
a lost node holds nothing                              ``Scheduler.sanity_check``
a node is lost only if it was silent, and soon then    ``Watch``, at each verdict and each turn
only a started task is blamed for a death              ``SimNode``, at each report; ``SimClient``, at each ``WorkerDied``
a late error decides nothing                           ``Watch``, at each result
``requeue=False`` without retries runs at most once    ``SimWorker``, at each start
the answer is the right one; retries are not deaths    ``SimClient``, at each answer
what a task prints comes before its answer             ``SimClient``, at each answer and each line
a WaitGroup is zero when its tasks are answered        ``SimClient``, at each reply
no attempt counts twice, no wait outlives its debts    ``Debts``, at each reply; ``runs.Cluster.complaint``, at the end
a task that waits for its children waits for all       ``Family``, at each reply
all are answered, nothing is kept, both ends agree     ``runs.Cluster.complaint``, at the end
no message raises                                      everywhere: an exception of a core ends the run
nobody talks without end                               ``World.run_until``: the steps of a run are counted
executions per task do not creep up                    ``tally.MOST_EXECUTIONS``, over many seeds
=====================================================  ==============================================================

What is left out for speed: every fourth seed is *thorough*. There each message is really encoded and decoded, and each
core's ``sanity_check`` runs after every turn. In the others messages are handed over as they are, and the check runs after
every eighth turn of a process and at the end. All other checks run always.
"""

from .runs import simulate

__all__ = ["simulate"]
