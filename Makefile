# Everything a developer or CI runs. `make demo` and `make test` work on a fresh clone: they create .venv first.
#   PYTHON=python3.12 make venv        another interpreter
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu make venv      PyTorch's CPU wheel instead of PyPI's
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt
SOURCES := $(wildcard setup.py) $(shell find csrc -type f 2>/dev/null)

# The tools that benchmarks compare with, in an environment of their own; without it their rows say absent.
PEERS ?= .peers
PEER_PYTHON = $(wildcard $(PEERS)/bin/python)
RESULTS ?= benchmarks/results

COUNTER_FLAGS = -std=c++17 -O3 -ffp-contract=off -fno-math-errno -fvisibility=hidden -I$(TREE)/csrc/include
AARCH64 = $(BIN)/python -m ziglang c++ -target aarch64-linux-gnu
CROSS_FLAGS = -std=c++17 -O1 -fPIC -ffp-contract=off -fno-math-errno -fvisibility=hidden -Wall -Wextra -Werror \
  -Icsrc/include -DMF_HAVE_NEON

.PHONY: help venv build test test-full sanitize lint cross same-bytes format demo peers peers-0.1.4 peers-fusion-bench peers-diffusers peers-vision architectures diffusion-names suites bench-adapters bench-peft bench-cpu bench-counters bench-directions bench-instructions bench-dropin bench-engine bench-features bench-spectral bench-sweep quality quality-full cuda-check gpu clean FORCE

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

venv: $(VENV)/.installed ## .venv with the project (editable, the extension compiled) and its tools

# PyTorch alone and first: where no GPU is visible the plain pin takes whatever wheel the index offers for it.
$(VENV)/.torch: .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep '^torch==' .ci/constraints.txt)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(SOURCES)
	$(PIP) --editable '.[test,dev]'
	touch $@

build: venv ## dist/*.whl
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

test: venv ## the test suite without the slow part
	$(BIN)/pytest --numprocesses auto -m "not slow"

test-full: venv ## the whole test suite, and the native tests under the sanitizers
	$(BIN)/pytest --numprocesses auto
	PYTHON=$(abspath $(BIN))/python tests/native/sanitize.sh

# BEFORE is the Python of another checkout, built on this machine.
same-bytes: venv ## the bytes of merges and calibrations, against another commit: BEFORE=…/.venv/bin/python
	$(BIN)/python tests/recorded/compare.py $(BEFORE)

# One instruction set and one sanitizer: about three minutes, most of it compiling.
sanitize: venv ## the native loops under AddressSanitizer
	PYTHON=$(abspath $(BIN))/python SANITIZERS=address \
	  MAGIC_FAST_ISAS=$$($(BIN)/python -c 'from magic_fast import _native; print(_native.isa())') \
	  tests/native/sanitize.sh tests/native/test_core.py tests/native/test_recipes.py

lint: venv ## ruff, mypy, clang-format; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	files=$$(git ls-files --cached --others --exclude-standard 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh'); \
	  test -z "$$files" || $(BIN)/clang-format --dry-run --Werror $$files

