# The commands of daily work. `make setup` once; every other target uses the environment that it makes.
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
PRESET ?= laptop
PYTHONS ?= 3.11 3.12 3.13 3.14

.PHONY: help setup test plain slow lint format smoke laptop docs dist release gpu-pins bench publish

help:  ## List the targets.
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup:  ## Make the virtual environment with everything for development.
	python3 -m venv .venv
	pip install -c constraints.txt -e '.[test,docs]' -e advice

test:  ## Run the fast tests, about 3 minutes on 2 cores.
	pytest

# What other folders compute does not depend on the instructions of a processor.
plain:  ## Run the fast tests that train, held to the instructions of a processor without AVX-512, AMX and bf16.
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 pytest $(addprefix tests/, models training)

# It takes half as long to read only the files that have such tests.
slow:  ## Run the end-to-end, process and signal tests that CI runs too.
	pytest -m 'slow and not long and not slurm and not gpu' $$(grep -rlE 'mark\.slow|slow_but' tests advice/tests --include='test_*.py')

lint:  ## Check style, types, spelling, the floors of the packages, the workflow, and the files of a release.
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow
	mypy
	codespell
	lint-imports
	snakemake --lint
	hadolint workflow/envs/Dockerfile
	check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml

format:  ## Format the code and the workflow.
	ruff check --fix .
	ruff format .
	snakefmt Snakefile workflow

smoke:  ## Run every part at the smallest size, about a minute.
	snakemake --cores all --config preset=smoke

laptop:  ## Run the default preset, about 13 minutes on two cores.
	snakemake --cores all

docs:  ## Build the documentation into site/.
	mkdocs build --strict

dist:  ## Build the source archives and wheels of lorabench and lora-advice into dist/, and check them.
	pip install -q -c constraints.txt build check-wheel-contents "setuptools>=77" setuptools-scm twine
	rm -rf dist
	python -m build --no-isolation -q
	python -m build --no-isolation -q --outdir dist advice
	twine check --strict dist/*
	check-wheel-contents dist/*.whl

# The version is that of the newest section of the changelog, which need not be tagged yet.
release: export SETUPTOOLS_SCM_PRETEND_VERSION = $(shell python3 workflow/scripts/release.py --version)
release: dist  ## Build both distributions, check them on each Python that is here, and write build/notes.md.
	python workflow/scripts/release.py --python $(PYTHONS)

# Below, of numpy, vLLM and the plugin for Slurm ask for different versions, and the second command installs the plugin's.
RESOLVED := uv pip compile -q --no-config --no-annotate --no-header --python-platform x86_64-manylinux_2_31
# Each has PyPI's torch, which is built for CUDA, with its Triton.
FOR_GPU := grep -E '^(flash-attn-4|nvidia-cuda-runtime|torch|transformers|triton|vllm)==' | xargs | grep 'nvidia-cuda.* torch=.* triton='
gpu-pins: SHELL := bash -eo pipefail
gpu-pins:  ## Check from metadata that the documented commands can be installed for a GPU, and vLLM with its own torch.
	pip install -q uv==0.13.9
	for python in 3.11 3.12 3.13; do \
		echo "Python $$python: with the pinned versions, with the oldest allowed ones, and with vLLM"; \
		$(RESOLVED) --python-version $$python pyproject.toml advice/pyproject.toml -c constraints.txt | $(FOR_GPU); \
		$(RESOLVED) --python-version $$python pyproject.toml --resolution lowest-direct | $(FOR_GPU); \
		sed -n 's/^pip install \(vllm==[^ ]*\) \(flash-attn-4==[^ ]*\) .*/\1\n\2/p' docs/cluster.md | grep . | $(RESOLVED) --python-version $$python \
			- pyproject.toml -c constraints-vllm.txt --override <(grep ^numpy== constraints-vllm.txt) | \
			$(FOR_GPU) | grep 'flash-attn-4=.* vllm=='; \
	done

bench:  ## Measure the speed against other trainers and print the table.
	python -m benchmarks.speed

publish:  ## Copy the figures and verdicts of a finished preset (PRESET=laptop) to where the repository shows them.
	python workflow/scripts/publish.py --preset $(PRESET)
