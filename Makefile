# Each target sets up all it needs, from nothing, in a virtual environment; what is set up already is not set up again.
#
#   make bench                  everything in .venv
#   make test VENV=/some/where  another environment
#   make bench ARGS="--models resnet18 --batch-size 4"
#
# On a machine whose Python already has a torch that suits it (a CUDA build, say), keep that one:
#
#   make bench SYSTEM_TORCH=1               sees $(PYTHON)'s packages, downloads only what is missing beside torch
#   make bench SYSTEM_TORCH=1 REQUIREMENTS= downloads nothing at all (then lint and test need their tools installed)
#
# Variables: PYTHON (python3), VENV (.venv), ARGS (passed on), SYSTEM_TORCH, TORCH_REQ, VISION_REQ, REQUIREMENTS,
# WORKERS (2: processes that run the tests; empty: one, without pytest-xdist), and those of the build (CONTRIBUTING.md):
# FUSED_RESNET_CUDA, FUSED_RESNET_NO_EXT, MAX_JOBS.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2
SYSTEM_TORCH ?=
ifneq ($(SYSTEM_TORCH),)
TORCH_REQ ?=
VISION_REQ ?=
else
TORCH_REQ ?= torch==2.13.0
VISION_REQ ?= torchvision==0.28.0
endif
REQUIREMENTS ?= requirements-dev.txt requirements-nodeps.txt

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
# What clang-format checks.
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# Directories are listed too: their time changes when a file comes or goes.
BUILD_INPUTS := setup.py pyproject.toml MANIFEST.in $(shell find csrc 2>/dev/null)

.PHONY: help bench grid race test lint format docs codegen gpu-bundle bundle-size wheel clean
.DELETE_ON_ERROR:

help:
	@echo "make bench   validate and measure plain, compiled and fused networks; writes bench-report/ (ARGS=... passes more)"
	@echo "make grid    networks x batches x images x modes x dtypes against plain PyTorch; writes grid-report/ (an hour and more)"
	@echo "make race    frozen networks against torch.compile, ONNX Runtime and OpenVINO (where installed); writes race-report/"
	@echo "make test    run the tests (ARGS=... passes more to pytest)"
	@echo "make codegen     compile every Triton and CUDA kernel for three GPUs each and read the machine code; needs no GPU"
	@echo "make gpu-bundle  all that a run of benchmarks/first_light.py on an H100 or H200 needs, compiled; needs nvcc but no GPU"
	@echo "make wheel   build the wheel, for every torch >= 2.11 and every Python, into dist/"
	@echo "make lint    ruff check, ruff format --check, mypy, clang-format --dry-run, make docs"
	@echo "make format  ruff format and clang-format, in place"
	@echo "make docs    build the site of docs/ into site/; a link that leads nowhere is an error"
	@echo "make clean   remove what was built and measured; the environment $(VENV) stays"

bench: $(VENV)/.installed
	$(BIN)/python -m fused_resnet bench --preset quick --output bench-report $(ARGS)

# PYTHONPATH: torchvision_shim.py, for torchvision's networks where torchvision has no build for this torch
grid: $(VENV)/.installed
	PYTHONPATH=tests/support $(BIN)/python benchmarks/grid.py --output grid-report $(ARGS)

race: $(VENV)/.installed
	PYTHONPATH=tests/support $(BIN)/python benchmarks/race.py --output race-report $(ARGS)

# PASSIVE: the workers' threads share the cores; those that wait would keep the others' from them
test: $(VENV)/.installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests $(if $(WORKERS),--numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder) $(ARGS)

codegen: $(VENV)/.installed
	env -u TRITON_INTERPRET $(BIN)/python benchmarks/codegen.py --markdown benchmarks/results/codegen.md $(ARGS)
	$(BIN)/python benchmarks/codegen_cuda.py --markdown benchmarks/results/codegen_cuda.md || [ $$? -eq 2 ]  # 2: no nvcc
	$(BIN)/python benchmarks/codegen_cuda_conv.py --markdown benchmarks/results/codegen_cuda_conv.md || [ $$? -eq 2 ]

