# Two commands are all it takes:
#
#   make lab    set everything up in .venv and open JupyterLab on the first chapter
#   make test   set everything up and run every check
#
# make test-triton runs the tests of everything that launches kernels on the oldest and the newest Triton that are supported.
# With a GPU, make test-gpu runs every test that needs one, and make memcheck runs every kernel under compute-sanitizer.
# To measure, on a GPU if there is one: make bench
# To call every public function with right and wrong arguments, against an oracle: make fuzz
#
# Variables, for each:
#
#   PYTHON=/path/to/python3.12   the Python to set up with (3.11 to 3.14)
#   TORCH=own                    use the torch that PYTHON already has, not the pinned one
#   ARGS="--no-browser"          more arguments: for JupyterLab, for pytest, or for kvgather bench
#   BROWSER=none                 make test: do not install a browser when there is none
#   VERSIONS="3.8.0"             make test-triton: the versions of Triton, instead of the oldest and the newest
#   WHAT=steps                   make bench: what to measure (kvgather bench --help has the list)
#   CALLS=20000 SEED=0           make fuzz: how many calls, and which; ARGS="--only 1234" repeats one
#
# Paths are relative and nothing runs through a console script, so that the clone may lie under any path.

SHELL = /bin/sh
PY = .venv/bin/python
ARGS =
BROWSER = chromium
WHAT = gather
VERSIONS = 3.6.0 3.9.0
TRITON_TESTS = tests/attention tests/batch tests/gather tests/kernels tests/lab tests/scatter \
	tests/test_cache.py tests/test_plan.py
CALLS = 20000
SEED = 0
NOTEBOOKS = $(sort $(wildcard notebooks/*.ipynb))
NBVAL = --nbval --nbval-sanitize-with tests/notebooks/sanitize.cfg --nbval-cell-timeout 120 $(NOTEBOOKS)
export PYTHON TORCH

.PHONY: help lab test test-triton test-gpu memcheck bench fuzz setup browser lint types format notebooks clean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

lab: setup
	@$(PY) -m kvgather.workbook.launch $(ARGS)

# Two workers on two cores, one thread each: threads that wait for each other cost ten times as much. The last line of the
# output is pytest's own: CI reads it.
test: setup lint types browser
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadscope tests $(if $(NOTEBOOKS),$(NBVAL)) $(ARGS)

# VERSIONS begins with the oldest that pyproject.toml accepts and ends with the newest that was tried.
test-triton: setup
	@OMP_NUM_THREADS=1 sh tools/triton_versions.sh "$(VERSIONS)" -n 2 --dist loadscope $(TRITON_TESTS) $(ARGS)

# Each file in a process of its own, 10 minutes on one H100 with 16 cores at most; writes benchmarks/results/gpu_suite.json.
test-gpu: setup
	@$(PY) tools/gpu_suite.py $(ARGS)

# compute-sanitizer over one launch of every kernel variant; writes benchmarks/results/memcheck.json.
memcheck: setup
	@$(PY) tools/memcheck.py $(ARGS)

# ARGS="--case SHUFFLE-8x64 --csv" measures some cases and keeps their rows in benchmarks/results/.
bench: setup
	@$(PY) -m kvgather bench $(WHAT) $(ARGS)

# About 60 calls a second on one core. tests/fuzz/test_short.py runs some hundred of them.
fuzz: setup
	@$(PY) tools/fuzz.py --calls $(CALLS) --seed $(SEED) $(ARGS)

setup:
	@sh tools/setup.sh

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: setup
	$(PY) -m mypy

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Runs every chapter again and writes its outputs back.
notebooks: setup
	$(PY) -m kvgather.workbook.execute $(NOTEBOOKS)

browser:
	@BROWSER="$(BROWSER)" sh tools/browser.sh

# my-notebooks/ stays: the reader's work is in it.
clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
