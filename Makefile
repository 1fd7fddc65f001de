# Sets up edgemed without touching anything outside this folder, and runs what there is to run.
#   make quickstart   set up, take the small trained model through every stage, say where the report is
#   make test         set up, make the torch-free device environment too, run all tests, WORKERS of their files at a time (each takes up to 2 GB)
# Finished set-up steps are remembered by stamp files, so a second make does nothing. PYTHON=python3.12 chooses another Python.

PYTHON ?= python3
WORKERS ?= 2
ifeq ($(origin CXX),default)
CXX := c++
endif
LLAMA := llama-cpp-python==0.3.36
PIP_ARGS := --disable-pip-version-check --quiet --constraint constraints.txt --find-links .wheels
SOURCES := pyproject.toml $(shell find edgemed calibration recipes -type f -not -path '*/__pycache__/*')

.PHONY: setup quickstart test docs check clean

setup: .venv/.ready

check:
	@command -v $(PYTHON) >/dev/null || { echo "error: '$(PYTHON)' is not there. Install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $$($(PYTHON) --version) is too old. edgemed needs Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 1; }
	@command -v $(CXX) >/dev/null || { echo "error: no C++ compiler '$(CXX)', which llama.cpp is built with. Install one (Debian, Ubuntu: apt install g++) or name one: make CXX=clang++" >&2; exit 1; }

.venv/bin/pip: | check
	$(PYTHON) -m venv .venv

# gcc 12 miscompiles ggml's AMX code: the first quantized prompt dies with SIGSEGV. Without AMX the build is right with every compiler.
# Built once and kept as a wheel, because it takes minutes and two environments need it.
.wheels/llama-cpp.ready: | .venv/bin/pip
	@echo "Building llama.cpp once; this takes about 5 minutes on two cores."
	@rm -rf .wheels/part
	@mkdir -p .wheels/part
	@amx=""; if [ "$$(uname -m)" = x86_64 ]; then amx="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"; fi; \
	CMAKE_ARGS="$$CMAKE_ARGS -DCMAKE_C_FLAGS='$$CFLAGS $$amx' -DCMAKE_CXX_FLAGS='$$CXXFLAGS $$amx'" \
	.venv/bin/pip wheel --disable-pip-version-check --quiet --no-deps --no-cache-dir --no-binary llama-cpp-python --wheel-dir .wheels/part $(LLAMA)
	mv .wheels/part/*.whl .wheels/
	rmdir .wheels/part
	touch $@

# torch comes first and pinned, so that nothing after it can pull in another build of it.
.venv/.ready: pyproject.toml constraints.txt .wheels/llama-cpp.ready | .venv/bin/pip
	.venv/bin/pip install $(PIP_ARGS) "$$(grep '^torch==' constraints.txt)"
	.venv/bin/pip install $(PIP_ARGS) --editable '.[build,onnx,llamacpp,vision,nvml,bnb,dev]'
	touch $@

# What a device has: the two runtimes, no torch, no transformers; edgemed installed as a user would, not from the source tree.
.venv-device/.ready: $(SOURCES) constraints.txt .wheels/llama-cpp.ready | check
	test -x .venv-device/bin/pip || $(PYTHON) -m venv .venv-device
	.venv-device/bin/pip install $(PIP_ARGS) '.[onnx,llamacpp,sign]'
	.venv-device/bin/pip install $(PIP_ARGS) --force-reinstall --no-deps .
	touch $@

quickstart: setup
	.venv/bin/edgemed run recipes/quickstart.yaml
	@echo "The report is at $(CURDIR)/runs/quickstart/report.html"

test: setup .venv-device/.ready
	.venv/bin/python -m pytest -p no:cacheprovider --numprocesses $(WORKERS) --dist loadfile $(ARGS)

docs: setup
	.venv/bin/python docs/make_cli.py
	.venv/bin/python docs/make_tasks.py

clean:
	rm -rf .venv .venv-device .wheels runs
