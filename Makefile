# Each target installs what it needs; all it takes is Python 3.11 to 3.13 with venv and pip.
PYTHON ?= $(or $(shell for version in 3.13 3.12 3.11; do python$$version -c 'import ensurepip' 2>/dev/null && \
    echo python$$version && break; done),python3)
VENV ?= .venv

.PHONY: train test test-all test-gpu lint bench gpu reproduce tables report dashboard notebooks demo docs
train: $(VENV)/installed  ## train and test a prototypical network on the built-in data set
	$(VENV)/bin/python src/train.py

# One test process per core with one thread each: more threads than cores slow each other down.
TEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

test: $(VENV)/installed-dev  ## run all but the slow tests
	$(TEST) -m 'not slow'

test-all: $(VENV)/installed-dev  ## run all tests, as CI does
	$(TEST)

lint: $(VENV)/installed-dev  ## check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(VENV)/installed  ## benchmark against other implementations; keep the machine idle otherwise
	$(VENV)/bin/python src/bench.py

test-gpu: $(VENV)/installed-dev  ## run the tests for GPUs; without a GPU, the same on the CPU
	$(VENV)/bin/python -m pytest tests/gpu --confcutdir=tests/gpu

gpu: $(VENV)/installed-dev  ## use a GPU for 15 minutes: test suite, benchmark, then trainings; call again to resume
	$(VENV)/bin/python src/benchmarks/quarter_hour.py

reproduce: $(VENV)/installed  ## re-measure the rows of the tables from their committed weights, without training
	$(VENV)/bin/python src/reproduce.py all

# Resumes when called again after an interruption; a failed cell does not stop the others.
tables: $(VENV)/installed  ## train and test every Omniglot cell of the articles' tables, an hour each at most
	$(VENV)/bin/python src/train.py -m '+experiment/omniglot=glob(*)' way=5,20 shot=1,5 budget=cpu \
	    resume=auto hydra.sweep.dir=outputs/tables \
	    'hydra.sweep.subdir=$${choices.experiment}_$${way}way_$${shot}shot/$${seed}'; status=$$?; \
	    $(VENV)/bin/python src/report.py outputs/tables && exit $$status

report: $(VENV)/installed  ## compare the committed results with published ones, in notebooks/guides/reproduce.md
	$(VENV)/bin/python src/report.py notebooks/results/reproduction/omniglot notebooks/results/reproduction/miniimagenet \
	    out=notebooks/results/reproduction readme=notebooks/guides/reproduce.md

dashboard: $(VENV)/installed  ## show the runs below outputs in TensorBoard, on this machine only
	$(VENV)/bin/tensorboard --logdir outputs --host localhost

demo: $(VENV)/installed-demo  ## classify your own images, drawings or camera pictures, in the browser
	$(VENV)/bin/python src/demo.py

notebooks: $(VENV)/installed-dev  ## rerun all notebooks in place; a minute or two each
	rm -rf outputs/notebooks
	$(VENV)/bin/jupyter-execute --inplace notebooks/*.ipynb
	$(VENV)/bin/nbstripout --keep-output --keep-count --keep-id notebooks/*.ipynb

docs: $(VENV)/installed-dev  ## write the API reference to outputs/api, from the docstrings
	$(VENV)/bin/python .ci/docs.py outputs/api

# Stamp files: a second call installs nothing unless pyproject.toml has changed.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/installed-demo: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --editable '.[demo]'
	touch $@
