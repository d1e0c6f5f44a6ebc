# The only entry: `make help` lists the targets. Each of them sets up what it needs.

# The system's. One that comes before it in PATH may be newer than the oldest that is supported, and slower.
PYTHON ?= $(firstword $(wildcard /usr/bin/python3) python3)
VENV = .venv
STORE = .store
PORT = 8080
CONFIG =
ARGS =
JOBS = 2
VERSION =
BUILDER = buildah bud --format docker

BIN = $(VENV)/bin
# An option wins over the config file: with CONFIG, only what the operator says on make's command line is one.
said = $(or $(if $(CONFIG),,always),$(filter command,$(origin $(1))))
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help serve test coverage fuzz stress crashes check format bench clean
.PHONY: chart docs release audit lock cut image

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  variables: PYTHON=$(PYTHON) PORT=$(PORT) STORE=$(STORE) CONFIG=FILE ARGS="more arguments" JOBS=$(JOBS)'

serve: $(VENV)/serve.stamp ## run the server: PORT=, STORE=, CONFIG=, ARGS=
	@exec $(BIN)/ociproxy serve $(if $(call said,STORE),--image-path '$(STORE)') $(if $(call said,PORT),--port '$(PORT)') \
	    $(if $(CONFIG),--config-path '$(CONFIG)') $(ARGS)

test: $(VENV)/dev.stamp ## install what the tests need, then run them: ARGS= goes to pytest
	@tools/debian-packages.sh -f tools/test-packages.txt
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

coverage: $(VENV)/dev.stamp ## the tests, and which lines of the product they reach, in all its processes
	@tools/debian-packages.sh -f tools/test-packages.txt
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n $(JOBS) --dist loadfile $(ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

fuzz: $(VENV)/dev.stamp ## try more than 100,000 hostile inputs on every parser and on a server
	$(BIN)/python -m pytest -q -p no:cacheprovider --hypothesis-profile=fuzz tests/fuzz $(ARGS)

crashes: $(VENV)/dev.stamp ## kill the product and cut its power, hundreds of times: ARGS= goes to it
	@tools/debian-packages.sh -f tools/test-packages.txt
	$(BIN)/python -m tests.disk $(ARGS)

check: $(VENV)/dev.stamp ## format, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

format: $(VENV)/dev.stamp ## format the code, fix what ruff can fix
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

stress: $(VENV)/dev.stamp ## clients, load, prune and check on a store that is too small: ARGS="--seconds 60"
	$(BIN)/python -m tests.stress $(ARGS)

bench: $(VENV)/bench.stamp ## compare with other mirrors: ARGS= goes to the benchmark
	@tools/debian-packages.sh -f tools/test-packages.txt
	$(BIN)/python -m bench $(ARGS)

chart: $(VENV)/dev.stamp ## what is made from the Helm chart: expected output, plain manifests, its schema
	$(BIN)/python -m tools.chart

docs: $(VENV)/dev.stamp ## the documentation as a site, in site/
	$(BIN)/python -m tools.site

release: audit ## wheel, sdist, bill of materials and checksums, in dist/
	$(BIN)/python -m tools.release

audit: $(VENV)/dev.stamp ## look the pinned dependencies up among known vulnerabilities
	$(BIN)/python -m tools.audit

lock: $(VENV)/dev.stamp ## pin the dependencies anew, for images and the bill of materials
	$(BIN)/uv pip compile --quiet pyproject.toml --python-version 3.11 --universal --generate-hashes --upgrade \
	    --no-annotate --custom-compile-command 'make lock' --output-file tools/requirements.txt

cut: $(VENV)/dev.stamp ## make the unreleased changes a version: VERSION=
	$(BIN)/python -m tools.cut '$(VERSION)'
	$(BIN)/python -m tools.chart

image: release ## the container image: BUILDER='buildah bud --format docker'
	$(BUILDER) --file tools/Dockerfile --tag ociproxy --build-arg VERSION="$$($(BIN)/ociproxy version)" \
	    --build-arg REVISION="$$(git rev-parse HEAD)" --build-arg CREATED="$$(git log -1 --format=%cI)" .

clean: ## remove the virtual environment and the caches; the store stays
	rm -rf $(VENV) .venv-newest dist build site .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find ociproxy tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# The virtual environment is made anew when the dependencies change, which drops its stamps too.
$(VENV)/serve.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo 'ociproxy needs Python 3.11 or newer; $(PYTHON) is' \
	        "$$($(PYTHON) --version 2>/dev/null || echo missing). Try: make PYTHON=python3.11" >&2; \
	    exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || tools/debian-packages.sh python3-venv
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo '$(PYTHON) cannot make virtual environments.' \
	        'On Debian run as root: apt-get install python3-venv' >&2; \
	    exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/dev.stamp: $(VENV)/serve.stamp tools/helm.txt
	$(BIN)/python -m pip install --quiet --use-pep517 --editable '.[test,dev,chart,docs,release]'
	@$(BIN)/python -m tools.helm
	@touch $@

$(VENV)/bench.stamp: $(VENV)/dev.stamp
	$(BIN)/python -m pip install --quiet --use-pep517 --editable '.[test,dev,chart,docs,release,bench]'
	@touch $@
