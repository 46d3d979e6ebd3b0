# Everything here sets itself up: a virtual environment with the CPU build of torch.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test slow lint replicas bench parity count clean

demo: $(READY)  ## text to image, questions, an edit and a story with the bundled model
	$(BIN)/python examples/demo.py

test: $(READY)  ## all tests but slow ones and those in a browser, on all cores
	$(BIN)/python -m pytest -n auto --dist worksteal --max-worker-restart 0

slow: $(READY)  ## the slow tests, one after the other: some measure the machine
	$(BIN)/python -m pytest -m slow

replicas: $(READY)  ## the tests of several replicas and of curation, with Ray in a separate environment
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet -c constraints.txt -e '.[dev,ray]'
	.venv-ray/bin/python -m pytest tests/serve/test_replicas.py tests/curate/test_ray.py

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## the figures of docs/benchmarks.md, as a table and as JSON
	$(BIN)/python -m benchmarks --json out/benchmarks.json

parity: $(READY)  ## the README's table of differences from the recordings, where they are
	PYTHONPATH=tests $(BIN)/python -m benchmarks.parity

count: $(READY)  ## files that a prompt, a request and a sample pass through; sizes of files
	$(BIN)/python scripts/count_files.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .venv-ray out build
