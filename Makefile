# `make demo` and `make test` create their environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
# One process per core with one thread each; the tests of a file share trained models, so they run in the same process.
PYTEST := -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-fast test-oldest lint docs clean

# Rebuilt if pyproject.toml is newer; a failed installation leaves no stamp.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, found %d.%d; set PYTHON=..." % v[:2])'
	$(PYTHON) -m venv --upgrade-deps $(VENV)
	@echo "Installing into $(VENV): PyTorch and the other libraries take several GB and a few minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

# Environment with the oldest version of each dependency that pyproject.toml allows
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

# Old libraries use deprecated parts of newer ones.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python $(PYTEST) -W ignore::DeprecationWarning -W ignore::FutureWarning

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[docs]"
	@touch $@

# -W turns warnings into errors. -a and -E rebuild everything: an incremental build only warns about changed pages.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -a -E docs build/docs
	@echo "built: build/docs/index.html"

clean:
	rm -rf $(VENV) $(OLDEST) build runs
