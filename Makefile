# make demo | test | lint | test-reference | test-sanitize | format | stub | docs | clean
#
# Everything is installed into .venv; a second run finds it there and is quick.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

SOURCES := CMakeLists.txt pyproject.toml LICENSE README.md \
           $(shell find native src convert -type f -not -path '*/__pycache__/*')
LINTED  := src convert tests train bench docs

.PHONY: demo test lint test-reference test-sanitize format stub docs clean

demo: $(VENV)/package.stamp
	$(BIN)/omnivlm-edge run demo -i examples/horses.png -p "Describe the image"

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m "not reference"

test-reference: $(VENV)/reference.stamp
	$(BIN)/python -m pytest -m reference

lint: $(VENV)/test.stamp
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror native/*.cpp native/*.h

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)
	$(BIN)/clang-format -i native/*.cpp native/*.h

# The types of the extension, generated from it; a test compares.
stub: $(VENV)/package.stamp
	$(BIN)/python -m nanobind.stubgen -q -m omnivlm_edge._native -o src/omnivlm_edge/_native.pyi

# The help of every command, generated; a test compares.
docs: $(VENV)/package.stamp
	$(BIN)/python docs/make_commands.py

# The native tests once more, in a build of their own with AddressSanitizer and UBSan.
test-sanitize: $(VENV)/test.stamp
	$(PIP) install -q --no-build-isolation --no-deps --target build/sanitize --upgrade \
	    -C build-dir=build/sanitize-cmake -C cmake.define.OMNIVLM_SANITIZE=ON -C cmake.define.OMNIVLM_WERROR=ON .
	PYTHONPATH=build/sanitize LD_LIBRARY_PATH="$$($(BIN)/python -c 'import llama_cpp, os; print(os.path.dirname(llama_cpp.__file__) + "/lib")')" \
	    LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc $(BIN)/python -m pytest tests/test_native.py

# --- what the targets need ------------------------------------------------------------------------

# llama-cpp-python comes first, compiled once, because our extension is linked to its libraries.
$(VENV)/build.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip
	$(PIP) install scikit-build-core nanobind cmake ninja llama-cpp-python==0.3.36
	touch $@

$(VENV)/package.stamp: $(VENV)/build.stamp $(SOURCES)
	$(PIP) install -q --no-build-isolation .
	touch $@

$(VENV)/test.stamp: $(VENV)/build.stamp $(SOURCES)
	$(PIP) install -q --no-build-isolation ".[test]"
	touch $@ $(VENV)/package.stamp

$(VENV)/reference.stamp: $(VENV)/build.stamp $(SOURCES)
	$(PIP) install -q --no-build-isolation ".[test,reference]"
	touch $@ $(VENV)/test.stamp $(VENV)/package.stamp

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
