# Everything a person runs. Each target installs what it needs into .venv, once.

PYTHON ?= python3
GSM8K ?= ../shared/gsm8k
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: install serve test e2e deploy-check lint audit model clean

install: $(VENV)/installed

serve: $(VENV)/installed
	exec $(VENV)/bin/trm-serve $(if $(PORT),--port $(PORT))

test: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest

# Crowds of clients, other people's tools, failures on purpose; everything else of tests/e2e belongs to `make test`.
# One decoding thread for each server: beside clients and other servers, two wait for each other most of the time.
e2e: export OMP_NUM_THREADS = 1
e2e: $(VENV)/installed-tools
	$(VENV)/bin/python -m pytest tests/e2e/load tests/e2e/ecosystem tests/e2e/operations

# Everything in deploy/ that can be checked without a cluster.
deploy-check: $(VENV)/installed-tools
	$(VENV)/bin/python -m pytest tests/deploy

lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Known vulnerabilities of what is installed; asks the package index, so it needs the internet and is no part of the gate.
audit: $(VENV)/installed-tools
	$(PIP) freeze --exclude-editable | sed 's/+.*//' > $(VENV)/audited.txt
	$(VENV)/bin/pip-audit --strict --no-deps --disable-pip --requirement $(VENV)/audited.txt $(AUDIT_FLAGS)

# Rebuilds trm/bundled from nothing: about two hours on two cores. Stages that are finished stay in runs/bundled.
model: $(VENV)/installed
	$(VENV)/bin/python -m training.bundle $(if $(wildcard $(GSM8K)),--text-file $(GSM8K)/train.jsonl --gsm8k-validation $(GSM8K)/validation.jsonl)

clean:
	rm -rf $(VENV) build *.egg-info

# Debian without python3-venv cannot put pip into a new environment; the system's own pip can.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(VENV)/bin/python install pip; } || { rm -rf $(VENV); exit 1; }

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/installed

$(VENV)/installed-tools: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --constraint constraints.txt --editable '.[dev,tools,ray,deploy]'
	touch $@ $(VENV)/installed-dev $(VENV)/installed
