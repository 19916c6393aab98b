# Everything a checkout can do; needs Python 3.10+ with venv, a C++ compiler and git. `make help` lists it.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.setup-done
# cmake and ninja come from pip and are found here
export PATH := $(CURDIR)/$(BIN):$(PATH)

CPP_FILES    := $(wildcard cpp/src/*.cpp cpp/src/*.h cpp/tests/*.cpp cpp/tests/*.h)
SETUP_INPUTS := pyproject.toml constraints.txt CMakeLists.txt cpp/CMakeLists.txt cpp/llama.cpp.lock \
                $(wildcard cpp/cmake/*) $(wildcard cpp/patches/*) $(wildcard cpp/src/*)
PIP          := $(BIN)/python -m pip --disable-pip-version-check
PYTEST       := $(BIN)/python -m pytest

.PHONY: help setup web demo test test-upstream test-fast bench bench-check lint format tools upstream-tests wheel clean

help: ## list these targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP) ## make .venv, build the patched llama.cpp once, install everything; skipped when nothing changed

$(STAMP): $(SETUP_INPUTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "error: Python 3.10 or newer is needed: make setup PYTHON=python3.12, for example" >&2; exit 1; }
	@for program in c++ git; do command -v $$program >/dev/null || \
	    { echo "error: $$program is needed to build llama.cpp: please install it" >&2; exit 1; }; done
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@echo "[1/3] build requirements"
	@$(PIP) install -q -c constraints.txt scikit-build-core cmake ninja
	@echo "[2/3] the llama.cpp archive, and its Python bindings without their own copy of the library"
	@archive=$$($(BIN)/python cpp/cmake/prepare_llama_cpp.py fetch) && \
	    CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" $(PIP) install -q --no-build-isolation --no-deps "$$archive"
	@echo "[3/3] the other dependencies, and melt-edge with the patched llama.cpp: some minutes"
	@$(PIP) install -q --no-build-isolation -c constraints.txt \
	    --config-settings=build-dir=build -e '.[all]'
	@touch $@

web: setup ## prepare examples/web: npm packages and the shipped model in ONNX; needs Node 20
	cd examples/web && npm ci --ignore-scripts --no-fund --no-audit && node vendor.mjs
	$(BIN)/melt-edge export onnx melt-tiny examples/web/model --n-ctx 512 --force
	@echo "Next: $(BIN)/python -m http.server -d examples/web, and open http://localhost:8000"

demo: setup ## ask the shipped model a few questions, with and without the shared cache
	@$(BIN)/melt-edge demo

test: upstream-tests ## the whole test suite, the slow tests too
	$(PYTEST)

test-upstream: upstream-tests ## upstream's own tests on the patched library, for both architectures
	$(PYTEST) tests/test_upstream.py

test-fast: setup ## the tests that take seconds
	$(PYTEST) -m "not slow"

bench: setup ## memory and speed at the 1.6 B shape against their floors (20 minutes, 2 GB), into benchmarks/results
	$(BIN)/python benchmarks/decode_ratio.py --json benchmarks/results/decode_ratio.json
	$(BIN)/python benchmarks/looped.py --json benchmarks/results
	$(BIN)/python benchmarks/onnx_speed.py --json benchmarks/results/onnx_speed.json

bench-check: setup ## the same measurement; fails where a floor is missed
	$(BIN)/python benchmarks/decode_ratio.py --check
	$(BIN)/python benchmarks/looped.py --check
	$(BIN)/python benchmarks/onnx_speed.py --check

lint: setup ## ruff and mypy on the Python, clang-format on our C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy cpp/cmake/prepare_llama_cpp.py
	@# export/ and runtime/ install as subpackages: show mypy the names they are imported by
	@rm -rf build/typecheck && mkdir -p build/typecheck/melt_edge
	@ln -s "$(CURDIR)"/melt_edge/* "$(CURDIR)/export" "$(CURDIR)/runtime" build/typecheck/melt_edge/
	MYPYPATH=build/typecheck $(BIN)/mypy -p melt_edge
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: setup ## rewrite the code as lint wants it
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FILES)

tools: setup ## build upstream's llama-cli, -server, -bench, -quantize, -perplexity into build/bin
	$(BIN)/cmake -S . -B build -DMELT_BUILD_TOOLS=ON
	$(BIN)/cmake --build build --target melt-tools

upstream-tests: setup ## build upstream's own tests on the patched library into build/bin
	$(BIN)/cmake -S . -B build -DMELT_BUILD_TESTS=ON
	$(BIN)/cmake --build build --target melt-tests

wheel: setup ## a wheel for other machines of this system (no code for this CPU alone) into dist
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist . \
	    --config-settings=build-dir=build/wheel --config-settings=cmake.define.MELT_NATIVE=OFF

clean: ## remove .venv, build, dist; the cached llama.cpp archive stays
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
