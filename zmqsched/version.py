"""The version, as setup.cfg says it at installation."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("zmqsched")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