# For a machine with an H100 or H200, torch and Triton. There, run.sh installs the wheel into a folder beside it and
# starts the stages; only Triton's kernels are compiled there.
BUNDLE := dist/gpu-bundle
BUNDLE_MB := 40
NVCC ?= $(or $(and $(CUDA_HOME),$(CUDA_HOME)/bin/nvcc),nvcc)
gpu-bundle: $(VENV)/.requirements
	rm -rf $(BUNDLE) $(BUNDLE).tar.gz
	mkdir -p $(BUNDLE)/benchmarks $(BUNDLE)/build $(BUNDLE)/tests/backends $(BUNDLE)/tests/project
	FUSED_RESNET_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0a $(BIN)/python -m pip --disable-pip-version-check wheel \
		--no-build-isolation --no-deps --wheel-dir $(BUNDLE) $(ARGS) .
	$(NVCC) -std=c++17 -O3 -arch=sm_90a -lineinfo -shared -Xcompiler=-fPIC tests/support/conv_train_gpu.cu \
		-o $(BUNDLE)/build/conv_train_sm90.so
	cp benchmarks/*.py $(BUNDLE)/benchmarks
	cp benchmarks/first_light.sh $(BUNDLE)/run.sh
	cp pyproject.toml $(BUNDLE)
	cp -r tests/conftest.py tests/support $(BUNDLE)/tests
	cp tests/project/test_gpu.py $(BUNDLE)/tests/project
	cp tests/backends/test_cuda_conv.py tests/backends/test_cuda_kernels.py $(BUNDLE)/tests/backends
	find $(BUNDLE) -name __pycache__ -prune -exec rm -rf {} +
	@$(MAKE) --no-print-directory bundle-size
	tar -czf $(BUNDLE).tar.gz -C dist gpu-bundle

# A GPU is at hand for minutes, and the upload of the bundle counts against them.
bundle-size:
	@find $(BUNDLE) -type f -printf '%s %P\n' | sort -rn | awk ' \
		{ bytes += $$1; if (NR <= 5) largest = largest "\n" $$0 } \
		END { took = sprintf("$(BUNDLE) takes %.1f MB of at most $(BUNDLE_MB) MB", bytes / 1e6); \
			if (bytes > 0 && bytes <= $(BUNDLE_MB) * 1e6) print took; \
			else { print "error: " took ". Its largest files, in bytes:" largest > "/dev/stderr"; exit 1 } }'

# With the CUDA part where nvcc is there: who makes a wheel waits for nvcc. auditwheel names the oldest manylinux that has
# the symbols; torch and CUDA's driver stay outside.
wheel: $(VENV)/.requirements
	rm -rf dist/linux
	FUSED_RESNET_CUDA=$${FUSED_RESNET_CUDA:-$$($(BIN)/python -c \
		'import setup; print("auto" if setup.cuda_lacks()[0] else 1)')} && export FUSED_RESNET_CUDA && \
	$(BIN)/python -m pip --disable-pip-version-check wheel --no-build-isolation --no-deps --wheel-dir dist/linux $(ARGS) .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcuda*' \
		--wheel-dir dist dist/linux/*.whl

lint: docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy fused_resnet
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.requirements
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# No --quiet: it hides warnings from mkdocs.yml's strict, too. PATH: ruff formats the reference's signatures.
docs: $(VENV)/.requirements
	NO_MKDOCS_2_WARNING=1 PATH="$(abspath $(BIN)):$$PATH" $(BIN)/mkdocs build

clean:
	rm -rf build dist site *.egg-info bench-report grid-report race-report study-report fused_resnet/lib .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -path './.venv*' -prune -o -name __pycache__ -prune -exec rm -rf {} +
	rm -f $(VENV)/.installed

# With SYSTEM_TORCH, a .pth file rather than --system-site-packages alone: the latter does not see the packages of a
# PYTHON that is a virtual environment itself. The setuptools that venv brings (Python 3.11) would hide the newer one.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit("fused_resnet needs Python 3.11 or newer: make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(if $(SYSTEM_TORCH),--system-site-packages) $(VENV)
ifneq ($(SYSTEM_TORCH),)
	$(PYTHON) -c 'import site; print(*site.getsitepackages(), sep="\n")' \
		> "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/system_torch.pth"
	$(BIN)/python -m pip uninstall --quiet --yes setuptools
endif
	@touch $@

# torchvision goes without its dependencies, as its torch may be another build than ours.
$(VENV)/.requirements: $(REQUIREMENTS) | $(VENV)/.created
	$(if $(TORCH_REQ)$(REQUIREMENTS),$(PIP) $(TORCH_REQ) $(patsubst %,-r %,$(filter-out %-nodeps.txt,$(REQUIREMENTS))))
	$(if $(VISION_REQ)$(REQUIREMENTS),$(PIP) --no-deps $(VISION_REQ) $(patsubst %,-r %,$(filter %-nodeps.txt,$(REQUIREMENTS))))
	@touch $@

# --no-deps: everything the package needs is there by now, and torch must stay the one that was chosen.
$(VENV)/.installed: $(VENV)/.requirements $(BUILD_INPUTS)
	$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@
