# `make delay_law` and `make test` set up .venv on first use. `make X PY=python3` uses an existing environment instead.
# ARGS="--p 59 --members 0 1" passes flags on.
VENV := .venv
PY   ?= $(VENV)/bin/python
RELEASED ?= ../shared/released
ifeq ($(PY),$(VENV)/bin/python)
READY := $(VENV)/.ready
endif

.DELETE_ON_ERROR:
.PHONY: delay_law logit_scale fork transformer parity saturation paper replay report bench test test-gpu compile-all count gpu-evidence lint clean

delay_law: $(READY)
	'$(PY)' exp_delay_law.py $(ARGS)

logit_scale: $(READY)
	'$(PY)' exp_logit_scale.py $(ARGS)

fork: $(READY)
	'$(PY)' exp_fork.py $(ARGS)

transformer: $(READY)
	'$(PY)' exp_transformer.py $(ARGS)

parity: $(READY)
	'$(PY)' exp_parity.py $(ARGS)

saturation: $(READY)
	'$(PY)' exp_saturation.py $(ARGS)

paper: $(READY)           # on a GPU: the paper presets of all experiments, at most ten minutes a call: call again until it says complete
	'$(PY)' bench/gpu_evidence.py --paper $(ARGS)

replay: $(READY)          # RELEASED=folder with the released .npz files
	'$(PY)' exp_replay.py '$(RELEASED)' $(ARGS)

report: $(READY)          # the README's table from results/*/*/summary.json
	'$(PY)' -m lab.report $(ARGS)

bench: $(READY)
	'$(PY)' bench/bench_step.py $(ARGS)

test: $(READY)
	'$(PY)' -m pytest -q $(ARGS)

test-gpu: $(READY)        # the kernels' tests natively; fails without a GPU
	GROKKING_TEST_GPU=1 '$(PY)' -m pytest -q -rs tests/test_triton.py $(ARGS)

compile-all: $(READY)     # every kernel that experiments, tests and bench launch, for sm_90, without a GPU; results/bench/kernels_sm90.csv
	'$(PY)' tests/sm90.py --out results/bench $(ARGS)

count: $(READY)           # what a step costs a GPU at least, counted from the machine code, without one; results/bench/count_sm90.csv
	'$(PY)' bench/count_sm90.py $(ARGS)

gpu-evidence: $(READY)    # all that only a GPU can show, in stages of at most ten minutes: call again until it says complete
	'$(PY)' bench/gpu_evidence.py --released '$(RELEASED)' $(ARGS)

lint: $(READY)
	'$(PY)' -m ruff check .

$(VENV)/.ready: requirements.txt
	python3 -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or later is needed, python3 is " + sys.version.split()[0])'
	python3 -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

clean:                    # the environment and caches; never results
	rm -rf $(VENV) .pytest_cache .ruff_cache
