# Everything a person runs. Each target installs what it needs into .venv, once.

PYTHON ?= python3
GSM8K ?= ../shared/gsm8k
BACKBONE ?= trm/bundled
PROCESSES ?= 2
VENV := .venv
CLIENTS := $(VENV)-clients
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
LOCKED := --constraint requirements.lock
UV := $(VENV)/bin/uv
BUNDLE = OMP_NUM_THREADS=1 $(VENV)/bin/torchrun --standalone --nproc-per-node $(PROCESSES) -m training.research.bundle

.PHONY: install serve test newest oldest lock e2e deploy-check lint audit model controls clean

install: $(VENV)/installed-train

serve: $(VENV)/installed
	exec $(VENV)/bin/trm-serve $(if $(PORT),--port $(PORT))

# A file's tests stay in one process, where they share their servers. Each decodes in one thread: see e2e. In the order
# of their names those of tests/e2e, the longest, come first; by their number of tests most of them would come last.
test: export OMP_NUM_THREADS = 1
test: $(VENV)/installed-dev
	$(VENV)/bin/python -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# The fast tests in an environment of their own, with the newest or the oldest versions that pyproject.toml allows.
# FOLDER/requirements.txt then says which versions these are.
newest: RESOLUTION := highest
oldest: RESOLUTION := lowest-direct
newest oldest: | $(UV)
	rm -rf $(VENV)-$@
	$(MAKE) --no-print-directory $(VENV)-$@/bin/python
	$(UV) pip compile --quiet pyproject.toml --extra train --extra dev --resolution $(RESOLUTION) --no-annotate \
	  --python $(VENV)-$@/bin/python --no-header --output-file $(VENV)-$@/requirements.txt
	$(VENV)-$@/bin/python -m pip --disable-pip-version-check install --quiet \
	  --constraint $(VENV)-$@/requirements.txt --editable '.[train,dev]'
	$(VENV)-$@/bin/python -m pytest -m 'not slow'

# Renews the versions that everything else here installs: for every platform, every extra, and torch for CPU and CUDA.
lock: | $(UV)
	$(UV) pip compile --quiet pyproject.toml --all-extras --universal --upgrade --no-annotate \
	  --custom-compile-command 'make lock' --output-file requirements.lock
	$(UV) pip compile --quiet tests/e2e/clients/requirements.in --universal --upgrade --no-annotate \
	  --custom-compile-command 'make lock' --output-file tests/e2e/clients/requirements.txt

# Crowds of clients, other people's tools, failures on purpose; everything else of tests/e2e belongs to `make test`.
# One decoding thread for each server: beside clients and other servers, two wait for each other most of the time.
# Other people's tools and clients take no times, so these two run beside each other.
e2e: export OMP_NUM_THREADS = 1
e2e: export CLIENTS := $(abspath $(CLIENTS))
e2e: $(VENV)/installed-tools $(CLIENTS)/installed
	$(VENV)/bin/python -m pytest tests/e2e/load tests/e2e/operations
	$(VENV)/bin/python -m pytest --numprocesses 2 --dist loadfile tests/e2e/ecosystem tests/e2e/clients

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

# Rebuilds trm/bundled, its decoder and its card, on the backbone that ships: two hours on two cores. BACKBONE=new grows
# that anew first, from nothing, an hour more. Interrupted, it goes on from what lies in runs/bundled. PROCESSES of one
# thread each share the training.
model: $(VENV)/installed-train
	$(BUNDLE) $(if $(filter-out new,$(BACKBONE)),--backbone $(BACKBONE),$(if $(wildcard $(GSM8K)),--text-file $(GSM8K)/train.jsonl)) \
		$(if $(wildcard $(GSM8K)),--gsm8k-validation $(GSM8K)/validation.jsonl)

# Trains what the bundled model's card compares it with, and enters what that reaches there. It goes on, too.
# By estimate four to five hours on two cores.
controls: $(VENV)/installed-train
	$(BUNDLE) --controls

clean:
	rm -rf $(VENV) $(CLIENTS) $(VENV)-newest $(VENV)-oldest build *.egg-info

# Debian without python3-venv cannot put pip into a new environment; the system's own pip can.
%/bin/python:
	$(PYTHON) -m venv $* >/dev/null 2>&1 || { rm -rf $*; $(PYTHON) -m venv --without-pip $* && \
	  $(PYTHON) -m pip --python $@ install pip; } || { rm -rf $*; exit 1; }

$(UV): requirements.lock | $(VENV)/bin/python
	$(PIP) install $(LOCKED) uv
	touch $@

$(VENV)/installed: pyproject.toml requirements.lock | $(VENV)/bin/python
	$(PIP) install $(LOCKED) --editable .
	touch $@

$(VENV)/installed-train: pyproject.toml requirements.lock | $(VENV)/bin/python
	$(PIP) install $(LOCKED) --editable '.[train]'
	touch $@ $(VENV)/installed

$(VENV)/installed-dev: pyproject.toml requirements.lock | $(VENV)/bin/python
	$(PIP) install $(LOCKED) --editable '.[train,dev]'
	touch $@ $(VENV)/installed-train $(VENV)/installed

$(VENV)/installed-tools: pyproject.toml requirements.lock | $(VENV)/bin/python
	$(PIP) install $(LOCKED) --editable '.[train,dev,tools,ray,deploy]'
	touch $@ $(VENV)/installed-dev $(VENV)/installed-train $(VENV)/installed

# What others wrote for OpenAI's servers needs versions of its own; those in Node only where there is Node.
$(CLIENTS)/installed: tests/e2e/clients/requirements.txt tests/e2e/clients/package-lock.json | $(CLIENTS)/bin/python
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check install --quiet --requirement $<
	cp tests/e2e/clients/package.json tests/e2e/clients/package-lock.json $(CLIENTS)
	if command -v npm >/dev/null; then npm ci --silent --prefix $(CLIENTS); fi
	touch $@
