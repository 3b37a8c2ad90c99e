# Every target needs Python 3.11+, git and make, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LATEST := .venv-latest
# of test-latest
TORCH ?= 2.13.0
STACK := transformers trl accelerate peft datasets bitsandbytes huggingface_hub tokenizers safetensors
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-slow browser test-browser test-gpu test-latest check

demo: $(INSTALLED)
	$(BIN)/hfsft run recipes/demo.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow and not browser and not gpu"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# a Chromium for test-browser; installed where there is none, if apt-get may
browser:
	@command -v chromedriver >/dev/null || { \
		echo "installing chromium and chromium-driver"; \
		sudo=$$(test "$$(id -u)" = 0 || echo sudo); \
		$$sudo apt-get update --quiet=2 && \
		$$sudo apt-get install --quiet=2 --yes chromium chromium-driver; \
	} || { echo "test-browser needs Chromium and chromedriver on the PATH" >&2; exit 2; }

# the web page, in a real browser
test-browser: $(INSTALLED) browser
	$(BIN)/python -m pytest -m browser

test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

# the newest releases of the stack, beyond pyproject.toml's ranges too, instead of constraints.txt
test-latest:
	test -d $(LATEST) || $(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/pip install --quiet "torch==$(TORCH)"
	$(LATEST)/bin/pip install --quiet --editable ".[dev]" "torch==$(TORCH)"
	$(LATEST)/bin/pip install --quiet --upgrade $(STACK) "torch==$(TORCH)"
	$(LATEST)/bin/pip list
	$(LATEST)/bin/python -m pytest -m "not slow and not browser and not gpu"

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest tests/test_layout.py

# again only after the pinned versions or the package's own settings changed
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'hfsft needs Python 3.11 or newer')"
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt "torch>=2.11,<2.14"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(INSTALLED)
