# Sets up edgemed without touching anything outside this folder, and runs what there is to run.
#   make quickstart   set up, take the small trained model through every stage, say where the report is
#   make quickstart-real  the same for SmolLM2-135M-Instruct, a really published model, with a LoRA trained on PubMedQA; fetches 93 MB
#   make test         set up, make the torch-free device environment too, run all tests on WORKERS processes (each takes up to 2 GB)
#   make test-fast    the tests that answer in three minutes, for the developer's loop
#   make coverage     the same, and how many lines of edgemed they run
#   make fuzz         every kind of document that comes from outside, changed at random: FUZZ times the cases of CI, other ones each time
#   make lint         format, lint and types, as CI checks them; make format writes what can be written
#   make docs         write the generated pages; make site builds docs/ into site/ and checks its links
# Finished set-up steps are remembered by stamp files, so a second make does nothing. PYTHON=python3.12 chooses another Python.

PYTHON ?= python3
WORKERS ?= 2
ifeq ($(origin CXX),default)
CXX := c++
endif
LLAMA := llama-cpp-python==0.3.36
PIP_ARGS := --disable-pip-version-check --quiet --constraint constraints.txt --find-links .wheels
SOURCES := pyproject.toml $(shell find edgemed calibration recipes -type f -not -path '*/__pycache__/*')
# What takes longer than a developer waits for.
FAST := not slow and not kill and not disk_full and not browser and not process and not gpu

.PHONY: setup quickstart quickstart-real test test-fast fuzz coverage lint format docs site check clean

setup: .venv/.ready

check:
	@command -v $(PYTHON) >/dev/null || { echo "error: '$(PYTHON)' is not there. Install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) is too old. edgemed needs Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 1; }
	@command -v $(CXX) >/dev/null || { echo "error: no C++ compiler '$(CXX)', which llama.cpp is built with. Install one (Debian, Ubuntu: apt install g++) or name one: make CXX=clang++" >&2; exit 1; }

.venv/bin/pip: | check
	@echo "[1/4] A virtual environment in .venv (seconds)"
	@$(PYTHON) -m venv .venv

# gcc 12 miscompiles ggml's AMX code: the first quantized prompt dies with SIGSEGV. Without AMX the build is right with every compiler.
# Built once and kept as a wheel, because it takes minutes and two environments need it.
.wheels/llama-cpp.ready: | .venv/bin/pip
	@echo "[2/4] Building llama.cpp once (about 5 minutes on two quiet cores)"
	@rm -rf .wheels/part
	@mkdir -p .wheels/part
	@amx=""; if [ "$$(uname -m)" = x86_64 ]; then amx="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"; fi; \
	CMAKE_ARGS="$$CMAKE_ARGS -DCMAKE_C_FLAGS='$$CFLAGS $$amx' -DCMAKE_CXX_FLAGS='$$CXXFLAGS $$amx'" \
	.venv/bin/pip wheel --disable-pip-version-check --quiet --no-deps --no-cache-dir --no-binary llama-cpp-python --wheel-dir .wheels/part $(LLAMA)
	@mv .wheels/part/*.whl .wheels/
	@rmdir .wheels/part
	@touch $@

# torch comes first and pinned, so that nothing after it can pull in another build of it.
.venv/.ready: pyproject.toml constraints.txt .wheels/llama-cpp.ready | .venv/bin/pip
	@echo "[3/4] Installing torch (about a minute; more where the index has only the CUDA build)"
	@.venv/bin/pip install $(PIP_ARGS) "$$(grep '^torch==' constraints.txt)"
	@echo "[4/4] Installing edgemed with its runtimes and test tools, 1.9 GB in all (about a minute)"
	@.venv/bin/pip install $(PIP_ARGS) --editable '.[build,onnx,llamacpp,vision,dicom,nvml,bnb,dev]'
	@touch $@

# What a device has: the two runtimes, no torch, no transformers; edgemed installed as a user would, not from the source tree.
.venv-device/.ready: $(SOURCES) constraints.txt .wheels/llama-cpp.ready | check
	@echo "Installing the device environment in .venv-device: no torch (about half a minute)"
	@test -x .venv-device/bin/pip || $(PYTHON) -m venv .venv-device
	@.venv-device/bin/pip install $(PIP_ARGS) '.[onnx,llamacpp,sign]'
	@.venv-device/bin/pip install $(PIP_ARGS) --force-reinstall --no-deps .
	@touch $@

quickstart: setup
	@echo "Running recipes/quickstart.yaml: merge, quantize, five engines, verify, bench, evaluate (3 to 6 minutes on two cores)"
	@.venv/bin/edgemed run recipes/quickstart.yaml
	@echo "The report is at $(CURDIR)/runs/quickstart/report.html"

quickstart-real: setup
	@.venv/bin/edgemed recipes fetch smollm2 --out recipes
	@echo "Running recipes/smollm2.yaml: import, merge, quantize, five engines, verify, bench, evaluate (34 CPU minutes)"
	@echo "Two int4 engines fail their limits there, and the run says so with exit code 1: docs/numbers.md has the reason"
	@.venv/bin/edgemed run recipes/smollm2.yaml; code=$$?; echo "The report is at $(CURDIR)/runs/smollm2/report.html"; exit $$code

test: setup .venv-device/.ready
	@echo "Running all tests on $(WORKERS) processes (about 12 minutes on two cores)"
	@.venv/bin/python -m pytest -p no:cacheprovider --numprocesses $(WORKERS) $(ARGS)

test-fast: setup
	@.venv/bin/python -m pytest -p no:cacheprovider --numprocesses $(WORKERS) -m "$(FAST)" $(ARGS)

# A failure prints the line that repeats it (@reproduce_failure).
FUZZ ?= 20
fuzz: setup
	@EDGEMED_FUZZ=$(FUZZ) .venv/bin/python -m pytest -p no:cacheprovider --numprocesses $(WORKERS) --timeout 7200 tests/faults/test_fuzz.py $(ARGS)

# Tracing costs two thirds more time, so the fast tests alone are counted.
coverage: setup
	@rm -rf build/coverage
	@mkdir -p build/coverage
	@.venv/bin/python -m pytest -p no:cacheprovider --numprocesses $(WORKERS) -q -m "$(FAST)" --cov --cov-report= --durations=0 --durations-min=1000
	@echo "Lines of edgemed that the fast tests run: $$(.venv/bin/coverage report --format=total) %"

lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: setup
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

docs: setup
	for page in docs/make_*.py; do .venv/bin/python $$page || exit 1; done

.venv/.docs-ready: .venv/.ready
	@echo "Installing mkdocs-material (seconds)"
	@.venv/bin/pip install $(PIP_ARGS) --editable '.[docs]'
	@touch $@

# --strict: a link that leads nowhere is an error.
site: .venv/.docs-ready
	.venv/bin/mkdocs build --strict --quiet

clean:
	rm -rf .venv .venv-device .wheels runs site
