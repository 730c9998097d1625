# make setup         .venv, the core library, the default model
# make serve         the same, then the server        (ARGS="-c 4096 -np 4" …)
# make test          the same, then the tests         (ARGS="-k tokenizer" …)
# make lint          ruff
# make sanitize      the tests that reach the core, under AddressSanitizer and UBSan
# make sanitize-arm  the kernels for Arm, likewise, in an emulator (needs aarch64-linux-gnu-gcc and qemu-aarch64)
# make fuzz          10,000 damaged model files, under both sanitizers
# make clean         removes .venv and the builds; fetched models stay in the user's cache

PYTHON ?= python3
ARGS ?=
SANITIZE_CC ?= gcc
ARM_CC ?= aarch64-linux-gnu-gcc

VENV := .venv
BIN := $(VENV)/bin
# With the environment's cmake and ninja.
WITH_TOOLS := PATH="$(CURDIR)/$(BIN):$$PATH"
SOURCES := CMakeLists.txt $(wildcard c_core/include/*.h c_core/src/*.[ch] c_core/src/cpu/*.[ch])

.PHONY: setup serve test lint sanitize sanitize-arm fuzz clean
.DELETE_ON_ERROR:

setup: $(VENV)/.installed build/.built
	@path=$$($(BIN)/pyllama pull smollm2-135m-instruct) && echo "default model: $$path"

serve: setup
	$(BIN)/python server.py $(ARGS)

test: setup
	$(WITH_TOOLS) $(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .

# The package is installed in place, without its library, which the next rule builds.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "make: $(PYTHON) is missing or older than 3.10; name another: make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || \
	    $(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
	    echo "make: $(PYTHON) cannot make virtual environments (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "cmake>=3.20" ninja
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --config-settings=wheel.cmake=false \
	    --config-settings=editable.mode=inplace --editable ".[test]"
	@touch $@

# `call` would take a plain comma for the end of an argument.
COMMA := ,
SANITIZERS := address$(COMMA)undefined

# A build folder that somebody configured otherwise is taken as it is; one that could not be configured is not kept.
CONFIGURE = @$(WITH_TOOLS) CMAKE_GENERATOR=Ninja $(BIN)/cmake -S . -B $(1) $(2) >/dev/null || \
    { rm -rf $(1)/CMakeCache.txt $(1)/CMakeFiles; exit 1; }

build/.built: $(VENV)/.installed $(SOURCES)
	@command -v $${CC:-cc} >/dev/null || { echo "make: no C compiler (Debian, Ubuntu: apt install gcc libc6-dev)" >&2; exit 1; }
	$(call CONFIGURE,build)
	$(BIN)/cmake --build build --parallel
	@touch $@

build-asan/.built: $(VENV)/.installed $(SOURCES)
	$(call CONFIGURE,build-asan,-DCMAKE_C_COMPILER=$(SANITIZE_CC) -DCMAKE_BUILD_TYPE=Debug -DPYLLAMA_SANITIZE=$(SANITIZERS))
	$(BIN)/cmake --build build-asan --parallel
	@touch $@

# Leaks are not looked for: Python itself keeps memory until its end.
UNDER_SANITIZERS = PYLLAMA_CORE=$(CURDIR)/build-asan/libpyllama_core.so LD_PRELOAD=$$($(SANITIZE_CC) -print-file-name=libasan.so) \
    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONMALLOC=malloc
CORE_TESTS = $(patsubst %,tests/test_%.py,formats products models graph gguf tokenizer grammar sampling measure golden engine llama fuzz)

sanitize: setup build-asan/.built
	$(BIN)/cmake --build build-asan --target compare_kernels && build-asan/compare_kernels
	$(WITH_TOOLS) $(UNDER_SANITIZERS) $(BIN)/python -m pytest -p no:cacheprovider $(CORE_TESTS) $(ARGS)

# The compiler's own folder of libraries, as the emulated program's root.
sanitize-arm: $(VENV)/.installed
	$(call CONFIGURE,build-asan-arm,-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_C_COMPILER=$(ARM_CC) \
	    -DCMAKE_BUILD_TYPE=Debug -DPYLLAMA_SANITIZE=$(SANITIZERS))
	$(BIN)/cmake --build build-asan-arm --target compare_kernels --parallel
	UBSAN_OPTIONS=print_stacktrace=1 ASAN_OPTIONS=detect_leaks=0 qemu-aarch64 \
	    -L $$(dirname $$(dirname $$($(ARM_CC) -print-file-name=libc.so.6))) build-asan-arm/compare_kernels

fuzz: setup build-asan/.built
	$(UNDER_SANITIZERS) $(BIN)/python -m tests.fuzz_gguf --cases 10000 --processes 2 $(ARGS)

clean:
	rm -rf $(VENV) build build-asan build-asan-arm dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
