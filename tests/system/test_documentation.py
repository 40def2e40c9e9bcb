"""The documentation builds without a warning, and its reference has all that is public."""

import subprocess
import sys
from pathlib import Path

import pytest

import zmqsched
from zmqsched import errors

pytestmark = pytest.mark.system

DOCS = Path(__file__).parent.parent.parent / "docs"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    target = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", str(DOCS), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return target


def test_every_page_is_built(built):
    missing = [page for page in DOCS.rglob("*.md") if not (built / page.relative_to(DOCS)).with_suffix(".html").exists()]
    assert missing == []


def test_the_reference_has_every_public_name(built):
    reference = (built / "api.html").read_text()
    names = [name for name in zmqsched.__all__ if name not in ("__version__", "errors")]
    names += [f"errors.{name}" for name, kind in vars(errors).items() if getattr(kind, "__module__", "") == errors.__name__]
    names += ["Client.submit", "Client.map", "Client.options", "Client.shutdown", "Future.cancel"]
    names += ["Cluster.close", "Cluster.from_file"]
    assert [name for name in names if f'id="zmqsched.{name}"' not in reference] == []
