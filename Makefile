# make check: linters, types and the fast tests, before a commit. make test: all tests. make fast, make lint: parts of these.
# make coverage: how much of the code the fast tests run.
# make matrix: the fast tests as other processors would run them; ARGUMENTS="--all" runs the slow ones too.
# make demo: the whole path, recorded speech to report. make aot: what the GPU compiler makes of the kernels.
# make bench: every benchmark that runs on this device. All make their own virtual environment.
# PYTHON and TORCH may be given: make test TORCH="torch==2.11.0"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := pyproject.toml csrc/CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*)

.PHONY: test fast coverage check matrix demo smoke lint ruff types aot bench clean

# Neighbours share what their file has set up, so each worker takes a run of neighbours.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(STAMP)
	$(PYTEST)

fast: $(STAMP)
	$(PYTEST) -m "not slow"

coverage: $(STAMP)
	$(PYTEST) -m "not slow" --cov=kdkernels --cov=models --cov-report=
	@echo "The fast tests cover $$($(BIN)/python -m coverage report --format=total)% of kdkernels and models."

check: lint fast

matrix: $(STAMP)
	$(BIN)/python tests/matrix.py $(ARGUMENTS)

demo: $(STAMP)
	$(BIN)/python -m models demo

smoke: $(STAMP)
	$(BIN)/python -m models demo --fast-smoke

lint: ruff types

ruff: $(STAMP)
	$(BIN)/python -m ruff check .

types: $(STAMP)
	$(BIN)/python -m mypy kdkernels

aot: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.aot --quick

# Writes benchmarks/results/; an hour and a half of an idle machine.
bench: $(STAMP)
	$(BIN)/python -m pip install --quiet -e ".[bench]"
	$(BIN)/python -m benchmarks.rows --write
	$(BIN)/python -m benchmarks.rows --small --write
	$(BIN)/python -m benchmarks.linear --write
	for sweep in tokens vocab width chunk; do $(BIN)/python -m benchmarks.linear --sweep $$sweep --write || exit 1; done
	$(BIN)/python -m benchmarks.linear --device cpu --sweep threads --write
	$(BIN)/python -m benchmarks.multi_teacher --write
	$(BIN)/python -m benchmarks.contrast --write
	$(BIN)/python -m benchmarks.projection --write
	$(BIN)/python -m benchmarks.parallel --write
	$(BIN)/python -m benchmarks.layers --write
	$(BIN)/python -m benchmarks.memory --write
	$(BIN)/python -m benchmarks.large_vocab --write
	$(BIN)/python -m benchmarks.accuracy --write
	$(BIN)/python -m benchmarks.peers --write
	$(BIN)/python -m benchmarks.step --write
	$(BIN)/python -m benchmarks.cache --write
	$(BIN)/python -m benchmarks.packing --examples 8 --write
	$(BIN)/python -m benchmarks.plots

# torch first and by version, so that the resolver keeps the build that is asked for. The interpreter of Triton 3.6, which comes with
# torch 2.10 and 2.11, fails with NumPy 2.4 and newer.
$(STAMP): $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[train,test]"
	if $(BIN)/python -m pip list --format=freeze | grep -q "^triton==3\.6\."; then \
	  $(BIN)/python -m pip install --quiet "numpy<2.4"; fi
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info

# The documentation as a site, in site/. First, whether its tables are those of the committed CSV files.
.PHONY: docs
docs: $(VENV)/.docs
	$(BIN)/python -m docs.tables --check
	$(BIN)/python -m mkdocs build --strict

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	touch $@
