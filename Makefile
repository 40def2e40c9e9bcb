# Everything a contributor runs. `make` alone lists the targets.

PYTHON ?= python3
SEEDS ?= 200
REPEAT ?= 1
MESSAGES ?= 1000000
# Of Debian, for `make test-system`; and a file of each, by which one sees that it is there.
PACKAGES = iproute2 nftables libfaketime openssh-client openssh-server tcsh slurm-wlm slurmdbd mariadb-server-core munge openmpi-bin systemd
FILES = /sbin/ip /usr/sbin/nft /usr/lib/*/faketime/libfaketime.so.1 /usr/bin/ssh /usr/sbin/sshd /usr/bin/tcsh /usr/sbin/slurmctld /usr/sbin/slurmd /usr/sbin/slurmdbd /usr/sbin/mariadbd /usr/bin/sbatch /usr/sbin/munged /usr/bin/mpirun /usr/bin/systemd-analyze
PYTEST = -m pytest -q
# Two processes, each with test modules of its own: most tests wait half of the time.
TWO = -n 2 --dist loadfile
# Without what only `make test-system` installs, and what takes minutes: launching.
PLAIN = -m 'not system' --ignore=tests/system
VERSIONS = 3.11 3.12 3.13 3.14

.PHONY: help venv demo test test-all test-system docs lint bench sim fuzz chaos clean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

venv: .venv/.stamp ## make .venv with the package (editable) and the development tools
	@:

# $(1) an interpreter, $(2) the venv's directory, $(3) the extra. A half-made venv (no pip in it) is made anew.
define install
@$(1) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "zmqsched needs Python 3.11 or newer, $(1) is " + sys.version.split()[0] + ": make venv PYTHON=python3.11")'
@$(2)/bin/python -m pip --version >/dev/null 2>&1 || $(1) -m venv --clear $(2)
@$(2)/bin/python -m pip install -qq --disable-pip-version-check -e '.[$(3)]'
@touch $(2)/.stamp
endef

.venv/.stamp: setup.cfg pyproject.toml
	$(call install,$(PYTHON),.venv,dev)

demo: venv ## parse the standard library on a cluster, kill a worker on the way, compare with the serial result
	@.venv/bin/python examples/demo.py

test: venv ## run the tests that need nothing but Python; with LONG=1 some of them in full length
	@.venv/bin/python $(PYTEST) $(TWO) $(PLAIN)

# A pyenv shim may be on PATH for a version that is not switched on, so each candidate is tried.
interpreter = $(firstword $(foreach p,python$(1) $(wildcard $(HOME)/.pyenv/versions/$(1).*/bin/python$(1)),\
	$(shell $(p) -c '' >/dev/null 2>&1 && echo $(p))))
found = $(foreach v,$(VERSIONS),$(if $(call interpreter,$(v)),$(v)))

.venvs/%/.stamp: setup.cfg pyproject.toml
	$(call install,$(call interpreter,$*),.venvs/$*,test)

test-all: ## run the tests on every CPython from 3.11 on that this machine has
	@ran=; for version in $(found); do \
	    echo "== CPython $$version"; \
	    $(MAKE) --no-print-directory .venvs/$$version/.stamp || exit; \
	    .venvs/$$version/bin/python $(PYTEST) $(TWO) $(PLAIN) || { echo "failed on CPython $$version" >&2; exit 1; }; \
	    ran="$$ran $$version"; \
	done; \
	test -n "$$ran" || { echo "no CPython of $(VERSIONS) found" >&2; exit 1; }; \
	echo "passed on CPython$$ran"

.venv/.system: .venv/.stamp
	@.venv/bin/python -m pip install -qq --disable-pip-version-check -e '.[system]'
	@touch $@

# Debian's packages that the tests of this target need; elsewhere than as root, those that lack theirs skip and say so.
test-system: .venv/.system ## run the tests that need other packages (joblib, dask, ...) or a system's (two hosts, a clock that steps)
	@ls $(FILES) >/dev/null 2>&1 || test "$$(id -u)" != 0 || \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(PACKAGES); } >/dev/null
	@.venv/bin/python $(PYTEST) -m system; code=$$?; \
	if [ $$code = 5 ]; then echo "no test is marked 'system': nothing was run"; else exit $$code; fi

docs: .venv/.system ## build the documentation, into build/docs
	@.venv/bin/sphinx-build -q -W -b html docs build/docs

lint: venv ## ruff and mypy --strict
	@.venv/bin/ruff check .
	@.venv/bin/mypy

bench: venv ## measure on this machine
	@.venv/bin/python -m benchmarks

sim: venv ## run the simulation: make sim SEEDS=1000
	@.venv/bin/python -m zmqsched.sim --seeds $(SEEDS)

fuzz: venv ## feed the codec and the cores a million senseless messages: make fuzz MESSAGES=20000
	@.venv/bin/python -m tests.fuzz --messages $(MESSAGES)

chaos: venv ## break things while tasks run, and measure: make chaos ONLY="worker-killed node-frozen" REPEAT=3
	@cd tests && ../.venv/bin/python -m chaos --repeat $(REPEAT) $(ONLY)

clean: ## remove what make and the tools left behind
	@rm -rf .venv .venvs build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
