# Everything that a developer, a newcomer or CI runs. Needs make and Python 3.11 or newer;
# the rest is installed into $(VENV) on first use, and again when a file that decides it changes.
#
#   PYTHON  interpreter that makes the environment    (default: the first fit one on PATH)
#   VENV    the environment's directory               (default: .venv)
#   MODEL   checkpoint directory for `make serve`     (default: the bundled one)
#   ARGS    more arguments for serve and the tests    (make test ARGS="-k schedule")
#   WORKERS processes that `make test` runs in        (default: 2; 0: in one, as pytest alone)

VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
NODE_CLIENT := tests/service/openai/node
# A file is one worker's, so that what its tests share is made once. In their own order: the
# longest come first, and what is left for one worker at the end is short.
SIDE_BY_SIDE := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
CANDIDATES := $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.14 python)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# The libraries that the tests compare with would otherwise look for models on the network.
test test-device test-slow: export HF_HUB_OFFLINE = 1
# Images of containers forbid Python to keep bytecode. Here hundreds of processes start, each of
# which would compile the program anew, and pytest's rewritten tests twice.
test test-device test-slow lint: export PYTHONDONTWRITEBYTECODE =
.PHONY: help install node-client serve test test-device test-slow lint docs format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## Make the environment and install everything into it

# "exec", so that a signal that ends make ends the service, too.
serve: $(INSTALLED) ## Start the service (MODEL=directory; without: the bundled model)
	exec $(BIN)/fluxd serve $(if $(strip $(MODEL)),--model "$(MODEL)") $(ARGS)

test: $(INSTALLED) ## Run the tests that need no GPU, no network and little time
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-device: $(INSTALLED) ## Run the tests that need a GPU (CUDA or MPS)
	$(BIN)/python -m pytest -m device $(ARGS)

test-slow: $(INSTALLED) ## Run the tests that take minutes or gigabytes
	$(BIN)/python -m pytest -m slow $(ARGS)

lint: $(INSTALLED) ## Check style, format, types and layers
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/lint-imports

docs: $(INSTALLED) ## Write anew what is made from the code: docs/api.md and the layers' diagram
	$(BIN)/fluxd openapi --markdown > docs/api.md
	$(BIN)/python -m tests.docs.diagram

format: $(INSTALLED) ## Format the code and apply the safe fixes
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

clean: ## Remove the environment and all caches
	rm -rf "$(VENV)" .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	rm -rf .hypothesis .schemathesis build dist $(NODE_CLIENT)/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One call installs all, so that the constraints hold for torch, too: an open
# range would bring another build of it. The pip that comes with an older Python takes three times
# as long to find out what fits. It would compile on one core, too, where all of them are here;
# packages hold files for newer Pythons, which do not compile.
$(INSTALLED): pyproject.toml constraints.txt fluxcore/version.py | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check --no-input --quiet 'pip>=26' || \
		echo "there is no newer pip here: installing takes longer"
	$(BIN)/python -m pip install --disable-pip-version-check --no-input --no-compile \
		--constraint constraints.txt --editable '.[test,lint,load]'
	@$(BIN)/python -m compileall -qq -j 0 "$$($(BIN)/python -c \
		'import sysconfig; print(sysconfig.get_path("purelib"))')" || true
	@$(MAKE) --no-print-directory node-client
	@touch $@

# One test uses it, and skips itself without it: a machine without npm or its registry is fine.
node-client: $(wildcard $(NODE_CLIENT)/package-lock.json)
	@if [ -z "$<" ] || ! command -v npm >/dev/null; then \
		echo "npm is missing: the test of the Node client will skip itself"; \
	else \
		npm ci --prefix $(NODE_CLIENT) --no-audit --no-fund --loglevel=error \
			--fetch-retries=1 --fetch-timeout=30000 </dev/null || \
			echo "npm failed: the test of the Node client will skip itself"; \
	fi

$(BIN)/python:
	@for python in $(CANDIDATES); do \
		if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "$$python -m venv $(VENV)"; \
			exec "$$python" -m venv --clear "$(VENV)"; \
		fi; \
	done; \
	echo "no Python 3.11 or newer among: $(CANDIDATES); name one: make PYTHON=/path/to/python3" >&2; \
	exit 1
