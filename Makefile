# Two commands suffice:
#
#   make lab    set everything up in .venv and open JupyterLab on the first chapter
#   make test   set everything up and run every check
#
# make test-triton runs the tests of kernels on the oldest and the newest supported Triton.
# On a machine with a GPU, make test-gpu runs every test marked gpu, and make memcheck runs every kernel under
# compute-sanitizer.
# To measure, on a GPU if there is one: make bench
# To call every public function with right and wrong arguments, against an oracle: make fuzz
# To read the chapters, the reference and the measurements as web pages, without a network: make book
# To run every chapter with other values of its constants, and with other seeds: make poke
#
# Variables:
#
#   PYTHON=/path/to/python3.12   the Python to set up with (3.11 to 3.14)
#   TORCH=own                    use the torch that PYTHON already has, not the pinned one
#   ARGS="--no-browser"          more arguments: for JupyterLab, for pytest, or for kvgather bench
#   BROWSER=none                 make test: do not install a browser
#   VERSIONS="3.8.0"             make test-triton: the versions of Triton, instead of the oldest and the newest
#   WHAT=steps                   make bench: what to measure (kvgather bench --help has the list)
#   CALLS=20000 SEED=0           make fuzz: how many calls, and which; ARGS="--only 1234" repeats one
#   ARGS="08b --only PAGE"       make poke: these chapters, and these constants or seeds
#
# Paths are relative and no target uses a console script, so that the clone may have any path.

SHELL = /bin/sh
PY = .venv/bin/python
ARGS =
BROWSER = chromium
WHAT = gather
VERSIONS = 3.6.0 3.9.0
TRITON_TESTS = tests/attention tests/batch tests/gather tests/hopper tests/kernels tests/lab tests/scatter \
	tests/test_cache.py tests/test_plan.py
CALLS = 20000
SEED = 0
NOTEBOOKS = $(sort $(wildcard notebooks/*.ipynb))
NBVAL = --nbval --nbval-sanitize-with tests/notebooks/sanitize.cfg --nbval-cell-timeout 120 $(NOTEBOOKS)
export PYTHON TORCH

.PHONY: help lab test test-triton test-gpu memcheck bench fuzz book poke setup browser lint types format notebooks clean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

lab:
	@start=$$(date +%s); sh tools/setup.sh && echo "kvgather: setup: $$(($$(date +%s) - start)) s"
	@$(PY) -m kvgather.workbook.launch $(ARGS)

# Two workers with one thread each: more threads than cores make the tests ten times slower. CI reads the last line of the
# output, which is pytest's summary.
test: setup lint types browser
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadscope tests $(if $(NOTEBOOKS),$(NBVAL)) $(ARGS)

# VERSIONS begins with the oldest version that pyproject.toml accepts and ends with the newest tested version.
test-triton: setup
	@OMP_NUM_THREADS=1 sh tools/triton_versions.sh "$(VERSIONS)" -n 2 --dist loadscope $(TRITON_TESTS) $(ARGS)

# Runs each file in a process of its own, within 10 minutes on one H100 with 16 cores; writes
# benchmarks/results/gpu_suite.json.
test-gpu: setup
	@$(PY) tools/gpu_suite.py $(ARGS)

# Runs compute-sanitizer over one launch of every kernel variant; writes benchmarks/results/memcheck.json.
memcheck: setup
	@$(PY) tools/memcheck.py $(ARGS)

# ARGS="--case SHUFFLE-8x64 --csv" measures the matching cases and writes their rows to benchmarks/results/.
bench: setup
	@$(PY) -m kvgather bench $(WHAT) $(ARGS)

# About 60 calls a second on one core. tests/fuzz/test_short.py runs some hundred of them.
fuzz: setup
	@$(PY) tools/fuzz.py --calls $(CALLS) --seed $(SEED) $(ARGS)

# Shows the committed outputs and executes nothing. Warnings, dead links and pictures without an alt text are errors.
book: setup
	@OMP_NUM_THREADS=1 $(PY) tools/book.py $(ARGS)
# Ten minutes on two cores. tests/notebooks/test_pokes.py takes one value of each constant, and three seeds.
poke: setup
	@OMP_NUM_THREADS=1 $(PY) tools/poke.py $(ARGS)

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

# Executes every chapter and writes the outputs to its notebook.
notebooks: setup
	$(PY) -m kvgather.workbook.execute $(NOTEBOOKS)

browser:
	@BROWSER="$(BROWSER)" sh tools/browser.sh

# Keeps my-notebooks/, which contains the reader's work.
clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis book/_build build dist
