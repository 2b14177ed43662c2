# make demo | test | lint | test-reference | test-slow | test-sanitize | test-kernels | test-kernels-arm
#      bench-kernels | eval-demo | train-demo | format | stub | docs | clean
#
# Everything is installed into .venv; a second run finds it there and is quick.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check

SOURCES := CMakeLists.txt pyproject.toml LICENSE README.md \
           $(shell find native src convert -type f -not -path '*/__pycache__/*')
NATIVE  := $(wildcard native/*.cpp native/*.h native/*/*.cpp native/*/*.h)
LINTED  := src convert tests train bench docs

# Of a test set.
DRAWN_BY := $(addprefix train/, testset.py scenes.py things.py questions.py phrases.py correction.py drawings.py)

.PHONY: demo test lint test-reference test-slow test-sanitize test-kernels test-kernels-arm bench-kernels eval-demo train-demo format stub docs clean

demo: $(VENV)/package.stamp
	$(BIN)/omnivlm-edge run demo -i examples/horses.png -p "Describe the image"

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m "not reference and not slow" -n 2 --dist loadfile

# Twenty kills of a batch; clusters of Ray's, of processes on this machine, some of which are killed.
test-slow: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m slow

# The scores of the demo that ships, in the first style of its training and in one that it never saw, on test sets
# that are made first (npm fetches the second style's drawings); bench/results/eval has these result.json.
eval-demo: $(VENV)/package.stamp build/testset-noto/questions.jsonl build/testset-twemoji/questions.jsonl
	for style in noto twemoji; do \
	    $(BIN)/omnivlm-edge eval demo testset build/testset-$$style -o build/eval-$$style || exit 1; \
	done

build/testset-%/questions.jsonl: $(DRAWN_BY) | $(VENV)/package.stamp
	rm -rf build/testset-$* build/eval-$*
	$(BIN)/python train/testset.py build/testset-$* --split test -n 500 --style $*

# Hours, from nothing to GGUF files in build/train-demo; started again, it goes on where it stopped.
# Matrices are small: threads that sleep while they wait, and memory that stays in the process, count.
train-demo: export OMP_WAIT_POLICY ?= PASSIVE
train-demo: export GLIBC_TUNABLES ?= glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=16000000000
train-demo: $(VENV)/train.stamp
	$(BIN)/python train/demo.py --config train/configs/demo.toml --out build/train-demo

test-reference: $(VENV)/reference.stamp
	$(BIN)/python -m pytest -m reference

lint: $(VENV)/test.stamp
	$(BIN)/ruff check $(LINTED)
	$(BIN)/ruff format --check $(LINTED)
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)

format: $(VENV)/test.stamp
	$(BIN)/ruff check --fix $(LINTED)
	$(BIN)/ruff format $(LINTED)
	$(BIN)/clang-format -i $(NATIVE)

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
	    ASAN_OPTIONS=detect_leaks=0 PYTHONMALLOC=malloc $(BIN)/python -m pytest tests/test_native.py \
	    tests/test_precision.py tests/test_text_kernels.py \
	    -k "test_native or reference or any_type or low_memory_changes or batches or number or text_kernels"

# The CPU kernels of every instruction set that this machine has, against sums in double precision: as they are
# shipped, then with AddressSanitizer and UBSan (and AVX-VNNI's in AVX-512's encoding, which more machines have).
test-kernels: $(VENV)/build.stamp
	$(BIN)/cmake -S native/kernels -B build/kernels -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	    -DOMNIVLM_WERROR=ON > /dev/null
	$(BIN)/cmake --build build/kernels
	build/kernels/kernel-test
	@# On x86-64: no accumulator of a micro-kernel may be kept on the stack.
	objdump -d --no-show-raw-insn -C build/kernels/libomnivlm_kernels.a > build/kernels/code.txt
	! awk '/file format/ {file = $$1} /^[0-9a-f]+ <.*>:$$/ {name = $$0} \
	    (name ~ /[: ]tile<|int8_tile/ && file !~ /portable/) || \
	    (name ~ /Blockwise<.*_rows?<|CachedAttention<.*::(score|weigh)</ && file ~ /avx512vnni/) {seen++; if (/[xyz]mm[0-9]+/ && /\(%r[sb]p\)/) print file, name, $$0} \
	    END {if (!seen) print "no micro-kernel found"}' build/kernels/code.txt | grep .
	@# A function that the linker shares between files would bring instructions to machines that lack them.
	nm -C build/kernels/libomnivlm_kernels.a > build/kernels/symbols.txt
	! awk '/\.o:$$/ {file = $$0} / [WVu] / && file !~ /^(kernel|cpu)\.cpp/ {print file, $$0}' \
	    build/kernels/symbols.txt | grep .
	$(BIN)/cmake -S native/kernels -B build/kernels-sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	    -DOMNIVLM_SANITIZE=ON -DOMNIVLM_AVXVNNI_AS_AVX512=ON > /dev/null
	$(BIN)/cmake --build build/kernels-sanitize
	build/kernels-sanitize/kernel-test

# Their throughput, as a share of what the same instructions do without memory; 85 % and more is right.
bench-kernels: test-kernels
	build/kernels/kernel-test --speed

# Those of arm64, on any machine: Debian's g++-aarch64-linux-gnu and qemu-user.
test-kernels-arm: $(VENV)/build.stamp
	$(BIN)/cmake -S native/kernels -B build/kernels-arm -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
	    -DOMNIVLM_WERROR=ON -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
	    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ > /dev/null
	$(BIN)/cmake --build build/kernels-arm
	qemu-aarch64 -cpu max build/kernels-arm/kernel-test neon-i8mm neon-dotprod portable

# --- what the targets need ------------------------------------------------------------------------

# llama-cpp-python comes first, compiled once, because our extension is linked to its libraries. pip's cache keeps
# what was compiled before without its CMAKE_ARGS, so that a build with some neither takes from it nor leaves any there.
$(VENV)/build.stamp: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip
	$(PIP) install scikit-build-core nanobind cmake ninja
	$(PIP) install $(if $(CMAKE_ARGS),--no-cache-dir --no-binary llama-cpp-python) llama-cpp-python==0.3.36
	touch $@

$(VENV)/package.stamp: $(VENV)/build.stamp $(SOURCES)
	$(PIP) install -q --no-build-isolation .
	touch $@

$(VENV)/test.stamp: $(VENV)/build.stamp $(SOURCES)
	$(PIP) install -q --no-build-isolation ".[test]"
	touch $@ $(VENV)/package.stamp

$(VENV)/reference.stamp: $(VENV)/build.stamp $(SOURCES)
	$(PIP) install -q --no-build-isolation ".[test,reference]"
	touch $@ $(VENV)/test.stamp $(VENV)/train.stamp $(VENV)/package.stamp

$(VENV)/train.stamp: $(VENV)/build.stamp $(SOURCES)
	$(PIP) install -q --no-build-isolation ".[train]"
	touch $@ $(VENV)/package.stamp

clean:
	rm -rf build .mypy_cache .ruff_cache .pytest_cache
