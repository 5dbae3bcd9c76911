# make demo, make test, make lint, …: each sets up .venv first when it is missing or the dependencies changed
PYTHON ?= python3
BIN := .venv/bin
OLDEST := .venv-oldest
NO_ANSWER := "from mergekit_vision.support.hub import refusal; print(refusal('https://pypi.org/pypi/pip/json', 2.5) or '')"
PYTEST := pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: demo test test-all test-launch test-kernels test-oldest bench bench-quick lint audit style docs clean
.DELETE_ON_ERROR:

demo: .venv/ready
	$(BIN)/mergekit-vision compare --suite demo --output runs/demo

test: .venv/ready
	$(BIN)/$(PYTEST)

# the slow ones too, and more random examples
test-all: .venv/ready
	$(BIN)/$(PYTEST) -m 'slow or not slow' --hypothesis-profile long

# the README's launch by torchrun, as two processes
test-launch: .venv/ready
	$(BIN)/pytest --numprocesses 0 -m slow tests/test_readme.py -k torchrun

# as on other processors, whose kernels round otherwise: without vector instructions, with AVX2, and with two threads
test-kernels: .venv/ready
	ATEN_CPU_CAPABILITY=default $(BIN)/$(PYTEST)
	MKL_ENABLE_INSTRUCTIONS=AVX2 $(BIN)/$(PYTEST)
	OMP_NUM_THREADS=2 $(BIN)/pytest

# with the lowest versions that setup.cfg admits
test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/$(PYTEST)

# the figures of README and docs for the demo and ViT-B/32, in under an hour; then the page docs/benchmarks.md
bench: .venv/ready
	$(BIN)/python -m benchmarks

# a small encoder and little of everything, in five minutes; results stay in runs/benchmarks
bench-quick: .venv/ready
	$(BIN)/python -m benchmarks --quick

# and advisories about the installed versions, where PyPI answers
lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/python -m pip check
	@reason="$$($(BIN)/python -c $(NO_ANSWER))"; if test -n "$$reason"; \
	then echo "pip-audit skipped: PyPI cannot be reached ($$reason)"; \
	elif ! $(BIN)/python -m pip install --quiet pip-audit; then echo "pip-audit skipped: it cannot be installed"; \
	else $(MAKE) --no-print-directory audit; fi

# asks PyPI for advisories about the installed versions
audit: .venv/ready
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --skip-editable

# fixes what lint finds, where that is automatic
style: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/codespell --write-changes

docs: .venv/ready
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/mkdocs build

.venv/ready: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing PyTorch and what else is needed into .venv: a few GB, a few minutes"
	$(BIN)/python -m pip install --editable '.[test,hub,hf,onnx]'
	touch $@

$(OLDEST)/ready: setup.cfg pyproject.toml
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	sed -n 's/^ *\([A-Za-z0-9_-]*\)\(\[[a-z]*\]\)\{0,1\}>=\([0-9.]*\).*/\1==\3/p' setup.cfg > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --constraint $(OLDEST)/constraints.txt --editable '.[test,hub]'
	touch $@

clean:
	rm -rf .venv $(OLDEST) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
