# make demo, make test, make lint: each sets up .venv first when it is missing or the dependencies changed
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: .venv/ready
	$(BIN)/mergekit-vision compare --suite demo --output runs/demo

test: .venv/ready
	$(BIN)/pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing PyTorch and what else is needed into .venv: some GB, a few minutes"
	$(BIN)/python -m pip install --editable '.[test,hub]'
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
