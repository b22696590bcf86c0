# Two commands from nothing:  make quickstart   and   make test
VENV ?= .venv
SOURCES := pyproject.toml constraints.txt install.sh setup.py \
           $(wildcard resnet_dist/data/decode/native/*) $(wildcard resnet_dist/kernels/native/*) \
           $(wildcard data_prep/encode/native/*)

OUT := gpu

.PHONY: help quickstart test faults gpu lint clean
help:
	@echo 'make quickstart  convert, train, kill, resume, evaluate on real images: a few minutes'
	@echo 'make test        the whole test suite, real SLURM included where root'
	@echo 'make faults      36 faults on real runs and a real SLURM, as root, with libfaketime: half an hour;'
	@echo '                 FAULTS="--json rows.json --markdown table.md" keeps the table'
	@echo 'make gpu         everything that needs a GPU: tests, then benchmarks as JSON in OUT=gpu'
	@echo 'make lint        ruff and mypy'

quickstart: $(VENV)/.ready
	$(VENV)/bin/python -m launcher.quickstart

test: $(VENV)/.ready-test lint
	$(VENV)/bin/python -m pytest -n 2

faults: $(VENV)/.ready-test
	$(VENV)/bin/python -m tests.faults $(FAULTS)

gpu: $(VENV)/.ready-test
	@$(VENV)/bin/python -c 'import torch; torch.cuda.is_available() or exit("torch sees no GPU")'
	$(VENV)/bin/python -m pytest tests/gpu tests/unit/kernels/test_kernels.py
	mkdir -p $(OUT)
	$(VENV)/bin/resnet-dist bench step --batch 256 --steps 20 --json > $(OUT)/step-256.json
	$(VENV)/bin/resnet-dist bench step --batch 32 --steps 50 --json > $(OUT)/step-32.json
	$(VENV)/bin/resnet-dist bench kernels --batch 256 --compiled --json > $(OUT)/kernels.json

lint: $(VENV)/.ready-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

$(VENV)/.ready: $(SOURCES)
	VENV=$(VENV) ./install.sh
	@touch $@

$(VENV)/.ready-test: $(SOURCES)
	VENV=$(VENV) ./install.sh --test
	@touch $@ $(VENV)/.ready

clean:
	rm -rf $(VENV) build *.egg-info
