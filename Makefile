# qexp: `make demo` shows it, `make test` checks it, `make help` lists the rest
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup demo test oldest test-all check bench kernels asan wheel golden docs clean

help:  ## list what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY)  ## make the .venv (about 5 GB: torch comes with its CUDA libraries)

$(READY): pyproject.toml setup.py
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (torch is large: a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check torch torchvision
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: $(READY)  ## quantize a small CNN on real handwritten digits: a table and a page
	$(BIN)/python run.py -m experiment=demo quant=minmax,mse bits=w8a8,w4a4,w3a3,w2a2
	$(BIN)/python run.py -m experiment=demo quant=lsq schedule=qat bits=w4a4,w2a2

test: $(READY)  ## the tests that take a few minutes
	$(PYTEST) -m "not slow"

# One part per commit, chosen by its hash, so that the time holds; PART=0 to 6 chooses one.
PARTS := kernels "integer numerics ranges statistics" "quantizers analysis" run "calibration layers network passes recipe test_*.py" "callbacks data experiments models tasks" "command report results search system verbs"
PART ?= $(shell echo $$(( 0x$$(git rev-parse HEAD 2>/dev/null | cut -c1-7 | grep . || date +%j) % 7 )))
OLD := .venv-oldest

oldest: $(OLD)/.ready  ## one part of the tests under the oldest torch that is allowed, 2.11; another commit, another part, or PART=0 to 6
	@set -- $(PARTS); shift $(PART); set -- $$(printf 'tests/%s ' $$1); \
	  echo "torch $$($(OLD)/bin/python -c 'import torch; print(torch.__version__)'): $$*" && \
	  OMP_NUM_THREADS=1 $(OLD)/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow and not browser" $$*

$(OLD)/.ready: pyproject.toml setup.py
	@test -x $(OLD)/bin/python || $(PYTHON) -m venv $(OLD)
	@$(OLD)/bin/python -m pip install --quiet --quiet --disable-pip-version-check "torch==2.11.*" "torchvision==0.26.*"
	@$(OLD)/bin/python -m pip install --quiet --quiet --disable-pip-version-check -e ".[dev,export]" "torch==2.11.*" "torchvision==0.26.*"
	@touch $@

test-all: $(READY)  ## all tests; with QEXP_DATA_DIR those on real data too, with Chromium those of the page
	$(PYTEST)

check: $(READY)  ## lint and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

kernels: $(READY)  ## build the kernels ahead of their first use
	$(BIN)/python -c "import qexp_kernels; print(*qexp_kernels.load('auto'), sep=': ')"

bench: $(READY)  ## what quantization costs in time, as ratios to floating point
	$(BIN)/python -m experiments.overhead.measure
	$(BIN)/python -m experiments.overhead.measure --model mobilenetv2 --quant lsq,pact --batch 32 --rounds 5
	$(BIN)/python -m qexp_kernels.bench --memory

asan: $(READY)  ## the kernel tests under AddressSanitizer and UBSan
	$(BIN)/python -m qexp_kernels.asan

wheel: $(READY)  ## build the wheel, with kernels for three levels of x86-64, and the source distribution, into dist/
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check build
	@rm -rf build dist
	$(BIN)/python -m qexp_kernels.for_wheel
	@$(BIN)/python -m build --wheel >/dev/null
	@$(BIN)/python -m build --sdist >/dev/null
	@ls -lh dist

docs: $(READY)  ## build the documentation into site/, warnings as errors
	$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(BIN)/python -m mkdocs build --strict --quiet -f docs/mkdocs.yml
	@echo "site/index.html"

golden: $(READY)  ## write the golden numbers anew (say why in the changelog, under Numerics)
	QEXP_GOLDEN=write $(BIN)/python -m pytest -q tests/quantizers/test_golden.py

clean:  ## remove the .venv and caches, never results
	rm -rf $(VENV) $(OLD) build dist kernels/compiled *.egg-info .pytest_cache .ruff_cache .hypothesis
