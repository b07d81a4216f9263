# make test: the tests. make demo: the whole path, recorded speech to report. Both make their own virtual environment.
# PYTHON and TORCH may be given: make test TORCH="torch==2.11.0"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := pyproject.toml csrc/CMakeLists.txt $(wildcard csrc/*.cpp csrc/*/*)

.PHONY: test demo smoke lint bench clean

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

demo: $(STAMP)
	$(BIN)/python -m models.demo

smoke: $(STAMP)
	$(BIN)/python -m models.demo --fast-smoke

lint: $(STAMP)
	$(BIN)/ruff check .

bench: $(STAMP)
	$(BIN)/python -m benchmarks.rows
	$(BIN)/python -m benchmarks.linear

# torch first and by version, so that the resolver keeps the build that is asked for.
$(STAMP): $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[train,test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
