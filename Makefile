# make demo: the whole way on drawn images.  make test: the whole suite.  Both make .venv and install into it first.
PYTHON ?= python3
CC ?= cc
VENV := .venv
BIN := $(VENV)/bin
# Pillow-SIMD resizes 1.9 times as fast with AVX2; elsewhere it still beats Pillow with what the compiler knows.
SIMD := $(shell grep -qsw avx2 /proc/cpuinfo && echo -mavx2)
APT := build-essential python3-dev python3-venv libjpeg-dev zlib1g-dev

.PHONY: install check demo test lint bench gpu-test gpu-bench clean

install: $(VENV)/installed

check:
	@missing=; \
	has() { printf '#include <stdio.h>\n#include <%s>\n' "$$1" | $(CC) $$2 -E - >/dev/null 2>&1; }; \
	command -v $(CC) >/dev/null || missing="$$missing, a C compiler ($(CC))"; \
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null \
	  || missing="$$missing, Python 3.10 to 3.13 ($(PYTHON))"; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing, Python's venv"; \
	include=$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))' 2>/dev/null); \
	has Python.h "-I$$include" || missing="$$missing, Python's headers"; \
	has jpeglib.h || missing="$$missing, libjpeg's headers (pillow-simd)"; \
	has zlib.h || missing="$$missing, zlib's headers (pillow-simd)"; \
	if [ -n "$$missing" ]; then \
	  echo "missing on this system:$${missing#,}; on Debian or Ubuntu: sudo apt-get install $(APT)" >&2; exit 1; \
	fi

# pillow-simd goes in last, over the Pillow that matplotlib asks for: both are the package PIL, and Pillow resizes
# 7 times slower. Its wheel is built once, here, because a cached one may lack AVX2.
$(VENV)/installed: setup.cfg pyproject.toml constraints.txt | check
	$(PYTHON) -m venv $(VENV)
	CC="$(CC) $(SIMD)" $(BIN)/python -m pip wheel -q --no-deps --no-cache-dir --no-binary pillow-simd \
	  -c constraints.txt -w $(VENV)/wheels pillow-simd
	$(BIN)/python -m pip install -q --find-links $(VENV)/wheels -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install -q --force-reinstall --no-deps $(VENV)/wheels/pillow_simd-*.whl
	touch $@
