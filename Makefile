# Both commands set up all they need: Python 3.11 with venv and pip is enough to start from.
PYTHON ?= python3.11
VENV ?= .venv

.PHONY: train test lint bench
train: $(VENV)/installed  ## train and test a prototypical network on the embedded data set
	$(VENV)/bin/python src/train.py

test: $(VENV)/installed-dev  ## run the tests
	$(VENV)/bin/python -m pytest

lint: $(VENV)/installed-dev  ## check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/installed  ## time this project beside the ways others do the same; let nothing else run
	$(VENV)/bin/python src/bench.py

# The stamps are older than pyproject.toml only when it changed since: a second call installs nothing.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@
