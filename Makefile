# make build     everything that `nbd-backend serve` needs: packages, .venv, the kernel
# make demo      a live backup of a running disk, from nothing to the proof
# make serve IMAGE=disk.qcow2
# make test      the whole suite
# make asan | tsan | nightly | lint | clean

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: build demo serve test asan tsan nightly lint clean packages test-packages test-venv

BUILD_PACKAGES := nbdkit nbdkit-plugin-python nbdkit-plugin-dev libnbd-dev libunwind-dev zlib1g-dev libzstd-dev \
    python3-dev python3-venv gcc libc6-dev
DEMO_PACKAGES := qemu-utils fio
TEST_PACKAGES := $(DEMO_PACKAGES) qemu-system-common qemu-system-x86 libnbd-bin python3-libnbd \
    nbd-client busybox-static cpio e2fsprogs git binutils

BIN := .venv/bin
KERNEL := nbd_backend/_kernel.abi3.so
KERNEL_SOURCES := $(wildcard cffi_build/*.[ch]) cffi_build/build_kernel.py setup.py
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable
# nbdkit takes only filters built for its own version: another version rebuilds the kernel.
NBDKIT_STAMP = build/$(shell nbdkit --version 2>/dev/null | tr ' ' -)

build: packages
	@$(MAKE) --silent $(KERNEL)

packages:
	@.ci/apt-install $(BUILD_PACKAGES)

build/%:
	@mkdir -p build && rm -rf build/kernel build/nbdkit-* $(KERNEL) && touch $@

.venv/installed: pyproject.toml .ci/venv
	@echo "Preparing .venv (a minute the first time)"
	@[ -x $(BIN)/pip ] && [ $(BIN)/pip -nt .ci/venv ] || .ci/venv .venv
	@mkdir -p build && flock build $(PIP_INSTALL) .
	@touch $@

$(KERNEL): $(KERNEL_SOURCES) $(NBDKIT_STAMP) | .venv/installed
	@echo "Building the kernel"
	@flock build $(BIN)/python -W ignore setup.py --quiet build_ext --inplace
	@touch $@

demo: build
	@.ci/apt-install $(DEMO_PACKAGES)
	@$(BIN)/python -m nbd_backend.cli.demo

serve: build
	@[ -n "$(IMAGE)" ] || { echo "usage: make serve IMAGE=disk.qcow2" >&2; exit 2; }
	@exec $(BIN)/nbd-backend serve "$(IMAGE)"

test-packages:
	@.ci/apt-install $(TEST_PACKAGES)

.venv/installed-test: .venv/installed
	@echo "Installing the test packages into .venv"
	@flock build $(PIP_INSTALL) .[test]
	@touch $@

test-venv: build test-packages
	@$(MAKE) --silent .venv/installed-test

test: test-venv
	@$(BIN)/python -m pytest --numprocesses auto --dist worksteal

nightly: test-venv
	@HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest --numprocesses auto --dist worksteal --timeout 3600

lint: test-venv
	@$(BIN)/python -m pytest --quiet tests/unit/test_project.py

asan: test-venv
	@.ci/sanitize asan

tsan: test-venv
	@.ci/sanitize tsan

clean:
	rm -rf build .venv *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache $(KERNEL)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
