# make demo: from drawn images to a trained net.  make test: the whole suite.  Both first create .venv and install into it.
SHELL := bash
PYTHON ?= python3
# The paper's biases of 1 leave the loss at ln 10 for hundreds of steps; with 0.1 seven epochs halve the error.
DEMO_TRAINING := --device cpu --epochs 7 --batch-size 32 --bias 0.1
CC ?= cc
# Test files that run at the same time.
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
# Pillow-SIMD resizes 1.9 times as fast with AVX2; elsewhere it still beats Pillow with what the compiler knows.
SIMD := $(shell grep -qsw avx2 /proc/cpuinfo && echo -mavx2)
APT := build-essential python3-dev python3-venv libjpeg-dev zlib1g-dev

.PHONY: install check demo test lint format tables test-clients test-lowest sanitize fuzz gpu-ready gpu-test gpu-check gpu-bytes gpu-first bench

install: $(VENV)/installed

check:
	@missing=; \
	has() { printf '#include <stdio.h>\n#include <%s>\n' "$$1" | $(CC) $$2 -E - >/dev/null 2>&1; }; \
	command -v $(CC) >/dev/null || missing="$$missing, a C compiler ($(CC))"; \
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	  || missing="$$missing, Python 3.11 to 3.13 ($(PYTHON))"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing, Python's venv"; \
	include=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null); \
	has Python.h "-I$$include" || missing="$$missing, Python's headers"; \
	has jpeglib.h || missing="$$missing, libjpeg-turbo's headers (codec/libjpeg.c, pillow-simd)"; \
	has zlib.h || missing="$$missing, zlib's headers (pillow-simd)"; \
	if [ -n "$$missing" ]; then \
	  echo "missing on this system:$${missing#,}; on Debian or Ubuntu: sudo apt-get install $(APT)" >&2; exit 1; \
	fi

# pillow-simd goes in last, over the Pillow that matplotlib asks for: both are the package PIL, and Pillow resizes
# 7 times slower. Its wheel is built once, here, because a cached one may lack AVX2.
$(VENV)/installed: setup.cfg setup.py pyproject.toml constraints.txt $(wildcard */*.[ch]) | check
	$(PYTHON) -m venv $(VENV)
	CC="$(CC) $(SIMD)" $(BIN)/python -m pip wheel -q --no-deps --no-cache-dir --no-binary pillow-simd \
	  -c constraints.txt -w $(VENV)/wheels pillow-simd
	$(BIN)/python -m pip install -q --find-links $(VENV)/wheels -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install -q --force-reinstall --no-deps $(VENV)/wheels/pillow_simd-*.whl
	touch $@

# Each step's last lines hold its figures; they are kept in demo/N-step.txt and shown again at the end.
demo: install
	@rm -rf demo && mkdir demo
	@set -eo pipefail; step() { name=$$1; shift; printf '\n== %s\n$$ %s\n' "$$name" "$$*"; "$$@" | tee "demo/$$name.txt"; }; \
	export PATH="$(CURDIR)/$(BIN):$$PATH"; SECONDS=0; \
	step 1-sample  imagefeed sample demo/raw; \
	step 2-build   imagefeed build demo/raw demo/data; \
	step 3-verify  imagefeed verify demo/data --deep; \
	step 4-inspect imagefeed inspect demo/data --picture demo/contact-sheet.png; \
	step 5-train   imagefeed train demo/data --run-dir demo/run $(DEMO_TRAINING); \
	step 6-profile imagefeed profile demo/data --device cpu --batch-size 32 --seconds 20; \
	printf '\n== The demo took %d s\n' $$SECONDS; \
	for file in demo/*.txt; do printf '%-11s' "$$(basename $$file .txt)"; \
	  case $$file in *profile*) head -n 1 "$$file";; *) tail -n 1 "$$file";; esac; done; \
	printf '\nRaw images %s\nDataset    %s\nPictures   %s\n           demo/run/{curves,filters,guesses,nearest}.png\nMetrics    %s\n' \
	  demo/raw demo/data demo/contact-sheet.png demo/run/metrics.jsonl

test: lint
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m codespell_lib
	$(BIN)/python -m mypy

format: install
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

# Lightning, Accelerate and others on the loader, each in an environment of its own: make test-clients CLIENTS="lightning ray"
test-clients: install
	$(BIN)/python -m tests.clients $(CLIENTS)

# The tables of docs/ on other libraries, measured again; a cell that has changed is shown. TABLES="images video" chooses pages,
# SAVE=1 records what came, CLEAN=1 removes the environments (gigabytes under ~/.cache/imagefeed-tables).
tables: install
	$(BIN)/python -m tables $(if $(CLEAN),--clean) $(if $(SAVE),--save) $(TABLES)

# The suite with the lowest versions that setup.cfg allows. torch stays pinned: no older CPU build is to be had.
test-lowest: check
	$(PYTHON) -m venv --clear $(VENV)-lowest
	grep '^torch==' constraints.txt > $(VENV)-lowest/constraints.txt
	sed -nE '/torch>/d; s/^    ([a-z0-9-]+)>=([0-9a-z.]+).*/\1==\2/p' setup.cfg >> $(VENV)-lowest/constraints.txt
	$(VENV)-lowest/bin/python -m pip install -q -c $(VENV)-lowest/constraints.txt -e '.[test]'
	CC="$(CC) $(SIMD)" $(VENV)-lowest/bin/python -m pip install -q --force-reinstall --no-deps --no-cache-dir \
	  --no-binary pillow-simd -c $(VENV)-lowest/constraints.txt pillow-simd
	$(VENV)-lowest/bin/python -m pytest

# The C code under GCC's AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the tree; the first error ends the run.
# libstdc++ is loaded first too, or exceptions thrown in DALI end the process, and DALI's decoders are found by LD_LIBRARY_PATH,
# because under ASan a library's own search path is not used. Python itself leaks, so leaks are not looked for. One test limits
# the address space, of which ASan takes terabytes.
SANITIZER := -fsanitize=address,undefined -fno-sanitize-recover=all
C_TESTS := tests/dataset/test_reader.py tests/dataset/test_records.py tests/model/test_lrn.py tests/pipeline/test_cache.py \
  tests/codec tests/preprocess/test_image.py

sanitize: install
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -a $(filter-out bench build demo runs,$(wildcard *)) build/sanitize
	cd build/sanitize && CFLAGS="$(SANITIZER) -g" LDFLAGS="$(SANITIZER)" $(abspath $(BIN)/python) setup.py -q build_ext --inplace --force
	cd build/sanitize && LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libstdc++.so)" \
	  LD_LIBRARY_PATH="$(wildcard $(abspath $(VENV))/lib/python3*/site-packages/nvidia/nvimgcodec)" \
	  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:log_path=report UBSAN_OPTIONS=print_stacktrace=1:log_path=report \
	  $(abspath $(BIN)/python) -m pytest -p no:cacheprovider $(C_TESTS) \
	  --deselect tests/preprocess/test_image.py::test_short_memory_is_no_damage || { cat report.* >&2; exit 1; }

# Damaged JPEGs through the decoder: by libFuzzer if there is clang, else by mutations of its own under GCC's sanitizers.
FUZZ_SECONDS ?= 3600
FUZZ_FLAGS := -std=gnu11 -O1 -g -ffp-contract=off -fno-sanitize-recover=all

fuzz: install
	mkdir -p build/fuzz && $(BIN)/python -m tests.codec.corpus build/fuzz/corpus
	if command -v clang >/dev/null; then \
	  clang $(FUZZ_FLAGS) -fsanitize=fuzzer,address,undefined -DLIBFUZZER tests/codec/fuzz.c -o build/fuzz/fuzz -ljpeg \
	    && build/fuzz/fuzz -artifact_prefix=build/fuzz/ -max_total_time=$(FUZZ_SECONDS) build/fuzz/corpus; \
	else \
	  $(CC) $(FUZZ_FLAGS) -fsanitize=address,undefined tests/codec/fuzz.c -o build/fuzz/fuzz -ljpeg \
	    && build/fuzz/fuzz build/fuzz/corpus $(FUZZ_SECONDS); \
	fi

# Where PyTorch is there but no package registry, with the Python given: make gpu-test PYTHON_GPU=python3
GPU_PYTHON := $(or $(PYTHON_GPU),$(BIN)/python)

gpu-ready: $(if $(PYTHON_GPU),,install)
	$(GPU_PYTHON) -m benchmarks.ready

# Three minutes; only files that need nothing but what gpu-ready looks for.
GPU_TESTS := tests/test_gpu.py tests/test_gpu_kernels.py tests/pipeline/profiler/test_accounting.py \
  $(patsubst %,tests/pipeline/test_%.py,graph cache loader loader_options augment)

gpu-test: gpu-ready
	$(GPU_PYTHON) -m pytest -m gpu $(GPU_TESTS)

# What can be known without a GPU: graphs, kernels, and what a bare machine can collect. A minute on two cores.
gpu-check: install
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests/test_gpu_check.py tests/model/test_fused.py tests/pipeline/test_pixels.py

# Bytes and launches of a training step for sm_90, counted without a GPU: make gpu-bytes PYTHON_GPU=PYTHON, with a CUDA build of torch.
gpu-bytes:
	$(GPU_PYTHON) -m benchmarks.gpu_bytes

# Ten minutes of measurements and tests in one call, the most telling first; it ends by itself. GPU_FIRST are further options, such as
# --device cpu --small for a rehearsal.
gpu-first:
	BENCHMARK_RESULTS="$${BENCHMARK_RESULTS:-$${OUT:-bench/gpu-first}}" $(GPU_PYTHON) -m benchmarks.gpu_first \
	  --seconds $(or $(SECONDS_GIVEN),520) $(if $(CARRIED),--carried $(CARRIED)) $(GPU_FIRST)

# Every benchmark that this machine can run, on drawn images or RAW=/data/imagenet. Two cores take an hour or more; the limits of
# the scripts add up to three hours and three quarters. QUICK=1 runs a round of each, to check that it runs. Peers are installed into an
# environment of their own, as far as possible.
bench: install $(VENV)-peers/peers.json
	$(BIN)/python -m benchmarks.all --peers $(VENV)-peers/bin/python $(if $(RAW),--raw $(RAW)) $(if $(QUICK),--quick)

$(VENV)-peers/peers.json: benchmarks/peers.py | install
	$(BIN)/python -m benchmarks.peers $(VENV)-peers
