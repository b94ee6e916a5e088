# `make help` lists the targets.
PYTHON ?= $(shell for python in python3.11 python3 python3.14 python3.13 python3.12; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$python; break; }; done)
ARGS ?=
# pytest-xdist: neighboring tests stay together, because they share servers; an idle worker takes tests from others.
WORKERS := -n auto --maxprocesses 4 --dist worksteal
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help setup run lint check test soak test-integrations grafana dashboards drill

help:  ## list the targets
	@sed -En 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 27

setup: .venv/.complete .servers/.complete  ## build .venv and fetch the servers, if something changed

run: setup  ## start everything and train; options: make run ARGS="--help", trainer's after --: ARGS="-- --help"
	@.venv/bin/python -m stack $(ARGS)

drill: setup  ## test paging with what `make run` started; options: make drill ARGS="--help"
	@.venv/bin/python -m stack.drill $(ARGS)

grafana: .venv/.complete  ## fetch Grafana from its publisher (some 200 MB) for `make run`; a mirror: ARGS="--help"
	@.venv/bin/python -m stack.grafana $(ARGS)

dashboards: .venv/.complete  ## write grafana/dashboards/ after a change of their Python
	@.venv/bin/python -m grafana $(ARGS)

lint: .venv/.complete  ## check style, format and types
	@.venv/bin/ruff check
	@.venv/bin/ruff format --check
	@.venv/bin/mypy

check: lint  ## after every edit: lint, and the tests that start no other process
	@.venv/bin/python -m pytest $(WORKERS) -q -r fE --no-processes --ignore tests/web $(ARGS)

test: setup  ## run every test but the soak tests; pytest's options: make test ARGS="-k name", one process: ARGS="-n 0"
	@.venv/bin/python -m pytest $(WORKERS) $(ARGS)

soak: setup  ## run the tests that take long and rarely find anything
	@.venv/bin/python -m pytest -m soak $(ARGS)

# Trainers that do not fit beside the project's own dependencies have their own environments, in .integrations/.
OTHERS := $(notdir $(basename $(wildcard tests/integrations/environments/*.txt)))

test-integrations: setup $(OTHERS:%=.integrations/%/.complete)  ## run the tests of every trainer; builds their environments
	@failed=; for python in .venv/bin/python $(OTHERS:%=.integrations/%/bin/python); do \
		echo "$$python:"; $$python -m pytest tests/integrations $(ARGS) || [ $$? = 5 ] || failed="$$failed $$python"; \
	done; [ -z "$$failed" ] || { echo "error: tests failed in$$failed" >&2; exit 1; }  # 5: no test here matches ARGS

.integrations/%/.complete: tests/integrations/environments/%.txt pyproject.toml
	@rm -f $@; echo "Building .integrations/$* ..."; \
	$(PYTHON) -m venv --clear .integrations/$*; \
	.integrations/$*/bin/python -m pip install --quiet --disable-pip-version-check -r $< -e .; \
	touch $@

# Write the stamp last, so that an interrupted set-up is repeated.
.venv/.complete: pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "error: Python 3.11 or newer is needed; Debian, Ubuntu: apt-get install python3.11 python3.11-venv" >&2; \
		exit 1; \
	fi
	@rm -f $@; started=$$SECONDS; \
	version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'); \
	if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then \
		if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
			echo "error: Python $$version lacks its venv module: apt-get install python$$version-venv" >&2; \
			exit 1; \
		fi; \
		echo "Building .venv with Python $$version ..."; \
		$(PYTHON) -m venv --clear .venv; \
	fi; \
	echo "Installing the pinned dependencies; PyTorch is large, so the first time takes minutes ..."; \
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'; \
	touch $@; \
	echo "  .venv: ready after $$((SECONDS - started)) s"

.servers/.complete: stack/servers.py | .venv/.complete
	@.venv/bin/python -m stack.servers
	@mkdir -p .servers && touch $@
