# `make demo` and `make test` build their environment by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
# One process for each core, each with one thread; a file's tests stay together, as they share what they have trained.
PYTEST := -m pytest -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-fast test-oldest lint docs clean

# Rebuilt when pyproject.toml is newer; a failed installation leaves no stamp behind.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, found %d.%d; set PYTHON=..." % v[:2])'
	$(PYTHON) -m venv --upgrade-deps $(VENV)
	@echo "Installing into $(VENV): PyTorch and the other libraries are several GB, this takes a few minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

# The oldest version that pyproject.toml allows of each library that the package needs
$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv --upgrade-deps $(OLDEST)
	$(PYTHON) -c 'import re, tomllib; print(*(re.sub(r"\[.*\]|,.*", "", line).replace(">=", "==") for line in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]), sep="\n")' > $(OLDEST)/oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c $(OLDEST)/oldest.txt
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/mcseg fit --config synthetic

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-fast: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not slow"

# Old libraries beside new ones warn of what the new ones will drop.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) -W ignore::DeprecationWarning -W ignore::FutureWarning

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	@touch $@

# -W makes a warning an error, -a and -E build everything again: an incremental build warns of changed pages only.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -a -E docs build/docs
	@echo "built: build/docs/index.html"

clean:
	rm -rf $(VENV) $(OLDEST) build runs
