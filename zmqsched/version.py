"""The version, as setup.cfg says it at installation, and that of the Python which runs it."""

import platform
from importlib.metadata import PackageNotFoundError, version

# Major and minor: who works together has the same.
PYTHON = ".".join(platform.python_version_tuple()[:2])

try:
    __version__ = version("zmqsched")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
