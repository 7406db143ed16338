# Two commands matter: `make serve` and `make test`. `make check` is what CI runs.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
# The newest release of the tested range; a torch that is already in the environment is kept.
TORCH  ?= torch==2.13.0

.PHONY: help serve stop test test-portable test-triton test-mutations test-gpu test-gpu-dry test-clients fuzz test-systemd check lint types imports bench clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(VENV)/bin/python pyproject.toml setup.py $(wildcard kernels/cpu/csrc/*)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) install -q "$(TORCH)" numpy
	$(PIP) install -q "setuptools>=77" wheel
	$(PIP) install -q --no-build-isolation -e .
	@touch $@

# Not `-e ".[dev]"`, which would compile the C library once more.
$(VENV)/.dev: $(VENV)/.core
	@$(BIN)/python -c 'import tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
	print(*extras["optional-dependencies"]["dev"], sep="\n")' > $(VENV)/dev.txt
	$(PIP) install -q -r $(VENV)/dev.txt
	@touch $@

# The second generation of the SDK lives beside the first: a test drives both.
$(VENV)/.openai2: $(VENV)/.dev
	$(PIP) install -q --target $(VENV)/openai2 "openai>=2.54,<3"
	@touch $@

tests/e2e/clients/js/node_modules: tests/e2e/clients/js/package.json tests/e2e/clients/js/package-lock.json
	@if command -v npm >/dev/null; then cd tests/e2e/clients/js && npm ci --silent --no-audit --no-fund; \
	else echo "npm is not installed: the JavaScript client is not tested"; fi

# Not all frameworks take the SDK's third generation, so there are two environments.
$(VENV)/clients/%/.installed: tests/e2e/clients/frameworks/%.txt
	$(PYTHON) -m venv $(VENV)/clients/$*
	$(VENV)/clients/$*/bin/python -m pip --disable-pip-version-check install -q --no-deps -r $<
	@touch $@

test-clients: $(VENV)/.dev $(VENV)/clients/openai2/.installed $(VENV)/clients/openai3/.installed  ## LangChain, LiteLLM, lm-eval, …
	$(BIN)/python -m pytest -q -m clients tests/e2e/clients/test_frameworks.py

.src/quantd:
	@mkdir -p $@
	@for room in daemon plugins kernels; do ln -sfn ../../$$room $@/$$room; done

serve: $(VENV)/.core  ## set up, serve the embedded model, ask it something
	@$(BIN)/python examples/first_answer.py

stop:  ## end the daemon that `make serve` started
	@$(BIN)/python examples/first_answer.py --stop

test: $(VENV)/.dev $(VENV)/.openai2 tests/e2e/clients/js/node_modules  ## run the tests
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow and not gpu and not clients"

# As a machine without a C compiler would install it: a wheel whose library failed to build. What an
# earlier build has left would go into it.
$(VENV)/portable/.built: $(VENV)/.dev $(wildcard daemon/*.py daemon/*/*.py daemon/*/*/*.py plugins/*.py plugins/*/*.py kernels/*.py kernels/*/*.py)
	@rm -rf $(@D) build && mkdir -p $(@D)
	@CC=false $(PIP) wheel -q --no-deps --no-build-isolation -w $(@D) . 2>/dev/null
	@$(PIP) install -q --no-deps --target $(@D) $(@D)/*.whl
	@test ! -e $(@D)/quantd/kernels/cpu/_native.so
	@touch $@

# Bit-equality of rows in any batch is the library's promise; plain torch is close (kernels/README.md).
NATIVE_ONLY := tests/numerics/test_families.py::test_batched_as_alone \
	tests/numerics/test_families.py::test_chunks \
	tests/numerics/test_pooled.py::test_a_decoder_reads_a_prompt_in_chunks \
	tests/kernels/test_encoder.py::test_activations \
	tests/numerics/test_budget.py::test_a_step_takes_what_its_shapes_say \
	tests/numerics/test_budget.py::test_a_loaded_model_gets_what_its_device_has_left \
	tests/numerics/test_budget.py::test_a_process_takes_what_is_predicted

test-portable: $(VENV)/portable/.built  ## the tests that need no C library, without it
	PYTHONPATH=$(abspath $(VENV)/portable) $(BIN)/python -m pytest -q -n 2 --dist loadgroup \
		-m "not slow and not gpu and not clients" $(addprefix --deselect ,$(NATIVE_ONLY)) \
		tests/kernels tests/numerics tests/e2e/test_answers.py

test-triton: $(VENV)/.dev  ## the GPU kernels in Triton's interpreter, which needs no GPU
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q -n 2 tests/triton

test-mutations: $(VENV)/.dev  ## the proofs of the GPU kernels fail when a kernel is broken on purpose
	$(BIN)/python -m pytest -q -n 2 tests/mutations

# The same end-to-end tests, of daemons whose models are on the GPU, after the tests of the GPU itself.
test-gpu: $(VENV)/.dev  ## the tests of a GPU, then the end-to-end tests on it
	QUANTD_TEST_DEVICE=cuda $(BIN)/python -m pytest -q -m gpu tests/gpu
	QUANTD_TEST_DEVICE=cuda $(BIN)/python -m pytest -q -m "not slow and not clients" tests/e2e

test-gpu-dry: $(VENV)/.dev  ## the bodies of the GPU's tests on small CPU tensors: do they work?
	QUANTD_GPU_TESTS_ON_CPU=1 $(BIN)/python -m pytest -q -n 2 -m gpu tests/gpu

ROOT := $(abspath $(VENV))/debian
test-systemd: $(VENV)/.dev  ## the units in a booted container: root, debootstrap, systemd-nspawn
	@test -d $(ROOT)/etc || debootstrap --variant=minbase --include=systemd,dbus bookworm $(ROOT)
	QUANTD_TEST_ROOT=$(ROOT) $(BIN)/python -m pytest -q tests/e2e/test_nspawn.py

lint: $(VENV)/.dev  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev .src/quantd  ## mypy, strict
	$(BIN)/mypy

imports: $(VENV)/.dev  ## who may import whom
	$(BIN)/lint-imports

check: lint types imports test test-triton test-mutations test-gpu-dry test-portable  ## everything that CI runs

fuzz: $(VENV)/.dev  ## 100,000 mutated headers of model files; 1,000 requests to each route
	PYTHONPATH=tests $(BIN)/python tests/fuzz/fuzz_headers.py --count 100000
	PYTHONPATH=tests $(BIN)/python tests/fuzz/fuzz_openapi.py --examples 1000
	PYTHONPATH=tests $(BIN)/python tests/fuzz/fuzz_openapi.py --examples 1000 --filtered

bench: $(VENV)/.dev  ## the server's benchmarks on this machine
	$(BIN)/python benchmarks/serve.py

clean:  ## remove what the build made
	rm -rf $(VENV) .src build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
