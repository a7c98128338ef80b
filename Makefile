# Every target works in the virtual environment .venv, made on first use and renewed when the
# dependencies in setup.cfg change.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SLOW_STAMP := $(VENV)/.installed-slow
JOBS ?= 2
HERE := not alone and not gpu and not tpu_aot and not browser
SEEDS ?= 1
PIP_INSTALL := install --quiet --disable-pip-version-check --no-compile --prefer-binary
# The first Python that is new enough; evaluated only when the environment is made.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && echo $$p && break; done)

# Where the GPU is, jax is installed already; OUT gets the results.
GPU_PYTHON ?= python3
OUT ?= runs/gpu-check

.PHONY: install test test-slow test-all test-browser lint docs notebooks demo flux-demo dense2moe-demo \
	bench gpu-check clean

install: $(STAMP)

$(STAMP): setup.cfg setup.py pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer found; set PYTHON=..." >&2; exit 2; }
	@echo "installing into $(VENV), this takes a minute or two"
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --without-pip $(VENV) && \
		$(PYTHON) -m pip --python $(BIN)/python $(PIP_INSTALL) pip; }
	$(BIN)/python -m pip $(PIP_INSTALL) -e ".[dev]"
	@touch $@

# What runs notebooks and builds the site; `make test` does without.
$(SLOW_STAMP): $(STAMP)
	$(BIN)/python -m pip $(PIP_INSTALL) -e ".[dev,notebooks,docs]"
	@touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# One file stays on one worker, so that what it compiled is used again.
test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# Few and long ones: a worker without work takes another's, or one would run alone for minutes.
test-slow: $(SLOW_STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "slow and not exhaustive and $(HERE)"

# The last, with 23 GB of memory, wants the machine for itself.
test-all: test test-slow
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "exhaustive and $(HERE)"
	$(BIN)/python -m pytest -m alone

# Reports in a real browser; skipped where no Chromium is installed.
test-browser: $(STAMP)
	$(BIN)/python -m pytest -m browser

# The documentation as a site, in site/; a link that leads nowhere is an error.
docs: $(SLOW_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Runs the notebooks and writes them with their outputs, about five minutes each.
notebooks: $(SLOW_STAMP)
	$(BIN)/python -m docs.notebooks

demo: $(STAMP)
	$(BIN)/python -m moe_diffusion.demo --workdir runs/digits

flux-demo: $(STAMP)
	$(BIN)/python -m moe_diffusion.demo --config configs/digits_flux.py --workdir runs/digits_flux

# Its teacher is that of flux-demo, which is trained first unless it is there.
dense2moe-demo: $(STAMP)
	@test -e runs/digits_flux/digits.png || $(MAKE) flux-demo
	$(BIN)/python -m moe_diffusion.distill_demo --teacher runs/digits_flux --workdir runs/dense2moe --seeds $(SEEDS)

bench: $(STAMP)
	$(BIN)/python -m moe_diffusion.bench suite --out docs/benchmarks/cpu.json

# Everything that needs an NVIDIA GPU: tests, then benchmarks with a table last; under ten minutes.
# What fails does not keep the rest from being measured; the exit status tells.
gpu-check:
	$(GPU_PYTHON) tests/gpu/missing.py
	mkdir -p $(OUT)
	export JAX_PLATFORMS=cuda; tests=0; \
	$(GPU_PYTHON) -m pytest -m gpu -p no:cacheprovider --junitxml=$(OUT)/tests.xml || tests=$$?; \
	$(GPU_PYTHON) -m moe_diffusion.bench suite --repeats 9 --minutes 6 --out $(OUT)/bench.json && exit $$tests

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
