# Every target installs what it needs into .venv first; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
RUN_DIR ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
OVERRIDES ?=
BENCH ?=

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint test-cluster faults chaos alignment udasa kernels bench bench-tables overlap learning step planner scaling publish rollout peers clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: $(INSTALLED)  ## train on two CPU cores, about ten minutes; RUN_DIR=folder OVERRIDES="key.sub=value …"
	$(VENV)/bin/asa train configs/quickstart.yaml $(OVERRIDES) --run-dir $(RUN_DIR)

test: $(INSTALLED)  ## all tests; PYTEST_ADDOPTS="-k trust" selects
	$(VENV)/bin/python -m pytest --durations=10

lint: $(INSTALLED)  ## style, types, layers, shell scripts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy asa_dist kernels/asa_kernels
	$(VENV)/bin/lint-imports
	$(VENV)/bin/shellcheck launch/*.sh launch/slurm/*.sbatch tests/cluster/*.sh

test-cluster: $(INSTALLED)  ## several hosts in namespaces, SLURM and ssh, faults too: root, `bash tests/cluster/install.sh`; 25 minutes
	$(VENV)/bin/python -m pytest tests/cluster --long --durations=20

faults: $(INSTALLED)  ## every fault test, also those that CI has no time for
	$(VENV)/bin/python -m pytest tests/faults --long --kill-points 9

chaos: $(INSTALLED)  ## 20 random kills of a run's processes, about half an hour: nothing lost, nothing repeated
	$(VENV)/bin/python benchmarks/chaos.py --minutes 90 --seed 2 --kills 20

alignment: $(INSTALLED)  ## truth or only certainty: every arm, on a world whose truth is known; an idle machine, an hour
	$(VENV)/bin/python benchmarks/alignment.py --work runs/alignment --out benchmarks/alignment.json

udasa: $(INSTALLED)  ## UDASA on a world whose truth is known: every arm, three seeds; an idle machine, a quarter of an hour
	$(VENV)/bin/python benchmarks/udasa.py --work runs/udasa-benchmark --out benchmarks/udasa.json

kernels: $(INSTALLED)  ## compile every kernel for four GPUs, without one; writes the tables in benchmarks/README.md
	$(VENV)/bin/python benchmarks/kernels.py compile

bench: $(INSTALLED)  ## the throughput benchmarks, short: what was promised, what was kept; BENCH="--smoke", "--only step"; an idle machine
	$(VENV)/bin/python benchmarks/bench.py $(BENCH)

bench-tables: $(INSTALLED)  ## benchmarks/results/*.json as tables in benchmarks/README.md
	$(VENV)/bin/python benchmarks/readme_tables.py

overlap: $(INSTALLED)  ## a step at max_policy_age 0, 1, 2, 4, 8 beside the longer of train and rollout; an idle machine, half an hour
	$(VENV)/bin/python benchmarks/overlap.py --out benchmarks/results/overlap.json

learning: $(INSTALLED)  ## what staleness costs in learning, one seed; an idle machine, half an hour
	$(VENV)/bin/python benchmarks/overlap.py --learning --seeds 1 --work runs/learning --out benchmarks/results/overlap_learning.json

step: $(INSTALLED)  ## the fused step beside a plain language-model step and beside separate passes; an idle machine
	$(VENV)/bin/python benchmarks/step.py --out benchmarks/results/step.json

planner: $(INSTALLED)  ## is `asa plan --machine this` right? an idle machine
	$(VENV)/bin/python benchmarks/planner.py --out benchmarks/results/planner.json

scaling: $(INSTALLED)  ## weak and strong scaling on 1, 2, 4 ranks, simulated to 1,024 GPUs; an idle machine, 10 minutes
	$(VENV)/bin/python benchmarks/scaling.py --out benchmarks/results/scaling.json
	$(VENV)/bin/python benchmarks/scaling_picture.py benchmarks/results/scaling.json benchmarks/scaling.svg

publish: $(INSTALLED)  ## how long publishing weights keeps the trainer from training; an idle machine
	$(VENV)/bin/python benchmarks/publish.py --out benchmarks/results/publish.json

rollout: $(INSTALLED)  ## tokens/s through the rollout worker beside bare vLLM, engines vllm and hf; an idle machine, 20 minutes
	$(VENV)/bin/python benchmarks/rollout.py --out benchmarks/results/rollout.json

peers: $(INSTALLED)  ## samples/s of a whole step beside TRL's GRPO trainer, on two cores; an idle machine
	test -x .venv-trl/bin/python || { $(PYTHON) -m venv .venv-trl && .venv-trl/bin/pip install -c constraints.txt trl; }
	$(VENV)/bin/python benchmarks/peers.py --out benchmarks/results/peers.json

clean:  ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) .venv-trl .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
	find asa_dist kernels tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# The stamp is written last: an interrupted install is taken up again.
$(INSTALLED): setup.py constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
