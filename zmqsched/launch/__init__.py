"""What starts nodes somewhere: one file a launcher, all of them starting the same command, ``zmqsched node``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ..errors import StartError

if TYPE_CHECKING:
    from .base import Launcher

ENTRY_POINTS = "zmqsched.launchers"
# By the names that a group of nodes says; loaded when one is wanted. Packages add theirs as entry points.
LAUNCHERS = {
    "local": "zmqsched.launch.local:LocalLauncher",
    "ssh": "zmqsched.launch.ssh:SSHLauncher",
    "slurm": "zmqsched.launch.slurm:SlurmLauncher",
    "pbs": "zmqsched.launch.pbs:PBSLauncher",
    "sge": "zmqsched.launch.sge:SGELauncher",
}


def launcher_names() -> list[str]:
    """All that there are, of this package and of others that are installed; sorted."""
    from importlib.metadata import entry_points  # takes longer to load than all that is started locally needs

    return sorted({*LAUNCHERS, *entry_points(group=ENTRY_POINTS).names})


def find_launcher(name: str) -> type[Launcher]:
    """The launcher of this name.

    Raises
    ------
    ValueError
        There is none; names those there are.
    StartError
        That of another package cannot be loaded.
    """
    from .base import Launcher

    if home := LAUNCHERS.get(name):
        module, _, attribute = home.partition(":")
        built_in: type[Launcher] = getattr(import_module(module), attribute)
        return built_in
    from importlib.metadata import entry_points

    found = entry_points(group=ENTRY_POINTS, name=name)
    if not found:
        raise ValueError(f"there is no launcher {name!r}; there are {', '.join(launcher_names())}")
    entry = next(iter(found))
    origin = f"the launcher {name!r} ({entry.value}{f' of {entry.dist.name}' if entry.dist else ''})"
    try:
        loaded = entry.load()
    except Exception as error:
        raise StartError(f"{origin} cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Launcher)):
        raise StartError(f"{origin} is not a subclass of zmqsched.launch.base.Launcher")
    return loaded
