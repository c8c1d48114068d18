# Everything runs in .venv at the repository root, which make creates and keeps current.
# A part of the tests: make test ARGS=tests/unit. Another torch, say for a GPU: export TORCH and
# TORCH_INDEX before the first make.

PYTHON ?= python3
TORCH ?= $(shell cat requirements/torch.txt)+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
UV ?= $(BIN)/uv
files = $(shell git ls-files --cached --others --exclude-standard $(1))
SHELL_FILES = $(call files,'*.sh' '*.sbatch' .ci/run)
CPP_FILES = $(call files,'*.cpp' '*.cu' '*.cuh' '*.h')
DOCKERFILES = $(call files,'*Dockerfile')

.PHONY: help venv kernels demo test slurm-lab check format lock clean-venv
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

venv: .venv/.dev ## create or update .venv with everything to run and develop

# The build knows itself what changed; what it compiles it shows.
kernels: .venv/.train ## csrc/ to fastvideo/_C.so; for CUDA where nvcc is found
	$(BIN)/python setup.py --quiet build_ext --inplace

demo: .venv/.train ## real clips to a finetuned model, on the CPU
	PATH="$(CURDIR)/$(BIN):$$PATH" examples/tiny_real_clips/demo.sh

test: .venv/.dev kernels ## pytest $(ARGS)
	$(BIN)/pytest $(ARGS)

slurm-lab: .venv/.train ## a real Slurm on this machine, as root; ARGS=stop ends it
	$(BIN)/python -m tests.slurm.lab $(or $(ARGS),start)

check: .venv/.dev ## lint, types, imports, scripts, configs; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck $(SHELL_FILES)
	$(BIN)/shfmt -d -i 2 $(SHELL_FILES)
	$(if $(CPP_FILES),$(BIN)/clang-format --dry-run -Werror $(CPP_FILES))
	$(if $(DOCKERFILES),$(BIN)/hadolint $(DOCKERFILES))
	$(BIN)/python -m fastvideo.config.reference --check

format: .venv/.dev ## repair what check finds, where a tool can
	$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format
	$(BIN)/shfmt -w -i 2 $(SHELL_FILES)
	$(if $(CPP_FILES),$(BIN)/clang-format -i $(CPP_FILES))
	$(BIN)/python -m fastvideo.config.reference

# torch is left out: its build depends on the machine, its one pin is requirements/torch.txt.
LOCK = $(UV) pip compile --quiet --universal --fork-strategy fewest --python-version 3.11 \
	--generate-hashes --no-annotate --custom-compile-command "make lock" \
	--override requirements/no_torch.in --no-emit-package torch $(ARGS)

lock: ## rewrite requirements/*.txt from pyproject.toml; newest versions with ARGS=--upgrade
	$(LOCK) pyproject.toml requirements/train.in --extra train -o requirements/train.txt
	$(LOCK) pyproject.toml --extra dev -c requirements/train.txt -o requirements/dev.txt

clean-venv: ## remove .venv
	rm -rf .venv

# The lock comes first: a CPU torch then finds all it needs, a CUDA torch adds its libraries.
.venv/.train: requirements/train.txt requirements/torch.txt pyproject.toml setup.py | $(BIN)/pip
	$(PIP) install --require-hashes --no-deps -r requirements/train.txt
	$(PIP) install --retries 1 --extra-index-url $(TORCH_INDEX) '$(TORCH)'
	FASTVIDEO_BUILD=none $(PIP) install --no-deps --no-build-isolation --editable .
	$(PIP) check
	touch $@

.venv/.dev: .venv/.train requirements/dev.txt
	$(PIP) install --require-hashes --no-deps -r requirements/dev.txt
	touch $@

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo 'Python lacks venv: apt-get install python3-venv' >&2; exit 1; }
	$(PYTHON) -m venv .venv
