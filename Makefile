# Two commands do everything: `make repro` and `make test`. Both may be run again at any time.
# VENV=path uses another environment, PYTHON=path another interpreter to create it with. LOCK= installs the newest
# versions that pyproject.toml allows instead of those of requirements.lock.

VENV ?= .venv
LOCK ?= requirements.lock
FUZZ_EXAMPLES ?= 2000
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,$(shell \
	$(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(name))))
BIN := $(abspath $(VENV))/bin
INSTALLED := $(VENV)/.afm-pipe-installed
NO_SCM := grep -qs '^ *no_scm *= *true' .dvc/config .dvc/config.local
# The GPU's checks run in any environment with torch, numpy, pytest, pydantic and safetensors. $(BIN) may have spaces,
# which wildcard cannot read.
BARE := PYTHONPATH="$(CURDIR)" $(if $(wildcard $(VENV)/bin/python),"$(BIN)/python","$(PYTHON)")
ON_PATH := PATH="$(BIN):$$PATH"

ifneq ($(words $(VENV)),1)
$(error found VENV=$(VENV), expected a path without spaces)
endif

.PHONY: scm help repro demo test test-slow test-browser test-gpu fuzz bench bench-gpu crash-test docs lint lock install clean

help:
	@echo "make repro         set up, run the pipeline on params.yaml, print the run table"
	@echo "make demo          set up, train the run s4 alone, draw and measure its samples (about 2 minutes)"
	@echo "make test          set up, lint, check types, run the tests"
	@echo "make test-slow     run the slow tests"
	@echo "make test-browser  test the report in a headless Chromium, installed first where possible"
	@echo "make test-gpu      check one GPU in about ten minutes: benchmarks/gpu/NAME.md; needs no data and no network"
	@echo "make bench-gpu     time training, encoding and sampling on one GPU, into the same page"
	@echo "make bench         time the package beside plain implementations: benchmarks/results.md (about 10 minutes, idle machine)"
	@echo "make fuzz          give damaged and hostile files to every loader; some minutes (FUZZ_EXAMPLES=2000 of each)"
	@echo "make crash-test    kill a training run at 50 random moments; rewrites docs/crash-test.json"
	@echo "make lock          write the installed versions into requirements.lock, then run the tests"
	@echo "                   (with LOCK= VENV=.venv-next: the newest versions, in a new environment)"
	@echo "make docs          write the documentation as a site into site/; a warning is an error"
	@echo "make clean         remove what the pipeline made; keep environment, images and weights"

repro: $(INSTALLED)
	@echo "== dvc repro: runs the stages that have changed; the first says how long all take on this machine"
	@echo "== to watch, in another terminal: $(BIN)/afm-pipe report --watch; to resume after an interruption: make repro"
	@$(ON_PATH) dvc repro
	@$(ON_PATH) afm-pipe summary
	@echo "== the report is $(CURDIR)/results/report/index.html"

demo: $(INSTALLED)
	@echo "== dvc repro: the stages that the run s4 needs; to resume after an interruption, run make demo again"
	@$(ON_PATH) dvc repro sample@s4 evaluate@s4
	@echo "== samples, one class a row: $(CURDIR)/samples/s4/grid.png; their metrics: results/metrics/s4.json"
	@echo "== all runs and tables, and the page: make repro"

test: $(INSTALLED) lint
	@echo "== pytest"
	@$(ON_PATH) OMP_NUM_THREADS=1 pytest -n 2

test-slow: $(INSTALLED)
	@$(ON_PATH) pytest -m "slow and not gpu"

test-browser: $(INSTALLED)
	@for name in chromium chromium-browser google-chrome google-chrome-stable; do \
		command -v $$name >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "== installing chromium"; apt-get update -qq && apt-get install -y -qq chromium >/dev/null; \
	else \
		echo "error: found no Chromium or Chrome: install one (Debian: sudo apt install chromium; macOS: put" >&2; \
		echo "google-chrome on PATH), then run make test-browser again." >&2; exit 1; \
	fi
	@$(ON_PATH) pytest -m browser -rs

test-gpu:
	@$(BARE) -m pytest benchmarks/gpu -m gpu

bench-gpu:
	@$(BARE) -m benchmarks.gpu

bench: $(INSTALLED)
	@$(ON_PATH) python -m benchmarks

fuzz: $(INSTALLED)
	@$(ON_PATH) OMP_NUM_THREADS=1 FUZZ_EXAMPLES=$(FUZZ_EXAMPLES) pytest tests/pipeline/test_fuzz.py --hypothesis-profile fuzz

docs: $(INSTALLED)
	@$(ON_PATH) PYTHONPATH="$(CURDIR)" NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
	@echo "== the documentation is $(CURDIR)/site/index.html; mkdocs serve shows it while you write"

crash-test: $(INSTALLED)
	@$(ON_PATH) OMP_NUM_THREADS=1 python -m tests.crash --kills 50

lint: $(INSTALLED)
	@echo "== ruff and mypy"
	@$(ON_PATH) ruff check .
	@$(ON_PATH) ruff format --check .
	@$(ON_PATH) mypy

lock: $(INSTALLED)
	@$(ON_PATH) python .ci/lock.py > requirements.lock.new
	@mv requirements.lock.new requirements.lock
	@touch "$(INSTALLED)"
	@$(MAKE) --no-print-directory test

install: $(INSTALLED)

scm:
	@$(NO_SCM) || command -v git >/dev/null || { echo "error: found no git, which DVC needs: install git." >&2; exit 1; }
	@$(NO_SCM) || test -e .git || git rev-parse --git-dir >/dev/null 2>&1 || { \
		echo "error: found no git repository, which DVC needs (a downloaded zip has none). Either run" >&2; \
		echo "  git init && git add -A && git commit -m start" >&2; \
		echo "or put the lines [core] and no_scm = true into .dvc/config.local, for DVC without git and experiments." >&2; \
		echo "Then run make again. Nothing was installed." >&2; exit 1; }

$(INSTALLED): pyproject.toml $(wildcard $(LOCK)) | scm
	@test -x "$(BIN)/python" || test -n "$(PYTHON)" || { \
		echo "error: found no Python 3.11 or later: install one, or name it with PYTHON=path." >&2; exit 1; }
	@test -x "$(BIN)/python" || "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: found $(PYTHON) without venv: install it (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@test -x "$(BIN)/python" || { echo "== creating $(VENV)"; "$(PYTHON)" -m venv "$(VENV)"; }
	@echo "== installing into $(VENV) (about 6 GB with torch; the first time takes some minutes)"
	@other=$$(cat "$(INSTALLED)" 2>/dev/null); test -z "$$other" || test "$$other" = "$(CURDIR)" || \
		echo "== $(VENV) was that of $$other: its afm-pipe now runs the code of this folder"
	@"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --no-compile $(if $(LOCK),-c "$(LOCK)") -e ".[dev]"
	@echo "$(CURDIR)" > "$(INSTALLED)"

clean:
	rm -rf $(addprefix data/,manifest.json held_out.json latents.h5 reference.done pool.done) models samples reference work
	rm -rf $(addprefix results/,curves events costs metrics tables report rendered toy)