cross: venv ## compile and link the native library for AArch64 with NEON; nothing of it runs here
	$(BIN)/python -c 'import ziglang' 2>/dev/null || $(PIP) ziglang
	rm -rf build/aarch64 && mkdir -p build/aarch64
	for source in csrc/cpu/*.cpp csrc/cpu/isa/neon.cpp; do \
	  $(AARCH64) $(CROSS_FLAGS) -c $$source -o build/aarch64/$$(basename $$source).o; done
	$(AARCH64) -shared -Wl,-z,defs -o build/aarch64/libmagic_fast.so build/aarch64/*.o -lpthread
	@echo 'NEON: compiled and linked, not run: there is no AArch64 machine or emulator here.'

format: venv ## rewrite the sources the way lint wants them
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format .
	files=$$(git ls-files --cached --others --exclude-standard 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh'); \
	  test -z "$$files" || $(BIN)/clang-format -i $$files

demo: venv ## merge 150 M-parameter checkpoints (TIES + WSC), show what changed; accuracy of tiny specialists, calibrated
	$(BIN)/magic-fast demo

peers: $(PEERS)/.installed ## the tools that the benchmarks compare with

$(PEERS)/.installed: benchmarks/peers.txt .ci/constraints.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet "$$(grep '^torch==' .ci/constraints.txt)"
	$(PEERS)/bin/python -m pip install --quiet --requirement benchmarks/peers.txt
	touch $@

# What they pin would not go beside the other tests' packages.
peers-0.1.4: $(PEERS)-0.1.4/.installed ## mergekit 0.1.4, in which the tests try the replacement
peers-fusion-bench: $(PEERS)-fusion-bench/.installed ## FusionBench, in which they try the algorithm
peers-diffusers: $(PEERS)-diffusers/.installed ## diffusers and LyCORIS, whose adapters and names they compare with
peers-vision: $(PEERS)-vision/.installed ## timm and torchvision, whose models they calibrate

$(PEERS)-%/.installed: benchmarks/peers-%.txt .ci/constraints.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet "$$(cat $< .ci/constraints.txt | grep -m 1 '^torch==')"
	$(@D)/bin/python -m pip install --quiet --requirement $<
	touch $@

# Every model type of the installed transformers, built without weights: two minutes of one core, no network.
architectures: venv ## magic_fast/models/architectures.jsonl, what the tensors of each architecture are; docs/models.md
	$(BIN)/python tools/architectures/generate.py
	$(BIN)/python tools/architectures/layer_rules.py
	$(BIN)/python tools/architectures/document.py

# diffusers' own converters on tensors of tagged rows: a few seconds, no weights, no network.
diffusion-names: peers-diffusers ## magic_fast/models/diffusion/names.json, what files of diffusion models call a tensor
	$(PEERS)-diffusers/bin/python tools/diffusion_names/generate.py

suites: venv peers-diffusers ## other libraries' own tests, which ours run with our functions in place
	$(BIN)/python tests/integrations/fetch_suites.py

bench-peft: venv ## PEFT's merges of adapters with our functions in their place, against its own
	mkdir -p $(RESULTS)
	$(BIN)/python benchmarks/dropin/bench_peft.py --markdown $(RESULTS)/peft.md

bench-adapters: venv ## adapters merged by their factors, against the changes formed whole
	mkdir -p $(RESULTS)
	$(BIN)/python benchmarks/adapters/bench.py --markdown $(RESULTS)/adapters.md

bench-cpu: venv ## the native backend against the memory's speed, and against the peers
	mkdir -p $(RESULTS)
	$(BIN)/python benchmarks/cpu/bench.py --json $(RESULTS)/cpu.json --markdown $(RESULTS)/cpu.md
	$(BIN)/python benchmarks/cpu/against.py --json $(RESULTS)/peers.json --markdown $(RESULTS)/peers.md \
	  $(if $(PEER_PYTHON),--peers $(PEER_PYTHON))

bench-directions: venv ## SLERP and kin on the native backend against a copy of memory
	mkdir -p $(RESULTS)
	$(BIN)/python benchmarks/cpu/directions.py --json $(RESULTS)/directions.json --markdown $(RESULTS)/directions.md

# The flags of each instruction set are setup.py's. Runs those that this machine has, widest first.
AVX2_FLAGS = -mavx2 -mfma -mf16c
AVX512_FLAGS = -mavx512f -mavx512bw -mavx512dq -mavx512vl $(AVX2_FLAGS) -Wno-uninitialized -Wno-maybe-uninitialized
COUNTERS ?= build/counters
TREE ?= .
# The program that counts, with the loops of $(TREE).
$(COUNTERS)/counters: FORCE
	mkdir -p $(COUNTERS)
	$(CXX) $(COUNTER_FLAGS) $(AVX2_FLAGS) -c $(TREE)/csrc/cpu/isa/avx2.cpp -o $(COUNTERS)/avx2.o
	$(CXX) $(COUNTER_FLAGS) $(AVX512_FLAGS) -c $(TREE)/csrc/cpu/isa/avx512.cpp -o $(COUNTERS)/avx512.o
	$(CXX) $(COUNTER_FLAGS) -c $(TREE)/csrc/cpu/isa/baseline.cpp -o $(COUNTERS)/baseline.o
	$(CXX) $(COUNTER_FLAGS) -DMF_HAVE_BASELINE -DMF_HAVE_AVX2 -DMF_HAVE_AVX512 $(TREE)/csrc/cpu/*.cpp \
	  benchmarks/cpu/counters.cpp $(foreach isa,avx2 avx512 baseline,$(COUNTERS)/$(isa).o) -o $@ -pthread

bench-counters: $(COUNTERS)/counters ## cycles and instructions of the native loops, by the CPU's counters (x86-64, Linux)
	for isa in $$(grep -q -w avx512bw /proc/cpuinfo && echo avx512) avx2; do MAGIC_FAST_CPU_ISA=$$isa $(COUNTERS)/counters; done

bench-instructions: venv ## instructions of the native loops as ratios to those of another checkout (BEFORE=path)
	test -d "$(BEFORE)/csrc" || { echo 'BEFORE: expected the path of another checkout'; exit 1; }
	$(MAKE) COUNTERS=build/counters/before TREE=$(BEFORE) build/counters/before/counters
	$(MAKE) COUNTERS=build/counters/after TREE=. build/counters/after/counters
	mkdir -p $(RESULTS)
	$(BIN)/python benchmarks/cpu/instructions.py build/counters/before/counters build/counters/after/counters \
	  --markdown $(RESULTS)/instructions.md

bench-engine: venv ## whole merges on disk against reading and writing the same bytes
	mkdir -p $(RESULTS)
	$(BIN)/python benchmarks/engine/bench.py --make .bench --json $(RESULTS)/engine.json \
	  --markdown $(RESULTS)/engine.md $(if $(PEER_PYTHON),--peers $(PEER_PYTHON))

bench-dropin: venv ## a YAML by mergekit, by mergekit with our methods inside, and by our engine: time, and what differs
	mkdir -p $(RESULTS)
	$(BIN)/python -W ignore benchmarks/dropin/bench.py --make .bench --markdown $(RESULTS)/dropin.md
	$(BIN)/python -W ignore benchmarks/dropin/three_way.py --make .bench --size tiny small --markdown $(RESULTS)/dropin-three-way.md

bench-sweep: venv ## twelve merges from one read against three merges
	$(BIN)/python benchmarks/sweep/bench.py

bench-features: venv ## memory of calibration in feature space, layer by layer against all models
	mkdir -p $(RESULTS)
	$(BIN)/python benchmarks/features/bench.py --make .bench --size 1b --markdown $(RESULTS)/features.md

bench-spectral: venv ## the spectral methods against torch.linalg.svd
	mkdir -p $(RESULTS)
	$(BIN)/python benchmarks/spectral/bench.py --json $(RESULTS)/spectral.json --markdown $(RESULTS)/spectral.md

# Trains everything it needs; the digits come in scikit-learn's wheel.
quality: venv ## whether calibration helps: one seed, three scenarios, five λ (benchmarks/quality/PROTOCOL.md)
	$(BIN)/python -c 'import sklearn' 2>/dev/null || $(PIP) scikit-learn
	$(BIN)/python benchmarks/quality/run.py --reduced --workers 2

quality-full: venv ## the whole experiment; resumes where it was stopped (.quality)
	$(BIN)/python -c 'import sklearn' 2>/dev/null || $(PIP) scikit-learn
	mkdir -p $(RESULTS)
	$(BIN)/python benchmarks/quality/run.py --workers 2 --markdown $(RESULTS)/quality.md --json $(RESULTS)/quality.json

cuda-check: venv ## what nvcc made of the CUDA kernels: registers, spills, widths; nothing of it runs
	$(BIN)/python benchmarks/gpu/registers.py

gpu: ## everything that needs a GPU: build, tests, compute-sanitizer, benchmarks, in 10 minutes (PYTHON=, MAGIC_FAST_GOLDEN=, RESULTS=)
	$(PYTHON) benchmarks/gpu/run.py --results $(RESULTS)

clean: ## what was built; .venv, .demo and .quality stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f magic_fast/_native*.so magic_fast/_cuda*.so
