# The development commands. `make` alone lists them.

PYTHON ?= python3
# Passed on to pip, e.g. PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# to take torch without CUDA on Linux.
PIP_ARGS ?=

BIN := .venv/bin
# One thread per rank: the ranks of tests and examples share this machine's cores.
export OMP_NUM_THREADS ?= 1

.PHONY: help setup demo test test-extra test-all torchtitan faults fuzz check lint docs dist bench \
	bench-environments clean

help:
	@echo "make setup   create .venv with the exact versions of constraints.txt"
	@echo "make demo    train a small GPT on 8 ranks: losses, sample, plot, page, bytes predicted and counted"
	@echo "make lint    format, lint and types"
	@echo "make check   make lint, then the fast tests: before every commit"
	@echo "make test    make check and the slow tests, before every pull request"
	@echo "make test-extra  what takes long or needs more, an hour; MINUTES=30: what fits, other files every day"
	@echo "make test-all  make test and make test-extra"
	@echo "make torchtitan  its tests, in an environment of its own (300 MB for triton), some minutes"
	@echo "make faults  kill ranks, nodes, saves and states in memory, 45 minutes; writes benchmarks/results/"
	@echo "make fuzz    300 random models and schedules on 4 ranks against one process, 10 minutes"
	@echo "make docs    the documentation site, strictly, into build/site; no network is needed"
	@echo "make dist    wheel and sdist into dist/, checked"
	@echo "make bench   measure everything, write benchmarks/results/ (Linux, root, 2 hours)"
	@echo "make bench-environments  DeepSpeed, for mics bench, in environments of its own"
	@echo "make clean   remove .venv and caches"

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/mics train examples/demo.toml

test: setup lint
	$(BIN)/python -m pytest -m "not extra" --durations 20

test-extra: setup
	$(BIN)/python -m pytest -m extra --durations 40 $(if $(MINUTES),--minutes $(MINUTES))

test-all: test test-extra

fuzz: setup
	$(BIN)/python tests/fuzz.py --seeds 300

check: setup lint
	$(BIN)/python -m pytest -m "not slow and not extra"

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The figures of docs/figures are drawn again; what is said of the next MkDocs is not an error.
docs: setup
	$(BIN)/python docs/site/figures.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

dist: setup
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pytest tests/test_packaging.py

faults: setup
	$(BIN)/python -m pytest tests/test_recovery*.py tests/test_kills.py tests/test_agent*.py tests/test_going_back.py
	$(BIN)/python benchmarks/faults.py kills
	$(BIN)/python benchmarks/faults.py nodes
	$(BIN)/python benchmarks/faults.py schedule
	$(BIN)/python benchmarks/soak.py

bench: setup bench-environments
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/slow_links.py
	$(BIN)/python benchmarks/stragglers.py
	$(BIN)/python benchmarks/keeping_states.py
	$(BIN)/python benchmarks/muon.py --out benchmarks/results/muon
	$(BIN)/python benchmarks/restarts.py
	$(BIN)/python benchmarks/lab_bytes.py
	$(BIN)/python benchmarks/weak_scaling.py
	$(BIN)/python benchmarks/memory_model.py
	$(BIN)/python benchmarks/planner_speed.py
	$(BIN)/python benchmarks/predicted_steps.py
	$(BIN)/mics simulate --validate --out benchmarks/results/validation.md

bench-environments: .venv-deepspeed-0.19.8/ready .venv-deepspeed-0.19.2/ready

# DeepSpeed in an environment of its own, which sees torch and transformers of .venv.
.venv-deepspeed-%/ready: .venv/ready benchmarks/environments/deepspeed.txt
	$(PYTHON) -m venv .venv-deepspeed-$*
	.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(.venv-deepspeed-$*/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth
	.venv-deepspeed-$*/bin/python -m pip install --disable-pip-version-check --no-deps \
		-r benchmarks/environments/deepspeed.txt
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu .venv-deepspeed-$*/bin/python -m pip install \
		--disable-pip-version-check --no-deps --no-build-isolation deepspeed==$*
	@touch $@

torchtitan: .venv-torchtitan/ready
	PYTHONPATH=src .venv-torchtitan/bin/python -m pytest tests/test_torchtitan*.py

# torchtitan asks for older versions than .venv has, so it is installed without what it asks for.
.venv-torchtitan/ready: .venv/ready benchmarks/environments/torchtitan.txt
	$(PYTHON) -m venv .venv-torchtitan
	.venv/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(.venv-torchtitan/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/project.pth
	.venv-torchtitan/bin/python -m pip install --disable-pip-version-check --no-deps \
		-r benchmarks/environments/torchtitan.txt
	@touch $@

clean:
	rm -rf .venv .venv-deepspeed-* .venv-torchtitan .pytest_cache .mypy_cache .ruff_cache build dist src/*.egg-info
