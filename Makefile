# Every target does its own set-up: a Python of 3.12 or newer is found, .venv is made and filled once.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test lint types unit mutants memory newest offline-gpu kernel-report clean

venv: $(STAMP)

$(STAMP): pyproject.toml
	@sh .ci/make_venv $(VENV)
	@echo "installing fps-jax and its test tools into $(VENV) (a few minutes the first time)"
	@sh .ci/pip_into $(VENV) --upgrade pip
	@sh .ci/pip_into $(VENV) --editable '.[test]' 'jax==0.11.2'
	@touch $(STAMP)

# PROMPT="a red circle moves left" says another one.
demo: $(STAMP)
	@$(BIN)/python -m benchmarks.claim.demo $${PROMPT:+--prompt "$$PROMPT"}

test: lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Faults planted one at a time in ten files: do the tests notice? A quarter of an hour; ARGS="--most 20" for less.
mutants: $(STAMP)
	$(BIN)/python -m benchmarks.mutants $(ARGS)

# The newest jax that pyproject.toml allows, in an environment of its own: imports, lowering and a parity smoke.
newest:
	@sh .ci/make_venv .venv-newest
	@sh .ci/pip_into .venv-newest --editable '.[test]' --upgrade --upgrade-strategy eager
	.venv-newest/bin/python -m pytest -n 2 tests/test_newest_jax.py tests/pallas_kernels/test_interpret.py \
		tests/pallas_kernels/test_mosaic.py tests/pallas_kernels/sm90/test_registers.py

# Bytes per device at real size, compiled for an H200 on this machine (no GPU needed).
memory:
	@sh .ci/make_venv .venv-offline-gpu
	@sh .ci/pip_into .venv-offline-gpu --editable '.[offline-gpu]'
	.venv-offline-gpu/bin/python -m benchmarks.memory

# Machine code of the Hopper kernels, and a small training step for eight GPUs, compiled on this machine (no GPU needed): fails
# where it broke a limit or got worse.
offline-gpu:
	@sh .ci/make_venv .venv-offline-gpu
	@sh .ci/pip_into .venv-offline-gpu --editable '.[offline-gpu]'
	.venv-offline-gpu/bin/python -m benchmarks.kernel_report --check
	.venv-offline-gpu/bin/python -m benchmarks.cluster_plan --check

# Writes the report anew, with the newest ptxas beside the pinned one.
kernel-report:
	@sh .ci/make_venv .venv-offline-gpu
	@sh .ci/pip_into .venv-offline-gpu --editable '.[offline-gpu]'
	@sh .ci/pip_into .venv-offline-gpu --upgrade --no-deps \
		--target .venv-offline-gpu/newest-nvcc nvidia-cuda-nvcc
	.venv-offline-gpu/bin/python -m benchmarks.kernel_report \
		--newest-ptxas .venv-offline-gpu/newest-nvcc/nvidia/cu13/bin

clean:
	rm -rf $(VENV) .venv-newest .venv-offline-gpu outputs build *.egg-info
