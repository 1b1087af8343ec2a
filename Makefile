# `make help` lists the targets. Everything runs in .venv, which the first target makes.
# To run in an environment that is already complete, installing nothing:
#     make test TIER=gpu PYTHON=python3 VENV=
PYTHON ?= python3
VENV ?= .venv
TIER ?= all

PIP := -m pip --disable-pip-version-check install --quiet

ifeq ($(strip $(VENV)),)
run := $(PYTHON)
floor :=
ready :=
else
run := $(VENV)/bin/python
floor := $(VENV)/floor
ready := $(VENV)/.ready
endif

# Only a whole run and TIER=floor need the oldest triton.
ifneq ($(filter all floor,$(TIER)),)
floor_ready := $(if $(floor),$(floor)/.ready)
endif

.PHONY: help demo demo-ddp test fuzz bench gpu lint docs clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 16

demo: $(ready) ## train a small network with LARS and with SGD at batch 1,024
	$(run) -m lars_fused.study.demo

demo-ddp: $(ready) ## train with DDP on two local processes; ARGS="..." is passed on
	OMP_NUM_THREADS=1 PYTHONPATH=".$${PYTHONPATH:+:$$PYTHONPATH}" $(run) -m torch.distributed.run \
		--standalone --nproc-per-node 2 examples/train_ddp.py $(ARGS)

test: $(ready) $(floor_ready) ## lint, types and tests; TIER=lint|cpu|interpret|ptx|codegen|floor|gpu for one
	$(run) ci/test.py $(TIER) $(if $(floor),--floor $(floor)) $(if $(ARGS),-- $(ARGS))

fuzz: $(ready) ## the slow tests, and the property-based ones with many more examples
	HYPOTHESIS_PROFILE=fuzz $(run) ci/test.py cpu interpret codegen --slow $(if $(ARGS),-- $(ARGS))

bench: $(ready) ## run the benchmarks; ARGS="..." is passed on
	$(run) -m bench $(ARGS)

gpu: $(ready) ## everything that needs a GPU; ARGS=first|second|third for one call of under ten minutes
	PYTHON="$(run)" ci/gpu.sh $(ARGS)

lint: $(ready) ## ruff and mypy only
	$(run) ci/test.py lint

docs: $(ready) ## serve the documentation on this machine; ARGS=build writes it to site/
	NO_MKDOCS_2_WARNING=1 $(run) -m mkdocs $(or $(ARGS),serve)

clean: ## remove the environment and whatever was built
	rm -rf .venv build dist site demo_output *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is written last: an installation that was cut short is done again.
$(VENV)/.ready: setup.py pyproject.toml constraints.txt
	@echo "making $(VENV) (a few minutes the first time)"
	$(PYTHON) -m venv $(VENV)
# torch goes first, by itself: nothing that follows can then choose another build of it.
	$(VENV)/bin/python $(PIP) -c constraints.txt torch
	$(VENV)/bin/python $(PIP) -c constraints.txt -e '.[test,study,bench]'
	@touch $@

$(VENV)/floor/.ready: constraints-floor.txt $(ready)
	rm -rf $(VENV)/floor
	$(VENV)/bin/python $(PIP) -c constraints-floor.txt --no-deps --target $(VENV)/floor triton
	@touch $@
