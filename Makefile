# Two commands on a fresh machine: `make demo` and `make test`. Both need python3 >= 3.11 and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Architectures of the C library.
ARCHS ?= 80;90;100

.PHONY: demo test library lint clean
.DELETE_ON_ERROR:

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("python3 >= 3.11 is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-demo: pyproject.toml | $(VENV)/bin/python
	@echo "Installing into $(VENV), once ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[plots]'
	touch $@

# Only the tests need constraints.txt: with it, a CUDA torch would have to be the release for that triton.
$(VENV)/installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing into $(VENV), once ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/installed-demo
	$(BIN)/ijepa pretrain shapes-tiny

test: $(VENV)/installed-test
	$(BIN)/python -m pytest

# The kernels as a C library, built and tested. CMake comes with the test tools, the compiler does not.
library: $(VENV)/installed-test
	@command -v cc > /dev/null || { echo "make library needs a C compiler: install gcc or clang (Debian: apt-get install gcc)"; exit 1; }
	@test -x $(BIN)/cmake || { echo "$(BIN)/cmake is missing: $(BIN)/pip install 'cmake>=3.22'"; exit 1; }
	$(BIN)/cmake -B build -DMVK_ARCHS="$(ARCHS)" -DMVK_PYTHON="$(CURDIR)/$(BIN)/python"
	$(BIN)/cmake --build build
	$(BIN)/ctest --test-dir build --output-on-failure

lint: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build
